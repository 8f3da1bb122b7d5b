"""How a device's memory is divided before anything is placed there: the arena, what is beside it, KV on the host."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from selectn_core.batching import KvPages
from selectn_core.config import BatchConfig, EngineConfig
from selectn_core.device import Device, align_up
from selectn_core.errors import DeviceMemoryExceeded
from selectn_core.memory.kv_geometry import KvGeometry, weight_sectors
from selectn_core.memory.plan_memory import most_bytes
from selectn_core.memory.workspace import Workspace
from selectn_core.weights.resident import resident_tensors
from selectn_core.weights.units import Unit


def everything_bytes(model: PreTrainedModel, units: Sequence[Unit], geometry: KvGeometry, kv_tokens: int) -> int:
    """Device bytes with which every unit is resident beside a KV cache for `kv_tokens`."""
    resident = sum(align_up(tensor.nbytes) for tensor in resident_tensors(model, units))
    kv_bytes = (geometry.sectors_for(kv_tokens) + KvPages.num_reserved) * geometry.sector_bytes
    weights = most_bytes(units, lambda size: weight_sectors(size, geometry.sector_bytes) * geometry.sector_bytes)
    return resident + align_up(kv_bytes + weights)


def arena_sectors(device: Device, geometry: KvGeometry, workspace: Workspace, batch: BatchConfig) -> int:
    """Sectors of the arena: all that resident weights and activations leave of the device.

    Raises DeviceMemoryExceeded where that does not hold `batch.kv_tokens`.
    """
    num_sectors = workspace.most_sectors(device.free_bytes, geometry.sector_bytes) - KvPages.num_reserved
    least = geometry.sectors_for(batch.kv_tokens)
    if num_sectors < least:
        raise DeviceMemoryExceeded(
            f"the KV cache wants {least * geometry.sector_bytes:,} bytes of device memory for batch.kv_tokens="
            f"{batch.kv_tokens}; {device.free_bytes:,} of {device.capacity_bytes:,} are free, "
            f"{workspace.bytes_for(least):,} of them for activations: raise device.memory_gib, or lower "
            "batch.kv_tokens, batch.max_batch_tokens or batch.max_requests"
        )
    return num_sectors


def host_sectors(config: EngineConfig, geometry: KvGeometry, longest_tokens: int) -> int:
    """Sectors of host memory for KV: what is allowed, and no more than every running request could fill.

    `longest_tokens` is what one request may have.
    """
    allowed = int(config.host.kv_gib * (1 << 30)) // geometry.sector_bytes
    return min(allowed, config.batch.max_requests * geometry.sectors_for_request(longest_tokens))


def check_room(device: Device, workspace_bytes: int) -> None:
    """After warm-up, when libraries have taken what they take: raises DeviceMemoryExceeded without room for a step."""
    room_bytes = device.room_bytes
    if room_bytes is not None and room_bytes < workspace_bytes:
        raise DeviceMemoryExceeded(
            f"after warm-up {room_bytes:,} bytes of the GPU's memory are left and activations take up to "
            f"{workspace_bytes:,}: others use it, or libraries took more than was kept back; lower device.memory_gib "
            f"({device.capacity_bytes / 2**30:.1f} now)"
        )


def out_of_memory(error: Exception) -> DeviceMemoryExceeded:
    """What torch says when an allocation of its own fails while an engine is built."""
    return DeviceMemoryExceeded(
        f"the GPU's memory was not enough: {str(error).splitlines()[0]}: lower device.memory_gib, "
        "batch.max_batch_tokens or batch.max_requests"
    )
