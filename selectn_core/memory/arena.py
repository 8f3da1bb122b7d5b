"""Where resident weights and slots live: in memory that the KV cache uses while they do not need it."""

from __future__ import annotations

from typing import Protocol

import torch

from selectn_core.device import Device, align_up
from selectn_core.device.range_allocator import FirstFit
from selectn_core.errors import DeviceMemoryExceeded
from selectn_core.memory.kv_geometry import weight_sectors


class WeightMemory(Protocol):
    """What the executor takes homes and slots from."""

    def round_up(self, num_bytes: int) -> int:
        """Bytes that `allocate(num_bytes)` takes."""

    def available_bytes(self, held_bytes: int) -> int:
        """Bytes that a holder of `held_bytes` may hold in all, now."""

    def reachable_bytes(self, held_bytes: int) -> int:
        """Bytes that it may hold once whatever else can make room has done so."""

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        """A uint8 tensor [num_bytes]; raises DeviceMemoryExceeded, naming `purpose`, where it does not fit."""

    def free(self, tensor: torch.Tensor) -> None:
        """Gives back what `allocate` returned."""


class FixedMemory:
    """A device's memory as it is: for a model that runs without a KV cache beside it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.allocate = device.allocate
        self.free = device.free

    def round_up(self, num_bytes: int) -> int:
        return align_up(num_bytes)

    def available_bytes(self, held_bytes: int) -> int:
        return held_bytes + self._device.free_bytes

    reachable_bytes = available_bytes


class KvSectors(Protocol):
    """The KV cache's side of the arena, whose sectors are numbered from 0."""

    memory: torch.Tensor  # uint8 [num_reserved * sector_bytes + num_sectors * sector_bytes]
    sector_bytes: int
    num_reserved: int

    @property
    def num_sectors(self) -> int:
        """Sectors that the cache has now."""

    @property
    def num_in_use(self) -> int:
        """Those of them that hold keys of running requests."""

    def take(self, sectors: range) -> bool:
        """Gives up `sectors`, moving what lives there; False, and nothing has changed, if it does not fit elsewhere.

        Running requests hold no more sectors afterwards than before: `num_in_use` does not grow.
        """

    def give(self, sectors: range) -> None:
        """Adds `sectors` to the cache."""

    def check_integrity(self, others: set[int]) -> None:
        """Raises AssertionError unless every sector is one of `others` or has exactly one state in the cache."""


class Arena:
    """One allocation that weights and KV pages share: weights from the bottom up, KV pages from the top down.

    Everything is whole sectors, the unit in which the KV cache grows. A range that is given back is the KV cache's
    at once; one that is taken is vacated first, its live pages copied elsewhere. The cache always keeps
    `min_kv_sectors`.
    """

    def __init__(self, pages: KvSectors, *, min_kv_sectors: int) -> None:
        self._pages, self.min_kv_sectors = pages, min_kv_sectors
        self.sector_bytes = pages.sector_bytes
        self.num_sectors = pages.num_sectors
        self._held = FirstFit(self.num_sectors)
        self._start_of: dict[int, int] = {}  # address of a tensor handed out -> its first sector

    @property
    def weight_bytes(self) -> int:
        """Bytes that weights hold, whole sectors."""
        return self._held.num_taken * self.sector_bytes

    def round_up(self, num_bytes: int) -> int:
        return weight_sectors(num_bytes, self.sector_bytes) * self.sector_bytes

    def available_bytes(self, held_bytes: int) -> int:
        spare = self._pages.num_sectors - max(self.min_kv_sectors, self._pages.num_in_use)
        return held_bytes + spare * self.sector_bytes

    def reachable_bytes(self, held_bytes: int) -> int:
        return (self.num_sectors - self.min_kv_sectors) * self.sector_bytes

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        count = weight_sectors(num_bytes, self.sector_bytes)
        wanted, available = count * self.sector_bytes, self.available_bytes(0)
        start = self._held.take(count) if wanted <= available else None
        if start is None or not self._pages.take(range(start, start + count)):
            if start is not None:
                self._held.give_back(start)
            raise DeviceMemoryExceeded(
                f"{purpose} wants {wanted:,} bytes of device memory in one piece; the KV cache can spare {available:,}"
            )
        offset = align_up((self._pages.num_reserved + start) * self.sector_bytes)
        tensor = self._pages.memory[offset : offset + num_bytes]
        self._start_of[tensor.data_ptr()] = start
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        start = self._start_of.pop(tensor.data_ptr(), None)
        if start is None:
            raise ValueError("not a tensor that this arena has allocated")
        self._pages.give(range(start, start + self._held.give_back(start)))

    def check_integrity(self) -> None:
        """Raises AssertionError unless every sector is exactly one of weights, free, cached, or owned by a request."""
        ranges = self._held.taken()
        held = {sector for sectors in ranges for sector in sectors}
        assert len(held) == sum(map(len, ranges)) == self._held.num_taken, "weights overlap"
        assert self._pages.num_sectors + len(held) == self.num_sectors, "sectors have been lost or invented"
        assert self._pages.num_sectors >= self.min_kv_sectors, "the KV cache is below its guaranteed minimum"
        self._pages.check_integrity(held)
