"""Units of unequal size: what planner and controller free against the best of all subsets; every bound is in bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from statistics import median

import pytest

from selectn_core.control.controller import Controller
from selectn_core.control.load import Decoding, Load
from selectn_core.control.policies import MOST_SLOTS, Frontier, Paper, SelectN, Situation
from selectn_core.latency.placement import OffloadPlan, freed_bytes
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.latency.step_times import MeasuredStep, StepTimes
from selectn_core.latency.steps import StepShape
from selectn_core.memory.memory_model import MemoryModel, kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.candidates import Objective, UnitSet
from selectn_core.planning.search import search
from selectn_core.planning.unit_sets import size_sets, unequal_few

NUM_MODELS = 150
KINDS = ("dense, then experts", "dense and experts, mixed", "attention and MLP", "three sizes", "no two alike")


def random_sizes(rng: random.Random, kind: str) -> list[int]:
    num_units = rng.randint(3, 11)
    small, large = rng.randint(200, 3000), rng.randint(1000, 9000)
    if kind == "dense, then experts":
        num_dense = rng.randint(1, num_units - 1)
        return [small] * num_dense + [large] * (num_units - num_dense)
    if kind == "attention and MLP":
        return [(small, large)[i % 2] for i in range(num_units)]
    three = [small, large, rng.randint(200, 5000)]
    choices = {"dense and experts, mixed": three[:2], "three sizes": three, "no two alike": range(100, 5000)}[kind]
    return [rng.choice(choices) for _ in range(num_units)]


def random_situation(rng: random.Random) -> Situation:
    """Compute in proportion to bytes, or with nothing to do with them; slow links and fast, tight limits and loose."""
    sizes = random_sizes(rng, rng.choice(KINDS))
    seconds = {size: rng.uniform(0.3, 5) for size in sizes}
    is_bound_by_memory = rng.random() < 0.5
    compute_s = tuple(size / 1000 if is_bound_by_memory else seconds[size] for size in sizes)
    costs = StepCosts(compute_s=compute_s, unit_bytes=tuple(sizes), rest_s=rng.choice([0, 0.05, 0.3]) * sum(compute_s))
    copy_over_compute = rng.choice([0.5, 1.0, 2.0, 3.5, 8.0])
    return Situation(
        costs=costs,
        link=Link(bytes_per_s=sum(sizes) / sum(compute_s) / copy_over_compute),
        limit_s=rng.choice([1.05, 1.1, 1.3, 1.75, 2.5]) * costs.unloaded_s,
    )


def most_freed_bytes(asked: Situation) -> int:
    """Of every subset of the units through every number of slots, by the recurrence."""
    sizes = asked.costs.unit_bytes
    plans = [
        OffloadPlan(offloaded=offloaded, num_slots=num_slots, num_units=len(sizes))
        for k in range(2, len(sizes) + 1)
        for offloaded in combinations(range(len(sizes)), k)
        for num_slots in range(1, min(MOST_SLOTS, k - 1) + 1)
    ]
    for plan in sorted(plans, key=lambda plan: freed_bytes(plan, sizes), reverse=True):
        copies_s = sum(asked.link.seconds(sizes[unit]) for unit in plan.offloaded)
        if copies_s <= asked.most_s and predict_step_s(asked.costs, plan.offloaded, plan.num_slots, asked.link) <= (
            asked.most_s
        ):
            return max(0, freed_bytes(plan, sizes))
    return 0


def by_the_controllers_policy(asked: Situation) -> OffloadPlan:
    return SelectN(Frontier(asked.costs.unit_bytes)).choose(asked)


def by_the_planner(asked: Situation) -> OffloadPlan:
    objective = Objective(name="TPOT", limit_s=asked.limit_s, steps=(asked.costs,))
    memory = MemoryModel(resident_bytes=0, kv=kv_of_tokens(1, page_size=4), workspace=Workspace())
    return search([UnitSet(name="units", objectives=(objective,), memory=memory)], asked.link).plan


@pytest.mark.parametrize("choose", [by_the_controllers_policy, by_the_planner])
def test_nearly_as_much_is_freed_as_by_the_best_of_all_subsets(choose: Callable[[Situation], OffloadPlan]) -> None:
    rng = random.Random(11)
    shares = []
    for _ in range(NUM_MODELS):
        asked = random_situation(rng)
        most = most_freed_bytes(asked)
        plan = choose(asked)
        assert predict_step_s(asked.costs, plan.offloaded, plan.num_slots, asked.link) <= asked.most_s
        if most:
            shares.append(max(0, freed_bytes(plan, asked.costs.unit_bytes)) / most)
    assert len(shares) > NUM_MODELS / 2
    assert median(shares) >= 0.95
    assert min(shares) > 0


@pytest.mark.parametrize("policy", [SelectN, Paper])
def test_what_may_be_offloaded_and_what_must_be_freed_is_kept_to_in_bytes(policy: type) -> None:
    rng = random.Random(5)
    for _ in range(NUM_MODELS):
        asked = random_situation(rng)
        sizes = asked.costs.unit_bytes
        most_bytes = rng.uniform(0, 1.1) * sum(sizes)
        asked = Situation(
            costs=asked.costs, link=asked.link, limit_s=10 * asked.limit_s, max_offloaded_bytes=most_bytes
        )
        plan = policy(Frontier(sizes)).choose(asked)
        assert sum(sizes[unit] for unit in plan.offloaded) <= most_bytes
        # One that frees what memory lacks comes before the limit, and copies no more for it than it must.
        lacks = rng.randint(0, freed_bytes(plan, sizes)) if plan.offloaded else 0
        urged = Situation(costs=asked.costs, link=asked.link, limit_s=0.0, min_freed_bytes=lacks)
        least = policy(Frontier(sizes)).choose(urged)
        assert freed_bytes(least, sizes) >= lacks
        assert sum(sizes[unit] for unit in least.offloaded) <= max(most_bytes, lacks)


def test_a_controller_keeps_to_the_bytes_that_it_may_offload_when_they_become_fewer() -> None:
    """Though its steps would be short enough as they are, and the units nearest to hand are larger ones."""
    sizes, shape = (10_000_000, 30_000_000) * 8, StepShape.decode(4, 100)
    measured = MeasuredStep(shape=shape, kind_s=(2e-3, 6e-3), rest_s=5e-3, low_s=0.069, high_s=0.069, num_samples=1)
    times = StepTimes([measured], [0, 1] * 8, sizes)
    controller = Controller(times, Link(bytes_per_s=4e9), SelectN(Frontier(sizes)), max_tokens=64)
    decoding = [Decoding(num_tokens=9, first_token_s=0.0, num_left=99, tpot_s=1.0)] * 4
    load = Load(now_s=0.0, decoding=decoding, waiting=[], mean_kv_tokens=100)
    plan = OffloadPlan(offloaded=(), num_slots=1, num_units=16)
    for most_bytes in (None, 250e6, 130e6, 45e6, 0):
        controller.max_offloaded_bytes = most_bytes
        for _ in range(8):
            controller.admit(load, plan)
            plan = controller.decide(shape, plan).plan
            assert sum(sizes[unit] for unit in plan.offloaded) <= (sum(sizes) if most_bytes is None else most_bytes)
        assert bool(plan.offloaded) == (most_bytes != 0)


def test_sets_are_by_size_and_few_however_many_sizes_there_are() -> None:
    assert size_sets([7, 7, 7]) == [(0, 1, 2)]
    assert size_sets([1, 9, 1, 9]) == [(0, 1, 2, 3), (0, 2), (1, 3)]
    many = size_sets(range(1, 200))
    assert len(many) == len(set(many)) <= 3 * 6 + 1
    assert {unit for among in many[1:] for unit in among} == set(range(199))


def test_few_units_that_are_alike_are_tried_once() -> None:
    alike = StepCosts(compute_s=(1.0,) * 20, unit_bytes=(5,) * 20)
    assert unequal_few(alike) == []
    blocks = StepCosts(compute_s=(1.0, 2.0) * 80, unit_bytes=(10, 30) * 80, rest_s=9.0)
    assert 300 < len(unequal_few(blocks)) < 330  # two kinds to begin with, and every distance
    none_alike = StepCosts(compute_s=tuple(1.0 + i / 7 for i in range(160)), unit_bytes=tuple(range(1, 161)))
    assert len(unequal_few(none_alike)) <= 2048
