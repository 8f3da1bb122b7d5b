"""The recurrence: bounded, monotone, equal to a simulation of events, and to the figures it was designed with."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.latency.placement import best_placement, place_evenly, place_integer_interval
from selectn_core.latency.recurrence import Link, StepCosts, bound_s, predict_step_s, simulate_steps_s

SECONDS = st.integers(1, 40).map(lambda value: value / 8)
BYTES = st.integers(1, 60)


@st.composite
def cases(draw):
    """Unequal units, any subset offloaded, one to four slots."""
    num_units = draw(st.integers(1, 9))
    costs = StepCosts(
        compute_s=tuple(draw(SECONDS) for _ in range(num_units)),
        unit_bytes=tuple(draw(BYTES) for _ in range(num_units)),
        rest_s=draw(st.integers(0, 40)) / 8,
    )
    offloaded = tuple(sorted(draw(st.sets(st.integers(0, num_units - 1)))))
    return costs, offloaded, draw(st.integers(1, 4)), Link(bytes_per_s=draw(st.sampled_from([1.0, 4.0, 16.0])))


# What it is, in which step, and of which unit.
Task = tuple[str] | tuple[str, int] | tuple[str, int, int]


def simulate_events(costs, offloaded, num_slots, link, num_steps, promoted=(), in_slots=()) -> list[float]:
    """The same machine, told as events: a link, slots and a processor, each taking up work when it may.

    Written from the executor's point of view, with nothing shared with the recurrence: every copy and every
    compute is a task with predecessors, and a task ends its duration after the last of them.
    """
    num_slots = min(num_slots, len(offloaded))
    ends: dict[Task, float] = {}

    def run(name, duration, *predecessors) -> None:
        ends[name] = max((ends[p] for p in predecessors), default=0.0) + duration

    copies = len(offloaded) > num_slots
    sequence = [(step, unit) for step in range(num_steps + 2) for unit in offloaded]  # offloaded uses, in order
    last_copy: list[Task] = []

    def copy(name, unit, *predecessors) -> None:
        run(name, link.seconds(costs.unit_bytes[unit]), *predecessors, *last_copy)
        last_copy[:] = [name]

    initial = [("use", 0, unit) for unit in offloaded[:num_slots] if unit not in in_slots]
    initial += [("home", 0, unit) for unit in promoted]
    for name in sorted(initial, key=lambda name: name[2]):
        copy(name, name[2])
    for unit in offloaded[:num_slots]:
        if unit in in_slots:
            run(("use", 0, unit), 0.0)
    position = {use: i for i, use in enumerate(sequence)}
    previous: Task = ("start",)
    ends[previous] = 0.0
    durations, started = list[float](), 0.0
    for step in range(num_steps):
        for unit, compute_s in enumerate(costs.compute_s):
            needs = [previous]
            if unit in offloaded and (copies or step == 0):
                needs.append(("use", step, unit))
            if step == 0 and unit in promoted:
                needs.append(("home", 0, unit))
            run(("compute", step, unit), compute_s, *needs)
            previous = ("compute", step, unit)
            if unit in offloaded and copies:
                following = sequence[position[step, unit] + num_slots]
                copy(("use", *following), following[1], previous)
        run(("rest", step), costs.rest_s, previous)
        previous = ("rest", step)
        durations.append(ends[previous] - started)
        started = ends[previous]
    return durations


@given(cases(), st.data())
def test_equals_a_simulation_of_events(case, data) -> None:
    costs, offloaded, num_slots, link = case
    others = sorted(set(range(len(costs.compute_s))) - set(offloaded))
    promoted = sorted(data.draw(st.sets(st.sampled_from(others)))) if others else []
    first = offloaded[:num_slots]
    in_slots = sorted(data.draw(st.sets(st.sampled_from(first)))) if first else []
    arguments = {"promoted": promoted, "in_slots": in_slots}
    durations = simulate_steps_s(costs, offloaded, num_slots, link, 5, **arguments)
    assert durations == pytest.approx(simulate_events(costs, offloaded, num_slots, link, 5, **arguments))


@given(cases())
def test_never_beats_the_bound(case) -> None:
    assert predict_step_s(*case) >= bound_s(*case) - 1e-9


@given(cases())
def test_the_prediction_is_what_long_runs_average_to(case) -> None:
    costs, offloaded, num_slots, link = case
    durations = simulate_steps_s(costs, offloaded, num_slots, link, 400)
    tail = durations[40:]  # 360 steps: a multiple of every period that 1 to 4 slots can have
    assert predict_step_s(*case) == pytest.approx(sum(tail) / len(tail), rel=1e-3)


@given(cases(), st.integers(0, 8), SECONDS)
def test_more_compute_or_less_bandwidth_is_never_faster(case, unit, more_s) -> None:
    costs, offloaded, num_slots, link = case
    now_s = predict_step_s(*case)
    compute_s = list(costs.compute_s)
    compute_s[unit % len(compute_s)] += more_s
    slower = StepCosts(compute_s=tuple(compute_s), unit_bytes=costs.unit_bytes, rest_s=costs.rest_s)
    assert predict_step_s(slower, offloaded, num_slots, link) >= now_s - 1e-9
    assert predict_step_s(costs, offloaded, num_slots, Link(bytes_per_s=link.bytes_per_s / 2)) >= now_s - 1e-9


@given(cases())
def test_units_that_all_have_a_slot_cost_nothing(case) -> None:
    costs, offloaded, _, link = case
    assert predict_step_s(costs, offloaded, max(1, len(offloaded)), link) == pytest.approx(costs.unloaded_s)


@given(st.integers(1, 8), st.integers(2, 6), SECONDS, st.integers(1, 100).map(lambda value: value / 8))
def test_one_slot_costs_what_the_paper_says(interval, num_groups, compute_s, copy_s) -> None:
    """max((N-1)c, t) + c per group of N layers, where N divides L and nothing else is in the step."""
    num_units = interval * num_groups
    costs = StepCosts(compute_s=(compute_s,) * num_units, unit_bytes=(1,) * num_units)
    offloaded = place_integer_interval(interval, num_units)
    predicted_s = predict_step_s(costs, offloaded, 1, Link(bytes_per_s=1 / copy_s))
    assert predicted_s == pytest.approx(num_groups * (max((interval - 1) * compute_s, copy_s) + compute_s))


@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 120).map(lambda value: value / 8))
def test_two_slots_reach_the_bound_where_nothing_but_layers_computes(interval, num_offloaded, copy_s) -> None:
    """Equal layers, equally spaced: k divides L."""
    num_units = interval * num_offloaded
    costs = StepCosts(compute_s=(1.0,) * num_units, unit_bytes=(1,) * num_units)
    offloaded = place_evenly(num_offloaded, costs)
    link = Link(bytes_per_s=1 / copy_s)
    assert predict_step_s(costs, offloaded, 2, link) == pytest.approx(bound_s(costs, offloaded, 2, link))


@given(st.integers(2, 40), st.data(), st.integers(1, 120).map(lambda value: value / 8))
def test_two_slots_lose_little_to_gaps_that_differ_by_a_layer(num_units, data, copy_s) -> None:
    """Where k does not divide L: a sixth at worst, by enumeration of L up to 40."""
    num_offloaded = data.draw(st.integers(1, num_units))
    costs = StepCosts(compute_s=(1.0,) * num_units, unit_bytes=(1,) * num_units)
    offloaded = place_evenly(num_offloaded, costs)
    link = Link(bytes_per_s=1 / copy_s)
    assert predict_step_s(costs, offloaded, 2, link) <= 1.17 * bound_s(costs, offloaded, 2, link)


@pytest.mark.parametrize(
    ("ratio", "paper", "one_slot", "best"),
    [(1, 15, 16, 30), (2, 9, 10, 15), (3.5, 5, 6, 8), (8, 2, 2, 2), (13.8, 1, 1, 1)],
)
def test_layers_freed_at_a_tenth_more_time(ratio, paper, one_slot, best) -> None:
    """Net layers freed (k - S) with a step at most 1.1 x unloaded, L = 32: the table the design rests on."""
    num_units = 32
    costs = StepCosts(compute_s=(1.0,) * num_units, unit_bytes=(1,) * num_units)
    link = Link(bytes_per_s=1 / ratio)

    def freed(offloaded, num_slots) -> int:
        fast_enough = predict_step_s(costs, offloaded, num_slots, link) <= 1.1 * costs.unloaded_s + 1e-9
        return len(offloaded) - num_slots if fast_enough else 0

    counts = range(1, num_units + 1)
    assert max(freed(place_integer_interval(n, num_units), 1) for n in counts) == paper
    assert max(freed(best_placement(k, 1, costs, link).offloaded, 1) for k in counts) == one_slot
    assert max(freed(best_placement(k, s, costs, link).offloaded, s) for k in counts for s in range(1, 5)) == best


def test_a_slot_is_needed() -> None:
    costs = StepCosts(compute_s=(1.0,), unit_bytes=(1,))
    with pytest.raises(ValueError, match="at least one slot"):
        simulate_steps_s(costs, (0,), 0, Link(bytes_per_s=1.0), 1)


def test_compute_and_bytes_describe_the_same_units() -> None:
    with pytest.raises(ValueError, match="2 compute times for 1 units"):
        StepCosts(compute_s=(1.0, 1.0), unit_bytes=(1,))


def test_a_copy_has_a_fixed_cost_too() -> None:
    assert math.isclose(Link(bytes_per_s=2.0, copy_s=0.5).seconds(3), 2.0)
