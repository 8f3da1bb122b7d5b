"""The data plane that serves: the next units are copied while others compute, through the step and across its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selectn_core.device import Event
from selectn_core.offload.executor import Executor
from selectn_core.weights.units import Unit


class OverlappedExecutor(Executor):
    """Keeps the next S offloaded units of the endless sequence of steps in the slots, or on their way there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slot_of: dict[int, int] = {}
        self._copied: dict[int, Event] = {}
        self._position: dict[int, int] = {}
        self._in_step = False

    def begin_step(self) -> None:
        super().begin_step()
        if self._in_step:  # the last step was cut short by an error: what the slots hold is no longer known
            self._slot_of.clear()
            self._start_plan(())
        self._in_step = bool(self.plan.offloaded)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert len(set(self._slot_of.values())) == len(self._slot_of), "two units in one slot"
        assert set(self._slot_of) == set(self._copied) <= set(self.plan.offloaded), "a slot holds a resident unit"

    def _start_plan(self, promoted: Sequence[int]) -> None:
        first = self.plan.offloaded[: self.plan.slots_used]
        self._position = {index: i for i, index in enumerate(self.plan.offloaded)}
        self._slot_of = {index: slot for index, slot in self._slot_of.items() if index in first}
        self._copied = {index: self._copied[index] for index in self._slot_of}
        vacant = sorted(set(range(len(self._slots))) - set(self._slot_of.values()))
        for index in sorted([*promoted, *(index for index in first if index not in self._slot_of)]):
            if index in self._homes:
                self._copy_home(self.units[index])
            else:
                self._fetch(index, vacant.pop(0), after=self.device.record())

    def _forget_slots(self) -> None:
        super()._forget_slots()
        self._slot_of.clear()
        self._copied.clear()

    def _fetch(self, index: int, slot: int, after: Event | None) -> None:
        self._slot_of[index] = slot
        self._copied[index] = self._copy(self.units[index], self._slots[slot], after)

    def _before_unit(self, unit: Unit) -> None:
        index = unit.index
        if index in self._homes:
            self._await_home(unit)
            return
        slot = self._slot_of[index]
        self._copied[index] = self._wait(self._copied[index], unit, self._slots[slot])
        self._bind_slot(unit, slot)

    def _after_unit(self, unit: Unit) -> None:
        position = self._position.get(unit.index)
        if position is None:
            return
        offloaded, num_slots = self.plan.offloaded, len(self._slots)
        if num_slots < len(offloaded):
            slot = self._slot_of.pop(unit.index)
            del self._copied[unit.index]
            self._fetch(offloaded[(position + num_slots) % len(offloaded)], slot, after=self.device.record())
        if position == len(offloaded) - 1:
            self._in_step = False
