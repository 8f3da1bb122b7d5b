"""The nearest plan of groups, over random plans; and what a server does with it that works as vLLM describes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.latency.placement import OffloadPlan
from selectn_core.planning.groups import Group, nearest_group


def anything(group: Group) -> bool:
    return True


def nothing(group: Group) -> bool:
    return False


@st.composite
def plans(draw: st.DrawFn) -> OffloadPlan:
    num_units = draw(st.integers(4, 64))
    chosen = draw(st.sets(st.integers(0, num_units - 1), min_size=2))
    return OffloadPlan(offloaded=tuple(sorted(chosen)), num_slots=draw(st.integers(1, 4)), num_units=num_units)


def frees_at_least(plan: OffloadPlan, share: float) -> Callable[[Group], bool]:
    """Memory that a plan fits which frees that share of what this one does, in layers, or more."""
    wanted = share * (plan.num_offloaded - plan.slots_used)
    return lambda group: len(group.offloaded(plan.num_units)) - group.step >= wanted


def test_groups_are_as_vllm_describes_them() -> None:
    """Its own example: group_size=8, num_in_group=2 offloads layers 6, 7, 14, 15, 22, 23, ..."""
    assert Group(size=8, num_in_group=2, step=2).offloaded(24) == (6, 7, 14, 15, 22, 23)


@given(plan=plans(), max_step=st.integers(1, 4))
def test_what_every_server_asks_of_a_group_holds(plan: OffloadPlan, max_step: int) -> None:
    group = nearest_group(plan, max_step, fits=anything, meets=anything).group
    count = len(group.offloaded(plan.num_units))
    assert 1 <= group.num_in_group <= group.size <= plan.num_units
    assert group.num_in_group <= group.step <= max_step
    assert group.step < count  # with as many buffers as layers nothing is freed, and SGLang fails


@given(plan=plans(), max_step=st.integers(1, 4))
def test_with_room_for_all_no_more_are_offloaded_than_in_the_plan(plan: OffloadPlan, max_step: int) -> None:
    choice = nearest_group(plan, max_step, fits=anything, meets=anything)
    assert choice.fits
    assert choice.meets
    assert len(choice.group.offloaded(plan.num_units)) <= plan.num_offloaded


@given(plan=plans(), max_step=st.integers(1, 4), share=st.floats(0.5, 1.2))
def test_fewer_only_where_memory_allows_and_more_only_where_it_does_not(
    plan: OffloadPlan, max_step: int, share: float
) -> None:
    fits = frees_at_least(plan, share)
    choice = nearest_group(plan, max_step, fits=fits, meets=anything)
    count = len(choice.group.offloaded(plan.num_units))
    assert choice.fits == fits(choice.group)
    if choice.fits and count > plan.num_offloaded:
        # No group at all of as many or fewer, of any size and step, would have fitted.
        for size in range(1, plan.num_units + 1):
            for num_in_group in range(1, min(size, max_step) + 1):
                for step in range(num_in_group, max_step + 1):
                    other = Group(size=size, num_in_group=num_in_group, step=step)
                    assert len(other.offloaded(plan.num_units)) > plan.num_offloaded or not fits(other)


@given(num_units=st.integers(4, 64), data=st.data())
def test_a_plan_of_whole_intervals_is_followed_exactly(num_units: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_units // 2))
    offloaded = Group(size=size, num_in_group=1, step=1).offloaded(num_units)
    plan = OffloadPlan(offloaded=offloaded, num_slots=1, num_units=num_units)
    group = nearest_group(plan, 1, fits=anything, meets=anything).group
    assert len(group.offloaded(num_units)) == plan.num_offloaded


def test_objectives_count_before_the_number_of_layers() -> None:
    plan = OffloadPlan(offloaded=(3, 7, 11), num_slots=1, num_units=12)
    choice = nearest_group(plan, 2, fits=anything, meets=lambda group: len(group.offloaded(12)) <= 2)
    assert len(choice.group.offloaded(12)) == 2
    assert choice.meets


def test_a_group_that_fits_is_named_though_it_misses_the_objectives() -> None:
    plan = OffloadPlan(offloaded=(3, 7, 11), num_slots=1, num_units=12)
    choice = nearest_group(plan, 2, fits=anything, meets=nothing)
    assert (choice.fits, choice.meets) == (True, False)
    assert choice.group.offloaded(12) == plan.offloaded
    assert not nearest_group(plan, 2, fits=nothing, meets=anything).fits


def overwrites(group: Group, num_units: int) -> bool:
    """Whether a buffer is refilled before its layer has computed, in a vLLM without pull request 54975."""
    count, holds = len(group.offloaded(num_units)), {}
    for layer in range(group.step):
        holds[layer % group.step] = layer
    for _ in range(2):
        for layer in range(count):
            if holds[layer % group.step] != layer:
                return True
            following = (layer + group.step) % count
            holds[following % group.step] = following
    return False


@given(plan=plans(), max_step=st.integers(1, 4))
def test_answers_of_an_older_vllm_are_right_wherever_the_step_divides(plan: OffloadPlan, max_step: int) -> None:
    group = nearest_group(plan, max_step, fits=anything, meets=anything).group
    divides = len(group.offloaded(plan.num_units)) % group.step == 0
    assert overwrites(group, plan.num_units) == (not divides)


def test_of_two_steps_the_one_that_divides_is_taken() -> None:
    plan = OffloadPlan(offloaded=(3, 7, 11), num_slots=2, num_units=12)
    assert nearest_group(plan, 2, fits=anything, meets=anything).group.step == 1
    assert nearest_group(plan, 2, fits=anything, meets=lambda group: group.step == 2).group.step == 2


def test_a_plan_that_frees_nothing_has_no_group() -> None:
    with pytest.raises(ValueError, match="num_offloaded=1"):
        nearest_group(OffloadPlan(offloaded=(1,), num_slots=1, num_units=4), 1, fits=anything, meets=anything)
