"""Placement: any k of L, spaced evenly, and the plan's own rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.latency import Link, StepCosts, predict_step_s
from selectn_core.placement import (
    OffloadPlan,
    best_placement,
    best_slots,
    place_by_index,
    place_evenly,
    place_integer_interval,
)


@st.composite
def step_costs(draw):
    num_units = draw(st.integers(1, 24))
    compute_s = tuple(draw(st.integers(1, 20)) / 4 for _ in range(num_units))
    return StepCosts(
        compute_s=compute_s,
        unit_bytes=tuple(draw(st.integers(1, 9)) for _ in range(num_units)),
        rest_s=draw(st.integers(0, 40)) / 4,
    )


@given(step_costs(), st.data())
def test_k_units_are_distinct_ascending_and_in_range(costs, data) -> None:
    num_units = len(costs.compute_s)
    num_offloaded = data.draw(st.integers(1, num_units))
    for units in (place_evenly(num_offloaded, costs), place_by_index(num_offloaded, num_units)):
        assert len(units) == num_offloaded
        assert list(units) == sorted(set(units))
        assert units[0] >= 0
        assert units[-1] < num_units


@given(st.integers(1, 48), st.data())
def test_gaps_by_index_differ_by_one_at_most(num_units, data) -> None:
    num_offloaded = data.draw(st.integers(1, num_units))
    units = place_by_index(num_offloaded, num_units)
    gaps = [b - a for a, b in zip((-1, *units), units, strict=False)]
    assert set(gaps) <= {num_units // num_offloaded, num_units // num_offloaded + 1}


def test_the_integer_interval_is_the_papers() -> None:
    assert place_integer_interval(4, 14) == (3, 7, 11)
    assert place_integer_interval(1, 3) == (0, 1, 2)
    assert all(len(place_integer_interval(n, 32)) == 32 // n for n in range(1, 33))


@given(step_costs(), st.data())
def test_best_slots_is_the_exhaustive_choice(costs, data) -> None:
    num_offloaded = data.draw(st.integers(0, len(costs.compute_s)))
    link = Link(bytes_per_s=data.draw(st.sampled_from([0.5, 2.0, 8.0])))
    best = best_slots(num_offloaded, 4, costs, link)
    candidates = range(1, max(1, min(4, num_offloaded - 1)) + 1)
    times = [
        predict_step_s(costs, best_placement(num_offloaded, slots, costs, link).offloaded, slots, link)
        for slots in candidates
    ]
    assert predict_step_s(costs, best.offloaded, best.num_slots, link) == pytest.approx(min(times))
    fewest = next(s for s, time_s in zip(candidates, times, strict=True) if time_s <= min(times) + 1e-9)
    assert best.num_slots == fewest


def test_a_plan_tells_its_interval() -> None:
    assert OffloadPlan(offloaded=(1, 3), num_slots=4, num_units=5).interval == 2.5
    assert OffloadPlan(offloaded=(), num_slots=1, num_units=5).interval == math.inf
    assert OffloadPlan(offloaded=(1, 3), num_slots=4, num_units=5).slots_used == 2


@pytest.mark.parametrize(
    ("offloaded", "num_slots", "message"),
    [
        ((1, 1), 1, "ascending, distinct"),
        ((2, 1), 1, "ascending, distinct"),
        ((0, 5), 1, "units below 5"),
        ((-1, 2), 1, "units below 5"),
        ((1,), 0, "at least 1"),
    ],
)
def test_plans_that_make_no_sense_are_refused(offloaded, num_slots, message) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadPlan(offloaded=offloaded, num_slots=num_slots, num_units=5)


def test_more_units_than_there_are_cannot_be_offloaded() -> None:
    costs = StepCosts(compute_s=(1.0,), unit_bytes=(1,))
    with pytest.raises(ValueError, match="num_offloaded=2: expected 0 to 1"):
        best_placement(2, 1, costs, Link(bytes_per_s=1.0))
