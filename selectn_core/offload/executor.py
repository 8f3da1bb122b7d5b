"""Runs a model whose offloaded units are copied in while others compute: where every unit's weights are.

Every unit has its weights in the host store. A resident unit also has a *home* on the device; an offloaded one is
copied into a *slot* for every step, just in time. `OverlappedExecutor` keeps the link busy through the step and
across its end; `SynchronousExecutor` copies each unit when it is needed and is the reference the other must equal.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from selectn_core.device import Device, Event, Timestamp
from selectn_core.errors import DeviceMemoryExceeded, LinkError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.arena import FixedMemory, WeightMemory
from selectn_core.memory.plan_memory import plan_bytes, slot_bytes
from selectn_core.offload.unit_hooks import UnitHooks
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.units import Unit

logger = logging.getLogger(__name__)

_COPY_ATTEMPTS = 3


@dataclass(kw_only=True)
class ExecutorStats:
    """Counts since the executor was attached. `stall_s` is compute time lost waiting for copies."""

    num_steps: int = 0
    num_copies: int = 0
    num_plan_changes: int = 0
    stall_s: float = 0.0


class Executor(ABC):
    """Owns where the units' weights are. Attach and detach are symmetric; a `with` block does both.

    `plan` is what holds now. It differs from `wanted`, what was asked for last, while device memory lacks for that:
    then more units are offloaded, and `apply_plan` brings them back as memory comes free.
    `request_plan` may be called from any thread; all else belongs to the thread that runs the model.
    """

    def __init__(
        self,
        model: nn.Module,
        store: HostStore,
        device: Device,
        plan: OffloadPlan,
        memory: WeightMemory | None = None,
    ) -> None:
        """Homes and slots come from `memory`, whose owner then calls `apply_plan` between steps.

        Without it they come straight from `device`, and plans are applied as a step begins.
        """
        self.model, self.store, self.device = model, store, device
        self.memory: WeightMemory = memory if memory is not None else FixedMemory(device)
        self._applies_in_step = memory is None
        self.units: Sequence[Unit] = store.units
        self.stats = ExecutorStats()
        self.wanted = plan
        self.plan = OffloadPlan(
            offloaded=tuple(range(len(self.units))), num_slots=plan.num_slots, num_units=len(self.units)
        )
        self._requested: OffloadPlan | None = plan
        self._lock = threading.Lock()
        self._is_in_step = False  # from its forward on, until `end_step`
        self._changed: Event | None = None  # when the last change of plan had moved what it moves
        self._homes: dict[int, torch.Tensor] = {}
        self._home_copied: dict[int, Event] = {}
        self._slots: list[torch.Tensor] = []  # uint8 [slot_bytes of the plan] each
        self._slot_views: dict[tuple[int, int], list[torch.Tensor]] = {}  # (unit, slot)
        self._hooks = UnitHooks(
            model,
            self.units,
            begin_step=self.begin_step,
            before_unit=self._before_unit,
            after_unit=self._after_unit,
        )
        self._stalls: deque[tuple[Timestamp, Timestamp]] = deque(maxlen=2 * len(self.units))

    # -- life ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the model and places its units by the plan. Raises DeviceMemoryExceeded if they do not fit."""
        self.request_plan(self.wanted)
        self.hook()
        try:
            self.apply_plan()
        except BaseException:
            self.detach()
            raise

    def hook(self) -> None:
        """Hooks the model; the weights are where they are."""
        self._hooks.attach()
        self._hook_units()

    def _hook_units(self) -> None:
        """Hooks the units that need it: resident ones whose weights have arrived run as transformers built them."""
        self._hooks.put_around((*self.plan.offloaded, *self._home_copied))

    def unhook(self) -> None:
        """Leaves the model as transformers built it, which works while every unit is resident."""
        self._hooks.detach()

    def detach(self) -> None:
        """Unhooks the model, gives device memory back and leaves the parameters bound to the host store."""
        self.unhook()
        self.device.synchronize()
        self._forget_slots()
        for unit in self.units:
            self.store.bind(unit)
        for buffer in [*self._homes.values(), *self._slots]:
            self.memory.free(buffer)
        self._homes.clear()
        self._home_copied.clear()
        self._slots.clear()
        self._is_in_step, self._changed = False, None

    def __enter__(self) -> Executor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- plans --------------------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Device bytes of homes and slots."""
        return sum(self.memory.round_up(buffer.nbytes) for buffer in [*self._homes.values(), *self._slots])

    def request_plan(self, plan: OffloadPlan) -> None:
        """Takes effect before the next step. Raises DeviceMemoryExceeded if it can never fit."""
        if plan.num_units != len(self.units):
            raise ValueError(f"a plan for {plan.num_units} units, for a model of {len(self.units)}")
        wanted, budget = self._bytes_of(plan), self.memory.reachable_bytes(self.held_bytes)
        if wanted > budget:
            raise DeviceMemoryExceeded(
                f"{plan.num_offloaded} of {plan.num_units} units offloaded through {plan.slots_used} slots needs "
                f"{wanted:,} bytes of device memory for weights; {budget:,} are there: offload more units"
            )
        with self._lock:
            self._requested = plan

    def apply_plan(self) -> None:
        """Goes to the requested plan, or as near to it as device memory allows now. Not while a step is under way."""
        with self._lock:
            requested, self._requested = self._requested, None
        if requested is not None:
            self.wanted = requested
        elif self.plan == self.wanted:
            return
        plan = self._nearest_possible(self.wanted)
        if requested is None and plan == self.plan:
            return
        self._change_to(plan)

    def begin_step(self) -> None:
        """Counts the step, and stops hooking units whose weights have arrived in their homes."""
        self.stats.num_steps += 1
        if self._changed is not None:  # the step may compute on another stream than the one that moved weights
            self.device.wait(self._changed)
            self._changed = None
        if self._applies_in_step:
            self.apply_plan()
        self._is_in_step = True
        if len(self._hooks) != len(self.plan.offloaded) + len(self._home_copied):
            self._hook_units()

    def end_step(self) -> float:
        """Seconds that compute waited for copies since the last call; only after the step's compute is done."""
        self._is_in_step = False
        stall_s = sum(after.since(before) for before, after in self._stalls)
        self._stalls.clear()
        self.stats.stall_s += stall_s
        return stall_s

    def check_integrity(self) -> None:
        """Raises AssertionError unless every unit has a home or is offloaded, and all is as the plan says."""
        away = set(self.plan.offloaded)
        assert set(self._homes) == set(range(len(self.units))) - away, "homes and plan disagree"
        slot_sizes = [slot.nbytes for slot in self._slots]
        assert slot_sizes == [slot_bytes(self.units, self.plan)] * self.plan.slots_used, "slots and plan disagree"
        spans = sorted((b.data_ptr(), b.data_ptr() + b.nbytes) for b in [*self._homes.values(), *self._slots])
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "device buffers overlap"

    def _bytes_of(self, plan: OffloadPlan) -> int:
        return plan_bytes(self.units, plan, self.memory.round_up)

    def _nearest_possible(self, wanted: OffloadPlan) -> OffloadPlan:
        """`wanted`, with more units offloaded until it fits: first those that would have to come back, last first."""
        budget = self.memory.available_bytes(self.held_bytes)
        returning = [i for i in range(len(self.units)) if i not in self._homes and i not in wanted.offloaded]
        staying = [i for i in self._homes if i not in wanted.offloaded]
        plan, more = wanted, [*staying, *returning]
        while self._bytes_of(plan) > budget:
            if not more:
                return self.plan  # which fits: it holds
            offloaded = tuple(sorted([*plan.offloaded, more.pop()]))
            plan = OffloadPlan(offloaded=offloaded, num_slots=wanted.num_slots, num_units=wanted.num_units)
        return plan

    def _change_to(self, plan: OffloadPlan) -> None:
        kept = set(self._homes)
        try:
            self._place(plan)
        except DeviceMemoryExceeded as error:
            logger.info("device memory is in pieces, moving homes together: %s", error)
            kept -= self._home_copied.keys()  # what has not arrived is fetched again, to where it is to be now
            self._vacate(self._homes.keys() - kept)
            self._resize_slots(0, 0)
            self._compact()
            # This cannot fail. The plan's bytes are available, as they were before the first try: the KV cache is in
            # use by as many sectors or fewer, whatever was taken from it. And what is free has no holes between homes
            # now, which fill it from its lowest place on.
            self._place(plan)
        promoted = sorted(self._homes.keys() - kept)
        self._changed = self.device.record()
        self.plan = plan
        self.stats.num_plan_changes += 1
        self._start_plan(promoted)
        self._hook_units()

    def _place(self, plan: OffloadPlan) -> None:
        """Gives every resident unit a home and no other; new ones are still empty."""
        resident = set(range(len(self.units))) - set(plan.offloaded)
        self._vacate(self._homes.keys() - resident)
        self._resize_slots(plan.slots_used, slot_bytes(self.units, plan))
        for index in sorted(resident - self._homes.keys()):
            self._homes[index] = self._new_home(self.units[index])

    def _new_home(self, unit: Unit) -> torch.Tensor:
        return self.memory.allocate(unit.num_bytes, f"the weights of {unit.name}")

    def _compact(self) -> None:
        """Moves every home as low as it goes, on the device, so that what is free beside them is in one piece."""
        self._await_copies()
        for index in sorted(self._homes, key=lambda each: self._homes[each].data_ptr()):
            unit, home = self.units[index], self._homes[index]
            weights = home.clone()  # the new place may overlap the old one
            self.memory.free(home)
            self._homes[index] = self._new_home(unit)
            self._homes[index].copy_(weights)
            unit.bind(unit.views(self._homes[index]))

    def _await_copies(self) -> None:
        """Orders what this thread issues from now on after every copy until now; the next step comes after that.

        Between steps nothing computes, so the host need not wait. A step that an error has cut short may still compute,
        on a stream that is not known here.
        """
        if self._is_in_step:
            self.device.synchronize()
        else:
            self.device.wait(self.device.copies_issued())

    def _await_arrival(self, copy: Event) -> None:
        """The same for one copy, of which bytes must not arrive where something else is soon."""
        if self._is_in_step:
            copy.synchronize()
        else:
            self.device.wait(copy)

    @abstractmethod
    def _start_plan(self, promoted: Sequence[int]) -> None:
        """Issues the copies that the plan begins with; `promoted` units must reach their homes."""

    def _vacate(self, indices: Iterable[int]) -> None:
        for index in list(indices):
            event = self._home_copied.pop(index, None)
            if event is not None:
                with contextlib.suppress(LinkError):  # the bytes do not matter any more, only that none will follow
                    self._await_arrival(event)
            self.store.bind(self.units[index])
            self.memory.free(self._homes.pop(index))

    def _copy_home(self, unit: Unit) -> None:
        # Not before what has computed in this memory until now is done with it.
        self._home_copied[unit.index] = self._copy(unit, self._homes[unit.index], after=self.device.record())
        unit.bind(unit.views(self._homes[unit.index]))

    def _await_home(self, unit: Unit) -> None:
        """Makes compute wait for the weights that are on their way into the unit's home, if they are."""
        event = self._home_copied.get(unit.index)
        if event is not None:
            self._wait(event, unit, self._homes[unit.index])
            del self._home_copied[unit.index]  # only now: after an error the home must not pass for filled

    def _resize_slots(self, num_slots: int, num_bytes: int) -> None:
        kept = [slot for slot in self._slots if slot.nbytes == num_bytes][:num_slots]  # all or none are of that size
        if len(kept) == len(self._slots) == num_slots:
            return
        self._await_copies()  # one may be on its way into a slot that goes
        self._forget_slots()
        while len(self._slots) > len(kept):
            self.memory.free(self._slots.pop())
        while len(self._slots) < num_slots:
            self._slots.append(self.memory.allocate(num_bytes, f"slot {len(self._slots)}"))

    def _forget_slots(self) -> None:
        """Drops every view of the slots, so that their memory can go."""
        self._slot_views.clear()
        for unit in self.units:
            if unit.index not in self._homes:
                self.store.bind(unit)

    # -- units --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _before_unit(self, unit: Unit) -> None:
        """Makes the unit's parameters right before it computes."""

    def _after_unit(self, unit: Unit) -> None:  # noqa: B027  (nothing to do is a valid implementation)
        """Called when the unit's compute has been issued."""

    def _bind_slot(self, unit: Unit, slot: int) -> None:
        views = self._slot_views.get((unit.index, slot))
        if views is None:
            views = self._slot_views[unit.index, slot] = unit.views(self._slots[slot])
        unit.bind(views)

    def _copy(self, unit: Unit, target: torch.Tensor, after: Event | None = None) -> Event:
        self.stats.num_copies += 1
        return self.device.copy_async(self.store.buffer(unit), target[: unit.num_bytes], after=after)

    def _wait(self, event: Event, unit: Unit, target: torch.Tensor) -> Event:
        """Makes compute wait for a copy, repeating one that the link failed; returns the copy that arrived."""
        before = self.device.timestamp()
        for attempt in range(1, _COPY_ATTEMPTS + 1):
            try:
                self.device.wait(event)
                break
            except LinkError as error:
                if attempt == _COPY_ATTEMPTS:
                    raise LinkError(f"{unit.name}: {_COPY_ATTEMPTS} copies in a row failed") from error
                logger.warning("copying %s again: %s", unit.name, error)
                event = self._copy(unit, target)
        self._stalls.append((before, self.device.timestamp()))
        return event
