"""A fake of a device whose memory torch allocates. It has no GPU: memory and compute are the CPU's, as emulated.

What differs from the emulated device is when memory comes back. A CUDA device's does when the last tensor that views it
has gone, whatever its accounts say. So this device keeps a weak reference to everything that it has given out, and it
refuses, as a GPU would, what does not fit beside what is still alive.
"""

from __future__ import annotations

import weakref

import torch

from selectn_core.device import ALIGNMENT_BYTES, align_up
from selectn_core.device.emulated import EmulatedDevice
from selectn_core.errors import DeviceMemoryExceeded


class AllocatingDevice(EmulatedDevice):
    """Its `kind` is none that there is: an engine treats it as it treats a GPU."""

    kind = "allocating"

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(0, bytes_per_s=50e9)
        self.capacity_bytes = align_up(capacity_bytes)
        self.most_alive_bytes = 0
        self._sizes: dict[int, int] = {}
        self._given_out: list[tuple[weakref.ref[torch.UntypedStorage], int, str]] = []

    @property
    def allocated_bytes(self) -> int:
        return sum(self._sizes.values())

    def alive(self) -> dict[str, int]:
        """Bytes that tensors still hold, by purpose."""
        self._given_out = [each for each in self._given_out if each[0]() is not None]
        return {purpose: size for _, size, purpose in self._given_out}

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        size = align_up(num_bytes)
        if size > self.free_bytes:
            raise DeviceMemoryExceeded(f"{purpose} wants {size:,} bytes; {self.free_bytes:,} are free by the accounts")
        self.alive()
        held = sum(each[1] for each in self._given_out)
        if held + size > self.capacity_bytes:
            raise DeviceMemoryExceeded(f"{purpose} wants {size:,} bytes beside what is alive: {self.alive()}")
        raw = torch.empty(size + ALIGNMENT_BYTES, dtype=torch.uint8)
        self._given_out.append((weakref.ref(raw.untyped_storage()), size, purpose))
        self.most_alive_bytes = max(self.most_alive_bytes, held + size)
        offset = -raw.data_ptr() % ALIGNMENT_BYTES
        tensor = raw[offset : offset + num_bytes]
        self._sizes[tensor.data_ptr()] = size
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        if self._sizes.pop(tensor.data_ptr(), None) is None:
            raise ValueError("not a tensor that this device has allocated")
