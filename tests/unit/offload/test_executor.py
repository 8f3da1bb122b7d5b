"""Where the executor puts weights: tight memory, copies that fail, and symmetry of attach and detach."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selectn_core.device import Event, align_up
from selectn_core.device.emulated import EmulatedDevice, EmulatedEvent
from selectn_core.errors import DeviceMemoryExceeded, LinkError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.plan_memory import plan_bytes
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.units import find_units
from tests.support.tiny_models import FAMILIES

NUM_UNITS = 9
IDS = torch.tensor([[3, 4, 5]])
BOTH_EXECUTORS = pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])


@cache
def unequal_model() -> PreTrainedModel:
    """Every other layer is a mixture of experts: units of two sizes, so that memory can go to pieces."""
    settings = {**FAMILIES["qwen2_moe"], "num_hidden_layers": NUM_UNITS}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def plan_of(*offloaded: int, num_slots: int = 1, num_units: int = NUM_UNITS) -> OffloadPlan:
    return OffloadPlan(offloaded=offloaded, num_slots=num_slots, num_units=num_units)


EVERYTHING = plan_of(*range(NUM_UNITS))


def build(
    executor_class: type[Executor], capacity_bytes: int, plan: OffloadPlan = EVERYTHING, granularity: str = "layer"
) -> Executor:
    model = copy.deepcopy(unequal_model())
    device = EmulatedDevice(capacity_bytes, bytes_per_s=50e9)
    return executor_class(model, HostStore(find_units(model, granularity), device), device, plan)


@pytest.fixture(params=[OverlappedExecutor, SynchronousExecutor])
def executor(request) -> Iterator[Executor]:
    executor = build(request.param, 16 << 20)
    with executor.device:
        executor.attach()
        yield executor


@cache
def expected_logits() -> torch.Tensor:
    return unequal_model()(IDS).logits


def step(executor: Executor) -> None:
    assert torch.equal(executor.model(IDS).logits, expected_logits())
    executor.check_integrity()
    executor.end_step()


@pytest.mark.parametrize("granularity", ["layer", "block"])
@BOTH_EXECUTORS
def test_a_plan_that_fits_runs_whatever_the_memory_looked_like_before(
    executor_class: type[Executor], granularity: str
) -> None:
    """Homes and slots of several sizes come and go until no slot fits between them, though enough is free in all."""
    sizes = [align_up(unit.num_bytes) for unit in find_units(unequal_model(), granularity)]
    num_units = len(sizes)
    everything = plan_of(*range(num_units), num_units=num_units)
    for seed in range(20):
        chance = random.Random(seed)
        capacity_bytes = chance.randint(2 * sum(sizes) // 3, sum(sizes))
        executor = build(executor_class, capacity_bytes, everything, granularity)
        with executor.device, executor:
            for _ in range(60):
                offloaded = sorted(chance.sample(range(num_units), chance.randint(0, num_units)))
                plan = plan_of(*offloaded, num_slots=chance.randint(1, 4), num_units=num_units)
                if plan_bytes(executor.units, plan) > executor.device.capacity_bytes:
                    with pytest.raises(DeviceMemoryExceeded, match=r"bytes of device memory .* offload more units"):
                        executor.request_plan(plan)
                    continue
                executor.request_plan(plan)
                executor.begin_step()
                executor.check_integrity()
                assert executor.plan == plan
                assert executor.device.allocated_bytes == plan_bytes(executor.units, plan)
            step(executor)


def test_units_that_all_have_a_slot_are_copied_once(executor: Executor) -> None:
    executor.request_plan(plan_of(1, 5, num_slots=3))
    step(executor)
    copies = executor.stats.num_copies
    for _ in range(3):
        step(executor)
    per_step = 2 if isinstance(executor, SynchronousExecutor) else 0
    assert executor.stats.num_copies - copies == 3 * per_step


def test_each_step_copies_each_offloaded_unit_once(executor: Executor) -> None:
    executor.request_plan(plan_of(0, 3, 4, 8, num_slots=2))
    step(executor)
    copies = executor.stats.num_copies
    for _ in range(5):
        step(executor)
    assert executor.stats.num_copies - copies == 5 * 4
    assert executor.stats.num_plan_changes == 2, "the first plan, and the one requested: each applied once"


def test_a_copy_that_arrived_at_the_second_try_is_not_repeated_in_later_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = build(OverlappedExecutor, 16 << 20, plan_of(2, num_slots=2))
    with executor.device, executor:
        step(executor)
        send = executor.device.copy_async

        def fail_once(source: torch.Tensor, target: torch.Tensor, **kwargs: object) -> EmulatedEvent:
            monkeypatch.setattr(executor.device, "copy_async", send)
            event = EmulatedEvent()
            event.finish(LinkError("injected"))
            return event

        monkeypatch.setattr(executor.device, "copy_async", fail_once)
        executor.request_plan(plan_of(2, 7, num_slots=2))  # nothing is promoted: what fails is on its way to a slot
        step(executor)
        copies = executor.stats.num_copies
        step(executor)
        step(executor)
        assert executor.stats.num_copies == copies


def change_plans(executor: Executor) -> None:
    """To fewer and smaller slots, more, and homes that have to move together."""
    for plan in (plan_of(0, 3, 4, 8, num_slots=2), plan_of(1, num_slots=1), plan_of(2, 3, 5, num_slots=3)):
        executor.request_plan(plan)
        executor.apply_plan()
    executor._await_copies()
    executor._compact()


def test_a_change_of_plan_between_steps_does_not_stop_the_device(executor: Executor) -> None:
    step(executor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.device, "synchronize", lambda: pytest.fail("the host waits for all that was issued"))
        in_order: list[Event] = []  # a stream that computes would wait for these
        wait, synchronize = executor.device.wait, EmulatedEvent.synchronize

        def wait_in_order(event: Event) -> None:
            in_order.append(event)
            wait(event)

        def synchronize_in_order(event: EmulatedEvent) -> None:
            assert any(event is each for each in in_order), "the host waits for a copy"
            synchronize(event)

        patch.setattr(executor.device, "wait", wait_in_order)
        patch.setattr(EmulatedEvent, "synchronize", synchronize_in_order)
        change_plans(executor)
    step(executor)


def test_a_slot_is_given_away_when_what_is_on_its_way_there_has_arrived() -> None:
    executor = build(OverlappedExecutor, 16 << 20, plan_of(0, 3, 4, 8, num_slots=2))
    assert isinstance(executor, OverlappedExecutor)
    assert isinstance(executor.device, EmulatedDevice)
    with executor.device, executor:
        executor.device.bus.bytes_per_s = 1e6
        step(executor)
        copies, slots, free = list(executor._copied.values()), list(executor._slots), executor.memory.free
        assert not all(copy.is_done() for copy in copies), "the test says nothing"

        def checked_free(tensor: torch.Tensor) -> None:
            assert all(copy.is_done() for copy in copies) or not any(tensor is slot for slot in slots)
            free(tensor)

        executor.memory.free = checked_free  # type: ignore[method-assign]
        executor.request_plan(plan_of(1, num_slots=1))
        executor.apply_plan()
        step(executor)


def test_a_step_cut_short_leaves_no_wrong_weights(executor: Executor) -> None:
    executor.request_plan(plan_of(0, 2, 4, 6, 8, num_slots=2))
    for broken in range(NUM_UNITS):

        def fail(*_: object) -> None:
            raise ValueError("injected")

        handle = executor.units[broken].module.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="injected"):
            executor.model(IDS)
        handle.remove()
        step(executor)


def test_detaching_gives_all_memory_back_and_attaching_again_works(executor: Executor) -> None:
    for plan in (plan_of(), plan_of(1, 2, 3, num_slots=2), EVERYTHING):
        executor.request_plan(plan)
        step(executor)
    executor.detach()
    assert executor.device.allocated_bytes == 0
    assert torch.equal(executor.model(IDS).logits, expected_logits())
    steps = executor.stats.num_steps
    executor.model(IDS)
    assert executor.stats.num_steps == steps, "a hook is left on the model"


def test_a_first_plan_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    executor = build(OverlappedExecutor, 100_000, plan_of())
    with executor.device:
        with pytest.raises(DeviceMemoryExceeded):
            executor.attach()
        assert executor.device.allocated_bytes == 0
        assert torch.equal(executor.model(IDS).logits, expected_logits())


def test_a_plan_for_another_model_is_refused(executor: Executor) -> None:
    with pytest.raises(ValueError, match=f"a plan for 3 units, for a model of {NUM_UNITS}"):
        executor.request_plan(OffloadPlan(offloaded=(), num_slots=1, num_units=3))


@BOTH_EXECUTORS
def test_slots_follow_the_size_of_what_a_plan_offloads(executor_class: type[Executor]) -> None:
    """Attention blocks are the even units here: as many slots for them as for experts, but smaller ones."""
    num_units = 2 * NUM_UNITS
    small, large = (0, 4, 8), (3, 7, 11)
    executor = build(executor_class, 16 << 20, plan_of(*small, num_slots=2, num_units=num_units), "block")
    with executor.device, executor:
        for offloaded in (small, large, small, (*small, 9), large):
            plan = plan_of(*sorted(offloaded), num_slots=2, num_units=num_units)
            executor.request_plan(plan)
            step(executor)
            step(executor)
            assert executor.plan == plan
            assert executor.device.allocated_bytes == plan_bytes(executor.units, plan)


def test_integrity_is_checked(executor: Executor) -> None:
    executor.request_plan(plan_of(1, 2, 3))
    step(executor)
    executor.plan = plan_of(1, 2)
    with pytest.raises(AssertionError, match="homes and plan disagree"):
        executor.check_integrity()


def test_slots_of_another_size_than_the_plans_are_noticed(executor: Executor) -> None:
    executor.request_plan(plan_of(1, 3))
    step(executor)
    executor._slots[0] = executor._slots[0][:-1]
    with pytest.raises(AssertionError, match="slots and plan disagree"):
        executor.check_integrity()
