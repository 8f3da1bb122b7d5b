"""Objectives: configured, found by themselves, or a request's own; and changed while requests run."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from selectn_core.config import BatchConfig, SloConfig
from selectn_core.control.controller import Decision
from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError, RequestError
from selectn_core.latency.steps import StepShape
from selectn_core.offload.control import LinkShare
from selectn_core.profiling.record_cache import performance_record
from selectn_core.requests.objectives import (
    TPOT_MULTIPLE,
    TTFT_MULTIPLE,
    Objectives,
    configured_objectives,
    requested_objectives,
    resolve_objectives,
)
from tests.support.controlled import step_times
from tests.support.engines import engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model

BATCH = BatchConfig(max_requests=8, max_batch_tokens=128, kv_tokens=1600)
DEFAULT = Objectives(ttft_s=2.0, tpot_s=0.2)


def test_auto_is_a_multiple_of_the_unloaded_latency() -> None:
    times = step_times()
    found = resolve_objectives(SloConfig(), times, BATCH)
    assert found.tpot_s == pytest.approx(TPOT_MULTIPLE * times.expected_s(StepShape.decode(8, 200)))
    assert found.ttft_s == pytest.approx(TTFT_MULTIPLE * times.expected_s(StepShape.prefill(128)))


def test_a_number_is_taken_as_it_is() -> None:
    slo = SloConfig(ttft_ms=500.0, tpot_ms=50.0)
    expected = Objectives(ttft_s=0.5, tpot_s=0.05)
    assert resolve_objectives(slo, step_times(), BATCH) == expected
    assert configured_objectives(slo) == expected
    assert configured_objectives(SloConfig(ttft_ms=500.0)) is None


def test_a_request_may_have_its_own_within_the_range() -> None:
    slo = SloConfig(tightest=0.5, loosest=4.0)
    own = requested_objectives(DEFAULT, slo, ttft_ms=None, tpot_ms=100.0)
    assert own == Objectives(ttft_s=2.0, tpot_s=0.1)
    with pytest.raises(RequestError, match="slo.tpot_ms=99 is not allowed: expected 100 to 800"):
        requested_objectives(DEFAULT, slo, ttft_ms=None, tpot_ms=99.0)
    with pytest.raises(RequestError, match="slo.ttft_ms=8001 is not allowed: expected 1000 to 8000"):
        requested_objectives(DEFAULT, slo, ttft_ms=8001.0, tpot_ms=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tpot_ms": 0}, "slo.tpot_ms=0 is not allowed: expected more than 0, at most .*, or 'auto'"),
        ({"ttft_ms": "soon"}, "slo.ttft_ms='soon' is not allowed"),
        ({"percentile": 101.0}, "slo.percentile=101.0 is not allowed"),
        ({"tightest": 2.0}, "slo.tightest=2.0 is not allowed: expected more than 0, at most 1"),
        ({"loosest": 0.5}, "slo.loosest=0.5 is not allowed: expected at least 1"),
    ],
)
def test_a_wrong_objective_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SloConfig(**values)  # type: ignore[arg-type]


def test_objectives_change_while_requests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    engine = Engine(tiny_model(), engine_config("auto"))
    engine.steer(performance_record(engine, budget_s=2.0))
    first = engine.objectives
    prompts = make_prompts()
    with engine:
        handles = [engine.submit(prompt, greedy()) for prompt in prompts]
        engine.set_objectives(SloConfig(ttft_ms=1234.0, tpot_ms=56.0))
        assert engine.objectives == Objectives(ttft_s=1.234, tpot_s=0.056)
        assert all(len(handle.result()) for handle in handles)
        snapshot = engine.snapshot()
    assert first != engine.objectives
    assert snapshot["steering"]["policy"] == "select-n"
    assert snapshot["objectives"] == {"ttft_s": 1.234, "tpot_s": 0.056}
    assert all(record.limit_s is not None for record in engine.steps.records)


def test_a_request_that_has_waited_too_long_elsewhere_has_missed_its_objective() -> None:
    config = replace(engine_config(0), slo=SloConfig(ttft_ms=60_000.0, tpot_ms=60_000.0))
    with Engine(tiny_model(), config) as engine:
        for waited_s, attained in ((1.0, 1.0), (100.0, 0.5)):
            engine.submit(make_prompts()[0], greedy(), waited_s=waited_s).result()
            assert engine.snapshot()["attainment"]["attained"] == attained


def test_a_plan_by_hand_rests_the_policy_until_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    engine = Engine(tiny_model(), engine_config("auto"))
    engine.steer(performance_record(engine, budget_s=2.0))
    with engine:
        engine.set_num_offloaded(2)
        assert engine.offloading.control.is_manual
        engine.submit(make_prompts()[0], greedy()).result()
        assert engine.executor.plan.num_offloaded == 2
        engine.resume_policy()
        assert not engine.offloading.control.is_manual
        assert len(engine.submit(make_prompts()[0], greedy()).result()) > 0


def test_a_plan_by_hand_stands_though_the_policy_was_deciding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    engine = Engine(tiny_model(), engine_config("auto"))
    engine.steer(performance_record(engine, budget_s=2.0))
    steering = engine.offloading.control
    assert steering is not None
    decide = steering.decide

    def decide_and_be_overruled(shape: StepShape) -> Decision | None:
        decision = decide(shape)
        by_hand = threading.Thread(target=engine.set_num_offloaded, args=(2,))
        by_hand.start()
        by_hand.join()
        return decision

    monkeypatch.setattr(steering, "decide", decide_and_be_overruled)
    with engine:
        engine.submit(make_prompts()[0], greedy()).result()
    assert engine.offloading.control.is_manual
    assert engine.target.plan.num_offloaded == 2


def test_an_idle_engine_counts_on_no_more_memory_than_its_objective_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    capacities = []
    for tpot_ms in (1e-3, 1e6):  # nothing may be offloaded, and everything
        config = replace(engine_config("auto"), slo=SloConfig(ttft_ms=1000.0, tpot_ms=tpot_ms))
        engine = Engine(tiny_model(), config)
        engine.steer(performance_record(engine, budget_s=2.0))
        capacities.append(engine.capacity().kv_capacity_tokens)
        engine.close()
    assert capacities[0] < capacities[1]


def share_of(num_units: int, engine: Engine) -> LinkShare:
    most_bytes = num_units * engine.units[0].num_bytes
    return LinkShare(bytes_per_s=1e12, guaranteed_bytes_per_s=1e12, max_offloaded_bytes=most_bytes)


def test_a_share_of_the_bus_bounds_what_is_offloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    engine = Engine(tiny_model(), engine_config("auto"))
    engine.set_link_share(share_of(2, engine))
    engine.steer(performance_record(engine, budget_s=2.0))
    assert not engine.offloading.control.is_manual
    engine.set_objectives(SloConfig(ttft_ms=60_000.0, tpot_ms=60_000.0))
    with engine:
        for prompt in make_prompts():
            engine.submit(prompt, greedy(24)).result()
        assert max(record.num_offloaded for record in engine.steps.records) == 2
        engine.set_link_share(share_of(5, engine))
        engine.submit(make_prompts()[0], greedy(24)).result()
        assert engine.steps.records[-1].num_offloaded > 2


def test_a_request_with_objectives_needs_a_server_that_has_some() -> None:
    engine = Engine(tiny_model(), engine_config(0))
    assert engine.objectives_for(ttft_ms=None, tpot_ms=None) is None
    with pytest.raises(RequestError, match="no latency objectives"):
        engine.objectives_for(ttft_ms=1.0, tpot_ms=None)
    engine.close()
