"""The reference: each unit is copied when it is needed, and waited for."""

from __future__ import annotations

from collections.abc import Sequence

from selectn_core.offload.executor import Executor
from selectn_core.weights.units import Unit


class SynchronousExecutor(Executor):
    """Copies each offloaded unit when it is needed and waits for it: slow, and plain enough to trust."""

    def _start_plan(self, promoted: Sequence[int]) -> None:
        for index in promoted:
            self._copy_home(self.units[index])

    def _before_unit(self, unit: Unit) -> None:
        if unit.index in self._homes:
            self._await_home(unit)
            return
        target = self._slots[0]
        self._wait(self._copy(unit, target, after=self.device.record()), unit, target)
        self._bind_slot(unit, 0)
