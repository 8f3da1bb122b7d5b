"""Policies: what each plans for the same step, and that ours is the best of all there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import mul
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.config import OffloadConfig
from selectn_core.control.frontier import _Candidates
from selectn_core.control.policies import (
    MOST_SLOTS,
    Frontier,
    Paper,
    SelectN,
    Situation,
    every_unit_one_ahead,
    last_of_every_group,
    worst_case_share,
)
from selectn_core.errors import ConfigError
from selectn_core.latency.placement import best_placement, freed_bytes, nearest_plan
from selectn_core.latency.prediction_cache import Remembered
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.latency.step_times import scaled
from selectn_core.latency.steps import StepShape
from tests.support.controlled import BATCH, LENGTH, Machine, step_times

ALIKE = StepCosts(compute_s=(1.0,) * 12, unit_bytes=(100,) * 12, rest_s=1.0)

costs_strategy = st.builds(
    lambda compute, rest, size, n: StepCosts(compute_s=(compute,) * n, unit_bytes=(size,) * n, rest_s=rest),
    st.floats(0.1, 10),
    st.floats(0, 30),
    st.integers(10, 1000),
    st.integers(1, 10),
)


def situation(costs: StepCosts, bytes_per_s: float, stretch: float) -> Situation:
    return Situation(costs=costs, link=Link(bytes_per_s=bytes_per_s), limit_s=stretch * costs.unloaded_s)


@settings(max_examples=80, deadline=None)
@given(costs=costs_strategy, bytes_per_s=st.floats(20, 2000), stretch=st.floats(1.0, 3.0))
def test_select_n_frees_as_much_as_the_best_of_all_plans(costs: StepCosts, bytes_per_s: float, stretch: float) -> None:
    asked = situation(costs, bytes_per_s, stretch)
    plan = SelectN(Frontier(costs.unit_bytes)).choose(asked)
    step_s = predict_step_s(costs, plan.offloaded, plan.num_slots, asked.link)
    assert step_s <= asked.limit_s * 1.0001
    freed = [
        k - s
        for k in range(1, len(costs.compute_s) + 1)
        for s in range(1, MOST_SLOTS + 1)
        for placed in [best_placement(k, s, costs, asked.link)]
        if (s < k or s == 1) and predict_step_s(costs, placed.offloaded, s, asked.link) <= asked.limit_s
    ]
    assert plan.num_offloaded - plan.slots_used >= max(freed, default=0)


@settings(max_examples=60, deadline=None)
@given(costs=costs_strategy, bytes_per_s=st.floats(20, 2000), stretch=st.floats(1.0, 3.0))
def test_select_n_has_at_least_as_much_on_the_host_as_the_paper(
    costs: StepCosts, bytes_per_s: float, stretch: float
) -> None:
    asked = situation(costs, bytes_per_s, stretch)
    frontier = Frontier(costs.unit_bytes)
    ours, paper = SelectN(frontier).choose(asked), Paper(frontier).choose(asked)
    assert ours.num_offloaded >= paper.num_offloaded
    assert paper.num_slots == 1


def test_the_paper_takes_the_smallest_integer_interval() -> None:
    asked = situation(ALIKE, 50.0, 1.8)
    plan = Paper(Frontier(ALIKE.unit_bytes)).choose(asked)
    n = round(plan.interval)
    assert plan.offloaded == tuple(range(n - 1, 12, n))
    smaller = last_of_every_group(n - 1, 12)
    assert predict_step_s(ALIKE, smaller.offloaded, 1, asked.link) > asked.limit_s


def test_static_plans_for_a_bus_that_others_use_too() -> None:
    link, limit_s = Link(bytes_per_s=100.0), 1.5 * ALIKE.unloaded_s
    alone, shared = (worst_case_share(ALIKE, link, num_sharing, limit_s) for num_sharing in (1, 2))
    assert 0 < shared.num_offloaded < alone.num_offloaded
    worst = Link(bytes_per_s=50.0)
    assert predict_step_s(ALIKE, shared.offloaded, shared.num_slots, worst) <= limit_s


def test_the_fixed_ones_are_as_their_systems_have_them() -> None:
    assert every_unit_one_ahead(6).num_offloaded == 6
    assert every_unit_one_ahead(6).num_slots == 2
    assert last_of_every_group(3, 7).offloaded == (2, 5)


def test_a_range_is_kept_to() -> None:
    frontier = Frontier(ALIKE.unit_bytes)
    slow = Situation(costs=ALIKE, link=Link(bytes_per_s=1.0), limit_s=1.0, min_freed_bytes=500)
    plan = SelectN(frontier).choose(slow)
    assert (plan.num_offloaded, plan.num_slots) == (6, 1)  # the least that frees so much
    fast = Situation(costs=ALIKE, link=Link(bytes_per_s=1e6), limit_s=1e9, max_offloaded_bytes=400)
    assert SelectN(frontier).choose(fast).num_offloaded == 4


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(10, 100), st.integers(100, 400)),
    bytes_per_s=st.floats(5, 2000),
    stretch=st.floats(0.5, 3.0),
    share=st.floats(0, 1),
)
def test_what_memory_lacks_is_freed_though_units_are_unequal(
    sizes: tuple[int, int], bytes_per_s: float, stretch: float, share: float
) -> None:
    costs = StepCosts(compute_s=(1.0, 2.0) * 6, unit_bytes=sizes * 6, rest_s=1.0)
    sets = [tuple(range(kind, 12, 2)) for kind in (0, 1)]
    lacks = int(share * (sum(costs.unit_bytes) - max(sizes)))
    asked = replace(situation(costs, bytes_per_s, stretch), min_freed_bytes=lacks)
    assert freed_bytes(SelectN(Frontier(costs.unit_bytes, sets)).choose(asked), costs.unit_bytes) >= lacks


def test_units_of_one_kind_compete_with_all() -> None:
    """Small and large in turn, over a slow link: large ones alone free more than a large slot's worth of small ones."""
    costs = StepCosts(compute_s=(1.0, 2.0) * 8, unit_bytes=(100, 300) * 8, rest_s=1.0)
    large = tuple(range(1, 16, 2))
    asked = situation(costs, 40.0, 1.2)
    sizes = costs.unit_bytes
    all_alone = SelectN(Frontier(sizes)).choose(asked)
    competing = SelectN(Frontier(sizes, [large])).choose(asked)
    assert freed_bytes(competing, sizes) >= freed_bytes(all_alone, sizes)


@given(k=st.integers(0, 12), wanted=st.integers(0, 12))
def test_the_nearest_plan_moves_no_more_units_than_it_must(k: int, wanted: int) -> None:
    link = Link(bytes_per_s=100.0)
    current, target = (best_placement(count, 2, ALIKE, link) for count in (k, wanted))
    near = nearest_plan(current, target)
    assert near.num_offloaded == wanted
    assert len(set(current.offloaded) ^ set(near.offloaded)) == abs(k - wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "selectn"}, "offload.policy='selectn' is not allowed: expected one of select-n, paper"),
        ({"policy": "group"}, "offload.interval=None is not allowed"),
        ({"interval": 3}, "offload.interval=3 is not allowed"),
        ({"num_sharing": 0}, "offload.num_sharing=0 is not allowed: expected at least 1"),
    ],
)
def test_a_wrong_policy_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(**values)  # type: ignore[arg-type]


# -- what it costs --------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every plan that is simulated, wherever that is asked for."""
    plans: list[object] = []

    def counted(costs: StepCosts, offloaded: Sequence[int], num_slots: int, link: Link) -> float:
        plans.append((offloaded, num_slots))
        return predict_step_s(costs, offloaded, num_slots, link)

    for module in ("control.frontier", "latency.placement", "latency.prediction_cache"):
        monkeypatch.setattr(f"selectn_core.{module}.predict_step_s", counted)
    return plans


BLOCKS = StepCosts(compute_s=(1.0, 3.0) * 80, unit_bytes=(100, 300) * 80, rest_s=20.0)


@pytest.mark.parametrize("policy", [SelectN, Paper])
def test_what_is_asked_again_is_not_simulated_again(policy: type, simulated: list[object]) -> None:
    """160 blocks: a step that is a little longer or shorter, its limit, its range and the memory that is lacking."""
    frontier = Frontier(BLOCKS.unit_bytes, [range(0, 160, 2), range(1, 160, 2)])
    asked = situation(BLOCKS, 200.0, 1.3)
    policy(frontier).choose(asked)
    assert 0 < len(simulated) == len(set(simulated)) < 120
    simulated.clear()
    for factor in (1.0, 0.7, 1.9):  # of the whole step: nothing is different but the unit of time
        costs = scaled(BLOCKS, factor)
        same = situation(costs, 200.0 / factor, 1.3)
        policy(frontier).choose(same)
        policy(frontier).choose(replace(same, link=replace(same.link, bytes_per_s=1.001 * same.link.bytes_per_s)))
    assert simulated == []
    for stretch in (1.25, 1.1, 1.4, 1.25, 1.1):
        policy(frontier).choose(situation(BLOCKS, 200.0, stretch))
        policy(frontier).choose(replace(situation(BLOCKS, 200.0, stretch), min_freed_bytes=900))
    assert len(simulated) == len(set(simulated)) < 400


def test_a_steady_machine_is_decided_for_without_a_simulation(simulated: list[object]) -> None:
    machine = Machine(step_times(), tpot_s=2 * step_times().expected_s(StepShape.decode(BATCH, LENGTH))).run(40)
    assert simulated
    simulated.clear()
    machine.run(40)
    assert simulated == []


def test_what_is_remembered_is_bounded() -> None:
    frontier, rng = Frontier(BLOCKS.unit_bytes[:12]), Random(0)
    for _ in range(400):
        compute_s = (rng.uniform(0.1, 9), rng.uniform(0.1, 9)) * 6
        costs = StepCosts(compute_s=compute_s, unit_bytes=BLOCKS.unit_bytes[:12], rest_s=rng.uniform(0, 30))
        SelectN(frontier).choose(situation(costs, rng.uniform(10, 900), 1.5))
    assert len(frontier.layouts) <= 16
    assert all(isinstance(each, _Candidates) and len(each.known) <= 32 for each in frontier.layouts)
    remembered = Remembered(3)
    assert [remembered.get(key, partial(mul, 10, key)) for key in (1, 2, 3, 1, 4)] == [10, 20, 30, 10, 40]
    assert remembered.get(1, lambda: 0) == 10  # asked for again before the fourth came: the second went
    assert remembered.get(2, lambda: 0) == 0
