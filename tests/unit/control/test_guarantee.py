"""Requests are promised no more memory than what stays theirs to their end, whatever the coordinator says next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectn_core.config import SloConfig
from selectn_core.engine.capacity import capacity_tokens
from selectn_core.engine.engine import Engine
from selectn_core.memory.plan_memory import unmeasured_plan
from selectn_core.offload.control import LinkShare
from selectn_core.profiling.record_cache import performance_record
from tests.support.engines import engine_config, greedy
from tests.support.tiny_models import tiny_model

TPOT_S = 60.0  # so long that the objective allows everything: what bounds is the share
SHARES = st.tuples(st.none() | st.floats(0, 12), st.floats(0, 12), st.floats(0, 12))


def steered() -> Engine:
    config = engine_config("auto", kv_tokens=64, max_requests=16)
    engine = Engine(tiny_model(), replace(config, slo=SloConfig(ttft_ms=60_000.0, tpot_ms=TPOT_S * 1e3)))
    engine.steer(performance_record(engine, budget_s=1.0))
    return engine


@pytest.fixture(scope="module")
def idle(record_cache) -> Iterator[Engine]:
    """A steered engine that has not begun to generate."""
    engine = steered()
    yield engine
    engine.close()


def share_of(engine: Engine, units: float | None, guaranteed: float, more: float = 0.0) -> LinkShare:
    """A range of `units`, and a link of which `guaranteed` units can be streamed in a step whatever happens."""
    unit_bytes = max(unit.num_bytes for unit in engine.units)
    return LinkShare(
        bytes_per_s=max(1.0, (guaranteed + more) * unit_bytes / TPOT_S),
        guaranteed_bytes_per_s=max(1.0, guaranteed * unit_bytes / TPOT_S),
        max_offloaded_bytes=None if units is None else units * unit_bytes,
    )


def tokens_with(engine: Engine, num_offloaded: int, num_slots: int) -> int:
    sectors = engine.target.kv_sectors(unmeasured_plan(engine.units, num_offloaded, num_slots))
    return capacity_tokens(engine.batching.geometry, engine.arena.num_sectors, sectors)


@given(SHARES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_more_is_promised_than_range_and_guaranteed_share_hold(idle, values):
    """However much more the link gives while the lease runs; and at once, though no step has been planned."""
    units, guaranteed, more = values
    idle.set_link_share(share_of(idle, units, guaranteed, more))
    slots = idle.offloading.control.guaranteed_plan.num_slots
    most = int(min(guaranteed + 1e-6, len(idle.units) if units is None else units + 1e-6))
    least = idle.target.fewest(slots).num_offloaded
    allowed = max(tokens_with(idle, k, slots) for k in range(max(most, least) + 1) if k <= len(idle.units))
    assert tokens_with(idle, least, slots) <= idle.reachable_kv_tokens() <= allowed
    assert idle.capacity().kv_capacity_tokens == idle.reachable_kv_tokens()
    assert idle.guarantee.plan.num_offloaded <= max(most, least)


def test_what_bounds_is_seen(record_cache):
    """The property above can fail: range and share each make a difference."""
    engine = steered()
    try:
        engine.set_link_share(share_of(engine, None, 12))
        most = engine.reachable_kv_tokens()
        engine.set_link_share(share_of(engine, 0, 12))
        by_range = engine.reachable_kv_tokens()
        engine.set_link_share(share_of(engine, None, 0, more=12))
        by_share = engine.reachable_kv_tokens()
    finally:
        engine.close()
    assert by_range == by_share < most


@given(st.lists(st.integers(1, 60), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_promises_need_offloaded_is_the_fewest_that_hold_them(idle, lengths):
    idle.set_link_share(share_of(idle, None, 12))
    plan, sectors_for = idle.guarantee.plan, idle.batching.geometry.sectors_for_request
    handles = [idle.submit([5], greedy(length)) for length in lengths]
    try:
        needed = idle.guarantee.num_offloaded
    finally:
        for handle in handles:
            handle.cancel()
    together = min(sum(sectors_for(1 + length) for length in lengths), idle.target.kv_sectors(plan))
    holds = [
        idle.target.kv_sectors(unmeasured_plan(idle.units, k, plan.num_slots)) >= together
        for k in range(len(idle.units) + 1)
    ]
    assert needed == holds.index(True)
    assert needed <= max(plan.num_offloaded, idle.target.fewest(plan.num_slots).num_offloaded)


def test_requests_on_promised_memory_are_not_preempted_when_the_lease_runs_out(record_cache):
    with steered() as engine:
        units = len(engine.units)
        engine.set_link_share(share_of(engine, None, units, more=units))
        each = engine.footprint_tokens(3 + 40)
        handles = [engine.submit([5, 6, 7], greedy(40)) for _ in range(engine.reachable_kv_tokens() // each)]
        assert len(handles) > 1
        engine.set_link_share(share_of(engine, units, units))
        assert [len(handle.result()) for handle in handles] == [40] * len(handles)
        assert engine.batching.swap.num_preemptions == 0
