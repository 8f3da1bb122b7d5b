"""Which plans fit: the fewest units offloaded that a budget allows."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from selectn_core.config import MAX_SLOTS
from selectn_core.device import align_up
from selectn_core.placement import OffloadPlan
from selectn_core.planner import fewest_offloaded, most_bytes, plan_bytes, slot_bytes, unmeasured_plan
from selectn_core.units import Unit


def units_of(sizes) -> list[Unit]:
    return [
        Unit(
            index=i,
            layer=i,
            kind="Layer",
            name=f"layers.{i}",
            module=nn.Module(),
            tensors=(),
            parameters=(),
            num_bytes=size,
        )
        for i, size in enumerate(sizes)
    ]


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=10)


def test_bytes_are_homes_and_slots() -> None:
    units = units_of([1000, 300, 2000])
    plan = OffloadPlan(offloaded=(0, 2), num_slots=1, num_units=3)
    assert slot_bytes(units, plan) == 2000
    assert plan_bytes(units, plan) == align_up(300) + align_up(2000)
    nothing = OffloadPlan(offloaded=(), num_slots=4, num_units=3)
    assert slot_bytes(units, nothing) == 0
    assert plan_bytes(units, nothing) == align_up(1000) + align_up(300) + align_up(2000)


def test_a_slot_is_as_large_as_the_largest_unit_that_the_plan_offloads() -> None:
    units = units_of([1000, 3000, 1000, 3000])
    small = OffloadPlan(offloaded=(0, 2), num_slots=1, num_units=4)
    assert plan_bytes(units, small) == 2 * align_up(3000) + align_up(1000)
    mixed = OffloadPlan(offloaded=(0, 2, 3), num_slots=2, num_units=4)
    assert plan_bytes(units, mixed) == align_up(3000) + 2 * align_up(3000)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=7))
def test_no_plan_takes_more_than_the_most_expensive_one(sizes) -> None:
    units = units_of(sizes)
    plans = [
        OffloadPlan(offloaded=offloaded, num_slots=num_slots, num_units=len(sizes))
        for num_offloaded in range(len(sizes) + 1)
        for offloaded in combinations(range(len(sizes)), num_offloaded)
        for num_slots in (1, 3, MAX_SLOTS)
    ]
    assert max(plan_bytes(units, plan) for plan in plans) == most_bytes(units)


@given(SIZES, st.integers(1, 4), st.integers(0, 60_000))
def test_the_fewest_that_fit(sizes, num_slots, budget) -> None:
    units = units_of(sizes)
    plan = fewest_offloaded(units, num_slots, budget)
    counts = range(len(units) + 1)
    fitting = [k for k in counts if plan_bytes(units, unmeasured_plan(units, k, num_slots)) <= budget]
    assert (plan.num_offloaded if plan else None) == (min(fitting) if fitting else None)
    if plan is not None:
        assert plan_bytes(units, plan) <= budget
