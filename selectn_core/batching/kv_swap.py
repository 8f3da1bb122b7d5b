"""Preempted requests' keys and values in host memory, over the device's own link."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator, CachePool
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from selectn_core.device import Device, Event
from selectn_core.errors import LinkError

logger = logging.getLogger(__name__)

SwapIsCheaper = Callable[[int, int], bool]
_COPY_ATTEMPTS = 3


class KvSwap(OffloadingManager):
    """Which requests are preempted is transformers' choice; whether their KV is kept, and how it moves, is made here.

    A preempted request whose KV is not kept is computed again from its tokens.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        scheduler: Scheduler,
        distributed_helper: DistributedHelper,
        device: Device,
        num_sectors: int,
        is_cheaper: SwapIsCheaper,
    ) -> None:
        """Takes `num_sectors` sectors of host memory that the link can read; 0 keeps nothing."""
        # Its own allocation fails where there is no accelerator, and knows nothing of the node's budget.
        super().__init__(cache, scheduler, 0.0, 1.0, None, distributed_helper)
        self._device, self._is_cheaper = device, is_cheaper
        self.num_preemptions = self.num_swapped = 0
        self.capacity_bytes = num_sectors * cache.bytes_per_sector
        if num_sectors == 0:
            return
        self._cpu_tensor = device.allocate_host(self.capacity_bytes)
        self._cpu_pool = CachePool(num_sectors, len(cache.cache_allocators), num_reserved_sectors=0)
        for name, allocator in cache.cache_allocators.items():
            self._cpu_pool.set_blocks_per_sector(allocator.index, allocator.blocks_per_sector)
            self._cpu_views[name] = self._cpu_tensor.view(-1, allocator.bytes_per_block)

    def release(self) -> None:
        """Drops the host memory, when nothing is to be copied any more."""
        self._cpu_views.clear()
        self._cpu_tensor = torch.empty(0, dtype=torch.uint8)

    @property
    def used_bytes(self) -> int:
        """Host bytes that hold KV now."""
        return sum(
            len(blocks) * self._allocator(name).bytes_per_block
            for tables in list(self._request_id_to_cpu_blocks.values())
            for name, blocks in tables.items()
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is free or belongs to one request that waits for it."""
        waiting = {state.request_id for state in self.scheduler.waiting_requests.values() if state.is_cpu_offloaded}
        assert waiting == set(self._request_id_to_cpu_blocks), "swapped KV without its request, or the reverse"
        if self._cpu_pool is None:
            return
        sectors = list(self._cpu_pool.free_sectors)
        for name, allocator in self.cache.cache_allocators.items():
            trees = self._cpu_pool._free_blocks[allocator.index].trees.values()
            blocks = [block for leaves in trees for block in leaves]
            for tables in self._request_id_to_cpu_blocks.values():
                blocks.extend(tables.get(name, ()))
            assert len(blocks) == len(set(blocks)), "a block of swapped KV in two states"
            held = {block // allocator.blocks_per_sector for block in blocks}
            assert len(blocks) == len(held) * allocator.blocks_per_sector, "blocks of swapped KV have been lost"
            sectors.extend(held)
        assert sorted(sectors) == list(range(self._num_sectors)), "sectors of swapped KV have been lost"

    def preempt_newest(self) -> bool:
        """Preempts the running request that began last; False, and nothing has happened, where no other would be left.

        Between steps. Cached prefixes go too, and new requests wait until a running one finishes, as they do after
        every preemption.
        """
        scheduler, cache = self.scheduler, self.cache
        if len(scheduler.active_requests) < 2:
            return False
        newest = next(reversed(scheduler.active_requests.values()))
        # Transformers preempts requests that starve, until what the others lack can be stored: here one starves, and
        # nothing can.
        scheduler.starved_requests = [(newest, 1)]
        cache.count_storable_requests = lambda blocks_needed: -1
        try:
            self.offload_requests()
        finally:
            del cache.count_storable_requests
            scheduler.starved_requests = []
        return True

    def restore_scheduled_requests(self, requests_in_batch: list[FutureRequestState]) -> None:
        """Copies back the KV of scheduled requests that have some in host memory. Raises LinkError."""
        for scheduled in requests_in_batch:
            state = scheduled.state
            if not state.is_cpu_offloaded:
                continue
            for name, host_blocks in self._request_id_to_cpu_blocks[state.request_id].items():
                allocator = self._allocator(name)
                device_blocks = allocator.block_table[state.request_id]
                self._copy(self._cpu_views[name], host_blocks, allocator._copy_view, device_blocks)
            self.free_request_cpu_cache(state)
            if self.cache.use_prefix_sharing:  # the blocks are new, and are hashed when the step is over
                for name, allocator in self.cache.cache_allocators.items():
                    num_complete = state.position_offset // allocator.tokens_per_page
                    scheduled.complete_blocks[name] = scheduled.complete_blocks.get(name, 0) + num_complete

    def _offload_to_cpu(
        self, victims: list[RequestState], victim_block_tables: dict[str, dict[str, list[int]]]
    ) -> set[str]:
        """Called with preempted requests, whose blocks are free but not yet used again: returns those it has kept."""
        self.num_preemptions += len(victims)
        kept = {state.request_id for state in victims if self._keep(state, victim_block_tables[state.request_id])}
        self.num_swapped += len(kept)
        return kept

    def _keep(self, state: RequestState, tables: dict[str, list[int]]) -> bool:
        counts = {name: len(blocks) for name, blocks in tables.items() if blocks}
        num_bytes = sum(count * self._allocator(name).bytes_per_block for name, count in counts.items())
        if self._cpu_pool is None or not counts or not self._is_cheaper(state.position_offset, num_bytes):
            return False
        # Transformers does so after it has counted on the blocks that this takes away.
        self._cpu_pool.try_to_free_sectors()
        host_blocks = self._reserve_cpu_blocks(counts)
        if host_blocks is None:
            return False
        self._request_id_to_cpu_blocks[state.request_id] = host_blocks
        state.is_cpu_offloaded = True
        try:
            for name, blocks in host_blocks.items():
                self._copy(self._allocator(name)._copy_view, tables[name], self._cpu_views[name], blocks)
        except LinkError as error:
            logger.warning("a preempted request will be computed again, its KV could not be kept: %s", error)
            self.free_request_cpu_cache(state)
            return False
        return True

    def _copy(
        self, source: torch.Tensor, source_rows: Sequence[int], target: torch.Tensor, target_rows: Iterable[int]
    ) -> None:
        """Copies rows, which are whole blocks, and makes later compute wait until they are there."""
        rows = [(source[s], target[t]) for s, t in zip(source_rows, target_rows, strict=False)]
        now = self._device.record()
        copies = [self._device.copy_async(*pair, after=now) for pair in rows]
        for copy, pair in zip(copies, rows, strict=True):
            self._wait(copy, pair)

    def _wait(self, copy: Event, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        for attempt in range(1, _COPY_ATTEMPTS + 1):
            try:
                self._device.wait(copy)
                return
            except LinkError as error:
                if attempt == _COPY_ATTEMPTS:
                    raise
                logger.warning("copying a block of KV again: %s", error)
                copy = self._device.copy_async(*pair)

    def _allocator(self, name: str) -> CacheAllocator:
        return self.cache.cache_allocators[name]

    @property
    def _num_sectors(self) -> int:
        return self.capacity_bytes // self.cache.bytes_per_sector
