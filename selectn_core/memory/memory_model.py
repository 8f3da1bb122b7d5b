"""The memory that a plan must fit: a device laid out as the engine lays it out, and room on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from selectn_core.device import align_up
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry, weight_sectors
from selectn_core.memory.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class DeviceNeed:
    """Device bytes by owner under one plan, as `accounts.DeviceAccount` has them of an engine that runs."""

    resident_bytes: int
    homes_bytes: int
    slots_bytes: int
    kv_bytes: int
    padding_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """What memory there is, and how the engine divides it.

    Attributes:
        resident_bytes: weights that never move: embeddings, norms, head, buffers.
        kv: the KV cache's geometry; homes and slots are whole sectors of it. `kv_of_tokens` makes a plain one.
        num_reserved_sectors: sectors that padding reads and writes.
        workspace: what activations take.
        device_bytes: the device's memory; None: as much as it takes.
        host_bytes: host memory for weights; None: as much as it takes.
        host_store_bytes: what the host's copy of the weights takes under any plan, for an engine that keeps every
            unit there, as the one here does; 0 where only offloaded units are on the host.
        max_slots: the most slots a plan may have.
    """

    resident_bytes: int
    kv: KvGeometry
    workspace: Workspace
    num_reserved_sectors: int = 2
    device_bytes: int | None = None
    host_bytes: int | None = None
    host_store_bytes: int = 0
    max_slots: int = 4

    def unit_sectors(self, unit_bytes: Sequence[int]) -> tuple[int, ...]:
        """Sectors of each unit's home. A slot has those of the largest unit that passes through it."""
        return tuple(weight_sectors(size, self.kv.sector_bytes) for size in unit_bytes)

    @property
    def num_sectors(self) -> int | None:
        """Sectors for homes, slots and KV: what resident weights and activations leave of the device."""
        if self.device_bytes is None:
            return None
        free_bytes = self.device_bytes - align_up(self.resident_bytes)
        return self.workspace.most_sectors(free_bytes, self.kv.sector_bytes) - self.num_reserved_sectors

    def device_bytes_for(self, num_sectors: int) -> int:
        """The smallest device that has `num_sectors` for homes, slots and KV."""
        wanted = num_sectors + self.num_reserved_sectors
        work, size = self.workspace, self.kv.sector_bytes
        free_bytes = work.step_bytes + work.past_bytes + math.ceil(wanted * (size + work.bytes_per_sector))
        while work.most_sectors(free_bytes, size) < wanted:
            free_bytes += 1  # a fraction that rounding took
        return align_up(self.resident_bytes) + free_bytes

    def host_bytes_for(self, offloaded_bytes: int) -> int:
        """Host bytes that weights take."""
        return max(self.host_store_bytes, offloaded_bytes)

    def need(self, *, home_sectors: int, slot_sectors: int, kv_sectors: int) -> DeviceNeed:
        """Who has which byte of the device. Activations are sized for all sectors being KV, as they may become."""
        num_sectors, size = self.num_sectors, self.kv.sector_bytes
        if num_sectors is None:
            num_sectors = home_sectors + slot_sectors + kv_sectors
        return DeviceNeed(
            resident_bytes=align_up(self.resident_bytes),
            homes_bytes=home_sectors * size,
            slots_bytes=slot_sectors * size,
            kv_bytes=kv_sectors * size,
            padding_bytes=self.num_reserved_sectors * size,
            workspace_bytes=self.workspace.bytes_for(num_sectors),
        )


def kv_of_tokens(bytes_per_token: int, page_size: int = 16) -> KvGeometry:
    """The geometry of a model all of whose layers keep every key: a sector is one page of all of them."""
    blocks = BlockGeometry(page_size=page_size, blocks_per_sector=1, sliding_window=None)
    return KvGeometry(sector_bytes=bytes_per_token * page_size, types=(blocks,))
