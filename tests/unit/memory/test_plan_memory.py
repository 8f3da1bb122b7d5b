"""Which plans fit: the fewest units offloaded that a budget allows."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from selectn_core.config import MAX_SLOTS
from selectn_core.device import align_up
from selectn_core.latency.placement import OffloadPlan, best_placement
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.memory.plan_memory import (
    UnmeasuredPlans,
    fewest_offloaded,
    most_bytes,
    plan_bytes,
    slot_bytes,
    unmeasured_plan,
)
from selectn_core.weights.units import Unit, find_units


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


def smollm2_units(granularity: str) -> list[Unit]:
    """SmolLM2-135M's units; its shape without its weights."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return find_units(AutoModelForCausalLM.from_config(config), granularity)


def most_freed_bytes(units: list[Unit], copy_over_compute: float, objective: float) -> int:
    """Device bytes that the best plan frees within `objective` times the unloaded step, by the recurrence alone.

    Units compute in proportion to their bytes, and a fifth of the step is spent outside them: decoding is bound by
    memory.
    """
    sizes = tuple(unit.num_bytes for unit in units)
    compute_s = tuple(size / 1e9 for size in sizes)
    costs = StepCosts(compute_s=compute_s, unit_bytes=sizes, rest_s=sum(compute_s) / 4)
    link = Link(bytes_per_s=1e9 / copy_over_compute)
    kinds = [None, *({unit.kind for unit in units} if len({unit.kind for unit in units}) > 1 else ())]
    most = 0
    for kind in kinds:
        among = [unit.index for unit in units if kind in (None, unit.kind)]
        for num_offloaded in range(1, len(among) + 1):
            for num_slots in (1, 2, 3):
                plan = best_placement(num_offloaded, num_slots, costs, link, among=among)
                step_s = predict_step_s(costs, plan.offloaded, num_slots, link)
                if step_s <= objective * costs.unloaded_s:
                    most = max(most, sum(map(align_up, sizes)) - plan_bytes(units, plan))
    return most


@pytest.mark.parametrize(("copy_over_compute", "times_as_much"), [(3.5, 1.0), (8.0, 1.3), (13.8, 2.0)])
def test_blocks_free_more_than_layers_in_the_same_time_where_the_link_is_slow(copy_over_compute, times_as_much) -> None:
    by_layer = most_freed_bytes(smollm2_units("layer"), copy_over_compute, 1.1)
    by_block = most_freed_bytes(smollm2_units("block"), copy_over_compute, 1.1)
    assert by_block > times_as_much * by_layer > 0


@given(SIZES, st.integers(1, 4), st.integers(0, 60_000))
def test_the_fewest_that_fit(sizes, num_slots, budget) -> None:
    units = units_of(sizes)
    plan = fewest_offloaded(units, num_slots, budget)
    counts = range(len(units) + 1)
    fitting = [k for k in counts if plan_bytes(units, unmeasured_plan(units, k, num_slots)) <= budget]
    assert (plan.num_offloaded if plan else None) == (min(fitting) if fitting else None)
    if plan is not None:
        assert plan_bytes(units, plan) <= budget


@given(SIZES, st.integers(1, 4), st.integers(0, 60_000))
def test_the_most_that_a_number_of_bytes_allows(sizes, num_slots, most_bytes) -> None:
    plans = [unmeasured_plan(units_of(sizes), k, num_slots) for k in range(len(sizes) + 1)]
    allowed = [plan for plan in plans if sum(sizes[unit] for unit in plan.offloaded) <= most_bytes]
    assert UnmeasuredPlans(units_of(sizes)).most_within(num_slots, most_bytes) == allowed[-1]


@given(SIZES, st.integers(0, 10), st.integers(1, 4))
def test_bytes_that_are_remembered_are_those_of_the_plan(sizes, num_offloaded, num_slots) -> None:
    units, plans = units_of(sizes), UnmeasuredPlans(units_of(sizes))
    plan = plans.plan(min(num_offloaded, len(sizes)), num_slots)
    assert plan == unmeasured_plan(units, min(num_offloaded, len(sizes)), num_slots)
    assert plans.bytes_for(plan) == plan_bytes(units, plan)


def test_what_fits_is_asked_at_every_step_and_simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget, for 160 blocks: each number of them and of slots at most once, in two placements."""
    simulated = []

    def counted(costs, offloaded, num_slots, link) -> float:
        simulated.append((len(offloaded), num_slots))
        return predict_step_s(costs, offloaded, num_slots, link)

    monkeypatch.setattr("selectn_core.latency.placement.predict_step_s", counted)
    units = units_of([1000, 3000] * 80)
    plans = UnmeasuredPlans(units)
    for budget in range(0, 330_000, 10_000):
        plans.fewest(4, budget)
    num_simulated = len(simulated)
    assert max(simulated.count(each) for each in simulated) <= 2
    for budget in range(500, 330_000, 1000):
        plans.fewest(4, budget, at_least=3)
        plans.most_within(4, budget)
        plans.plan(160, 4)
    assert len(simulated) == num_simulated
