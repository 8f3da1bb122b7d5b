"""Placement: any k of L, spaced evenly, and the plan's own rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.latency.placement import (
    OffloadPlan,
    best_placement,
    best_slots,
    place_by_index,
    place_evenly,
    place_integer_interval,
)
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s


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


@st.composite
def choices(draw, num_units: int):
    """Some of the units, in any order, and a number of them to offload."""
    among = draw(st.lists(st.integers(0, num_units - 1), min_size=1, unique=True))
    return among, draw(st.integers(0, len(among)))


@given(step_costs(), st.data())
def test_only_units_that_are_allowed_are_offloaded(costs, data) -> None:
    num_units = len(costs.compute_s)
    among, num_offloaded = data.draw(choices(num_units))
    link = Link(bytes_per_s=2.0)
    for units in (
        place_evenly(num_offloaded, costs, among=among),
        place_by_index(num_offloaded, num_units, among=among),
        best_placement(num_offloaded, 1, costs, link, among=among).offloaded,
        best_slots(num_offloaded, 3, costs, link, among=among).offloaded,
    ):
        assert len(units) == num_offloaded
        assert set(units) <= set(among)
        assert list(units) == sorted(set(units))


@given(step_costs(), st.data())
def test_all_units_allowed_is_no_restriction(costs, data) -> None:
    num_units = len(costs.compute_s)
    num_offloaded = data.draw(st.integers(0, num_units))
    everything = range(num_units)
    assert place_evenly(num_offloaded, costs, among=everything) == place_evenly(num_offloaded, costs)
    assert place_by_index(num_offloaded, num_units, among=everything) == place_by_index(num_offloaded, num_units)


@given(step_costs(), st.data())
def test_spacing_is_even_over_the_whole_step_whatever_may_be_chosen(costs, data) -> None:
    """Each instant has the allowed unit nearest to it, unless one unit is the nearest to two."""
    among, num_offloaded = data.draw(choices(len(costs.compute_s)))
    starts_s = {unit: sum(costs.compute_s[:unit]) for unit in among}
    wanted_s = [(i + 1) * costs.unloaded_s / num_offloaded for i in range(num_offloaded)]
    nearest = [min(sorted(among, reverse=True), key=lambda unit: abs(starts_s[unit] - at_s)) for at_s in wanted_s]
    if len(set(nearest)) == num_offloaded:
        assert place_evenly(num_offloaded, costs, among=among) == tuple(nearest)


@given(st.integers(1, 24), st.integers(1, 12), st.data())
def test_one_block_of_each_layer_is_placed_as_the_layers_are(num_layers, num_offloaded, data) -> None:
    """A layer of two blocks, the first of which is free: then a block starts when its layer does."""
    num_offloaded = min(num_offloaded, num_layers)
    layers = StepCosts(compute_s=(2.0,) * num_layers, unit_bytes=(6,) * num_layers, rest_s=data.draw(st.floats(0, 9)))
    blocks = StepCosts(compute_s=(0.0, 2.0) * num_layers, unit_bytes=(2, 4) * num_layers, rest_s=layers.rest_s)
    seconds = range(1, 2 * num_layers, 2)
    placed = place_evenly(num_offloaded, blocks, among=seconds)
    assert tuple(unit // 2 for unit in placed) == place_evenly(num_offloaded, layers)


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


@pytest.mark.parametrize(
    ("among", "message"), [((0, 2), "num_offloaded=3: expected 0 to 2"), ((0, 3), "among=.*: expected units below 3")]
)
def test_units_that_may_be_chosen_must_be_there(among, message) -> None:
    costs = StepCosts(compute_s=(1.0,) * 3, unit_bytes=(1,) * 3)
    with pytest.raises(ValueError, match=message):
        place_evenly(3, costs, among=among)
    with pytest.raises(ValueError, match=message):
        best_slots(3, 1, costs, Link(bytes_per_s=1.0), among=among)
