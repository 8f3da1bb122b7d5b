"""Who holds which bytes: the one place where device and host memory are added up."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from selectn_core.batching import ContinuousBatching
from selectn_core.device import align_up
from selectn_core.memory.arena import Arena
from selectn_core.memory.plan_memory import slot_bytes
from selectn_core.offload.executor import Executor


@dataclass(frozen=True, kw_only=True)
class DeviceAccount:
    """Device bytes by owner; they add up to the device's capacity.

    `resident_bytes` are embeddings, norms, head and buffers, `padding_bytes` the two sectors that padding reads and
    writes, `workspace_bytes` what is left to activations, `unused_bytes` less than a sector.
    """

    resident_bytes: int
    homes_bytes: int
    slots_bytes: int
    kv_bytes: int
    padding_bytes: int
    workspace_bytes: int
    unused_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostAccount:
    """Host bytes by owner: the store of all units' weights, which processes may share, and room for swapped KV."""

    weights_bytes: int
    kv_swap_bytes: int
    kv_swap_used_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """An engine's memory."""

    device: DeviceAccount
    host: HostAccount

    def to_json(self) -> dict[str, dict[str, int]]:
        return asdict(self)


def account(
    arena: Arena,
    executor: Executor,
    batching: ContinuousBatching,
    *,
    resident_bytes: int,
    workspace_bytes: int,
    capacity_bytes: int,
) -> MemoryAccount:
    """What is held now of a device of `capacity_bytes` and of host memory."""
    pages, plan, swap = batching.pages, executor.plan, batching.swap
    slots_bytes = plan.slots_used * arena.round_up(slot_bytes(executor.units, plan))
    owned = {
        "resident_bytes": align_up(resident_bytes),
        "homes_bytes": arena.weight_bytes - slots_bytes,
        "slots_bytes": slots_bytes,
        "kv_bytes": pages.num_sectors * arena.sector_bytes,
        "padding_bytes": pages.num_reserved * arena.sector_bytes,
        "workspace_bytes": workspace_bytes,
    }
    return MemoryAccount(
        device=DeviceAccount(**owned, unused_bytes=capacity_bytes - sum(owned.values())),
        host=HostAccount(
            weights_bytes=executor.store.num_bytes,
            kv_swap_bytes=swap.capacity_bytes,
            kv_swap_used_bytes=swap.used_bytes,
        ),
    )
