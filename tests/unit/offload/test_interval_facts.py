"""Decisions about the interval, as they are logged: of a real engine, and what is made of the numbers later."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from selectn_core.config import SloConfig
from selectn_core.decision_log import LoggedDecision
from selectn_core.engine.engine import Engine
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import StepShape
from selectn_core.offload.control import Decision, LimitedBy, LinkShare, PlanLimits
from selectn_core.offload.interval_facts import INTERVAL_VERDICTS, IntervalFacts
from selectn_core.offload.offloading import LOG_EVERY_STEPS
from selectn_core.profiling.record_cache import performance_record
from tests.support.engines import CheckedEngine, engine_config, greedy, make_prompts
from tests.support.tiny_models import NUM_LAYERS, tiny_model

SIZES = (10, 20, 30, 40)


def plan_of(*offloaded: int, slots: int = 1) -> OffloadPlan:
    return OffloadPlan(offloaded=offloaded, num_slots=slots, num_units=len(SIZES))


def limits_of(**changed: Any) -> PlanLimits:
    values = {
        "adapts": True,
        "is_busy": False,
        "unit_bytes": SIZES,
        "held_freed_bytes": 0,
        "max_offloaded_bytes": None,
        "link_bytes_per_s": 1e9,
        "share_bytes_per_s": math.inf,
        **changed,
    }
    return PlanLimits(**values)


@pytest.mark.parametrize(
    ("plan", "changed", "reason"),
    [
        (plan_of(0, 1, 2, 3), {}, "everything"),
        (plan_of(1), {"adapts": False}, "policy"),
        (plan_of(1, 3), {"held_freed_bytes": 15}, "memory"),
        (plan_of(1), {"max_offloaded_bytes": 29}, "bus_share"),
        (plan_of(1), {"max_offloaded_bytes": 30, "is_busy": True}, "queue"),
        (plan_of(), {}, "objective"),
    ],
)
def test_why_no_more_is_offloaded(plan: OffloadPlan, changed: dict[str, Any], reason: LimitedBy) -> None:
    limits = limits_of(**changed)
    assert limits.limited_by(plan) == reason
    assert IntervalFacts(plan_of(), plan, plan, None, None, limits).reason == reason
    assert reason in get_args(LimitedBy)


def test_what_was_decided_in_a_word() -> None:
    pairs = [
        (plan_of(1), plan_of(1, 2)),
        (plan_of(1, 2), plan_of(1)),
        (plan_of(1), plan_of(2)),
        (plan_of(1), plan_of(1)),
    ]
    assert tuple(IntervalFacts(*pair, pair[1], None, None, None).verdict for pair in pairs) == INTERVAL_VERDICTS


def test_more_than_was_asked_for_is_for_memory_whoever_asked() -> None:
    assert IntervalFacts(plan_of(1), plan_of(1, 2), plan_of(1), None, None, None).reason == "memory"
    assert IntervalFacts(plan_of(1), plan_of(2), plan_of(2), None, None, None).reason == "by_hand"


def test_its_numbers_are_those_of_the_step_and_of_the_limits() -> None:
    decision = Decision(plan=plan_of(1, 2), urgent=False, predicted_s=0.1, limit_s=0.2, held_s=0.3)
    shape = StepShape.of([(5, 0)], [7, 8])
    inputs = IntervalFacts(plan_of(1), plan_of(1, 2), plan_of(1, 2), decision, shape, limits_of()).inputs
    assert (inputs["k_before"], inputs["k_after"], inputs["num_units"]) == (1, 2, 4)
    assert (inputs["step_tokens"], inputs["step_decodes"], inputs["step_kv_tokens"]) == (7, 2, 20)
    assert (inputs["predicted_s"], inputs["limit_s"], inputs["held_s"]) == (0.1, 0.2, 0.3)
    assert (inputs["offloaded_bytes"], inputs["freed_bytes"], inputs["next_unit_bytes"]) == (50, 20, 10)


def logged(engine: Engine) -> list[LoggedDecision]:
    return engine.offloading.decisions.latest("r")[::-1]


def test_a_plan_by_hand_is_logged_once_and_one_of_many_steps_that_change_nothing() -> None:
    with CheckedEngine(tiny_model(), engine_config(0)) as engine:
        engine.submit(make_prompts([4])[0], greedy(20)).result()
        engine.set_num_offloaded(3)
        engine.submit(make_prompts([4])[0], greedy(20)).result()
        decisions = logged(engine)
        changes = [(each.verdict, each.reason, each.inputs["k_after"]) for each in decisions]
    assert changes == [("stay", "by_hand", 0), ("offload_more", "by_hand", 3)]
    assert LOG_EVERY_STEPS > 40, "the second sample is not due yet"
    assert decisions[1].inputs["k_before"] == 0


def test_the_sample_of_what_changes_nothing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selectn_core.offload.offloading.LOG_EVERY_STEPS", 10)
    with CheckedEngine(tiny_model(), engine_config(0)) as engine:
        engine.submit(make_prompts([4])[0], greedy(45)).result()
        num_steps, num_logged = engine.steps.num_steps, len(logged(engine))
    assert num_logged == -(-num_steps // 10)


@pytest.mark.usefixtures("record_cache")
def test_the_policys_decisions_say_what_it_knew() -> None:
    """It offloads all that it may; when the coordinator takes the bus away it brings units home, and says why."""
    engine = CheckedEngine(tiny_model(), engine_config("auto"))
    slo = SloConfig(ttft_ms=60_000.0, tpot_ms=60_000.0)
    engine.steer(performance_record(engine, budget_s=1.0))
    assert not logged(engine), "what a profile tries is nobody's decision"
    engine.set_objectives(slo)
    prompts = make_prompts([4, 5])
    with engine:
        engine.submit(prompts[0], greedy(40)).result()
        assert engine.executor.plan.num_offloaded == NUM_LAYERS
        unit_bytes = engine.units[0].num_bytes
        engine.set_link_share(
            LinkShare(bytes_per_s=5e9, guaranteed_bytes_per_s=5e9, max_offloaded_bytes=2.5 * unit_bytes)
        )
        engine.submit(prompts[1], greedy(20)).result()
        decisions = logged(engine)
        history = [k for _, k in engine.steps.k_history]
    last = next(each for each in reversed(decisions) if each.verdict != "stay")
    assert (last.verdict, last.reason) == ("offload_fewer", "bus_share")
    assert (last.inputs["k_before"], last.inputs["k_after"]) == (NUM_LAYERS, 2)
    assert last.inputs["max_offloaded_bytes"] == 2.5 * unit_bytes
    assert last.inputs["predicted_s"] is not None
    assert last.inputs["held_s"] is not None
    assert history[-1] == 2
    assert all(type(value) in (int, float, type(None)) for each in decisions for value in each.inputs.values())
