"""A device that is none: copies take a given time on a clock of their own, which moves when the host waits.

For what a change of plan makes the host wait. Nothing is copied. Memory is the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from selectn_core.device import ALIGNMENT_BYTES, Device, Event, LinkUsage, Timestamp


class PacedDevice(Device):
    kind, provenance = "paced", "modelled"
    torch_device = torch.device("cpu")
    host_allocated_bytes = 0
    allocated_bytes = 0

    def __init__(self, capacity_bytes: int, copy_s: float) -> None:
        """Every copy takes `copy_s`, whatever its bytes."""
        self.capacity_bytes, self._copy_s = capacity_bytes, copy_s
        self.now_s = self.waited_s = self._busy_until_s = 0.0
        self._no_usage = LinkUsage(copied_bytes=0, num_copies=0, busy_s=0.0)

    def wait_until(self, instant_s: float) -> None:
        """The host waits."""
        self.waited_s += max(0.0, instant_s - self.now_s)
        self.now_s = max(self.now_s, instant_s)

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        raw = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)
        offset = -raw.data_ptr() % ALIGNMENT_BYTES
        return raw[offset : offset + num_bytes]

    def free(self, tensor: torch.Tensor) -> None:
        pass

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        return self.allocate(num_bytes, "host memory")

    def register_host(self, memory: torch.Tensor) -> None:
        pass

    unregister_host = register_host

    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        self._busy_until_s = max(self._busy_until_s, self.now_s) + self._copy_s
        return _PacedEvent(self, self._busy_until_s)

    def copies_issued(self) -> Event:
        return _PacedEvent(self, self._busy_until_s)

    def record(self) -> Event:
        return _PacedEvent(self, self.now_s)

    def wait(self, event: Event) -> None:
        """A stream waits, the host does not."""

    def synchronize(self) -> None:
        self.wait_until(self._busy_until_s)

    def timestamp(self) -> Timestamp:
        return _PacedTimestamp(self.now_s)

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return 0

    def link_usage(self) -> LinkUsage:
        return self._no_usage

    def close(self) -> None:
        pass


class _PacedEvent(Event):
    def __init__(self, device: PacedDevice, at_s: float) -> None:
        self._device, self._at_s = device, at_s

    def is_done(self) -> bool:
        return self._device.now_s >= self._at_s

    def synchronize(self) -> None:
        self._device.wait_until(self._at_s)


class _PacedTimestamp(Timestamp):
    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    def since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, _PacedTimestamp)
        return self._at_s - earlier._at_s
