"""What an engine needs and wants of its host bus: counted in its largest unit, and up to an equal share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selectn_core.config import SloConfig
from selectn_core.engine.engine import Engine
from selectn_core.engine.link_needs import UnitDemand
from selectn_core.profiling.record_cache import performance_record
from tests.support.engines import engine_config
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny_model("llama"), engine_config(num_offloaded=3, kv_gib=0.25)) as engine:
        engine.set_objectives(SloConfig(ttft_ms=1000, tpot_ms=100))
        yield engine


def test_a_plan_by_hand_is_what_it_wants(engine):
    largest = max(unit.num_bytes for unit in engine.units)
    assert engine.link_demand() == UnitDemand(k_min=3, k_max=3, unit_bytes=largest, step_s=0.1)
    assert engine.link_demand(needed=4).k_max == 4, "memory leaves no choice"


def test_unequal_units_are_asked_for_in_bytes():
    """Dense layers and those with experts: no more of the bus than their bytes take, in whole units of the largest."""
    with Engine(tiny_model("qwen2_moe"), engine_config(0)) as engine:
        sizes = [unit.num_bytes for unit in engine.units]
        largest = max(sizes)
        assert min(sizes) < largest
        for k in range(len(sizes) + 1):
            engine.set_num_offloaded(k)
            wanted = sum(sizes[unit] for unit in engine.target.plan.offloaded)
            demand = engine.link_demand()
            assert wanted <= demand.k_max * demand.unit_bytes < wanted + largest
            engine.set_link_range(1.0, 1.0, demand.k_max)
            share = engine.offloading.link_share
            assert share is not None
            assert share.max_offloaded_bytes is not None
            assert wanted <= share.max_offloaded_bytes < wanted + largest
            if k:
                assert engine.reachable_kv_tokens(demand.k_max) >= engine.reachable_kv_tokens()


def test_what_its_requests_need_is_asked_for_up_to_an_equal_share(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    engine = Engine(tiny_model("llama"), engine_config("auto"))
    engine.steer(performance_record(engine, budget_s=2.0))
    with engine:
        engine.set_objectives(SloConfig(ttft_ms=1e6, tpot_ms=1e6))
        k_mins = [engine.link_demand(needed=1, wanted=wanted).k_min for wanted in (0, 3, 99)]
        assert k_mins == [1, 3, len(engine.units)]
        one_unit_s = max(unit.num_bytes for unit in engine.units) / engine.link_needs.equal_share_bytes_per_s
        engine.set_objectives(SloConfig(ttft_ms=1e6, tpot_ms=2.5 * one_unit_s * 1e3))
        assert engine.link_demand(needed=1, wanted=3).k_min == 2, "more than that others need not give up"
        assert engine.link_demand(needed=3).k_min == 3, "memory leaves no choice"


def test_without_objectives_a_replica_wants_an_equal_share():
    with Engine(tiny_model("llama"), engine_config(num_offloaded=2)) as engine:
        demand = engine.link_demand()
    link_bytes_per_s = 50e9
    assert demand.k_max * demand.unit_bytes / demand.step_s == pytest.approx(link_bytes_per_s)
