"""Measures what a step's units cost on this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from torch.utils.hooks import RemovableHandle

from selectn_core.device import Device, Timestamp
from selectn_core.weights.units import Unit


class UnitTimer:
    """While attached, times each unit's compute in every step, waiting for copies excluded.

    Attach it after the executor: the hooks that wait for a unit's weights then run before the first mark.
    """

    def __init__(self, units: Sequence[Unit], device: Device) -> None:
        self._units, self._device = units, device
        self._marks: list[list[tuple[Timestamp, Timestamp]]] = [[] for _ in units]
        self._started: Timestamp | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> UnitTimer:
        for unit in self._units:
            self._handles.append(unit.module.register_forward_pre_hook(self._start))
            # Before the executor's own hook, which issues the next copy.
            self._handles.append(unit.module.register_forward_hook(self._stopper(unit), prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def median_compute_s(self) -> tuple[float, ...]:
        """Median seconds per unit over the steps since `reset`; call it when the device is idle."""
        self._device.synchronize()
        return tuple(median(end.since(start) for start, end in marks) for marks in self._marks)

    def reset(self) -> None:
        """Forgets the steps seen so far."""
        for marks in self._marks:
            marks.clear()

    def _start(self, *_: object) -> None:
        self._started = self._device.timestamp()

    def _stopper(self, unit: Unit) -> Callable[..., None]:
        def stop(*_: object) -> None:
            assert self._started is not None
            self._marks[unit.index].append((self._started, self._device.timestamp()))

        return stop
