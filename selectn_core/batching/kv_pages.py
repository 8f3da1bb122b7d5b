"""The KV cache's pages in an arena: sectors that weights can take away and give back."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching.cache import (
    ATTN_TYPE_TO_ALLOCATOR,
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_pool import RegularTrees

from selectn_core.batching.probe import KvShape
from selectn_core.device import Device
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry

_being_patched = threading.Lock()


def kv_geometry(model: PreTrainedModel, page_size: int, shapes: Mapping[str, KvShape]) -> KvGeometry:
    """The sectors and blocks that a `PagedAttentionCache` of this model will have `with_shapes`."""
    allocators = _allocators(model, page_size, shapes)
    sector_bytes = math.lcm(*(allocator.bytes_per_block for allocator in allocators), 128)
    return KvGeometry(
        sector_bytes=sector_bytes,
        types=tuple(
            BlockGeometry(
                page_size=allocator.tokens_per_page,
                blocks_per_sector=sector_bytes // allocator.bytes_per_block,
                sliding_window=getattr(allocator, "sliding_window", None),
            )
            for allocator in allocators
        ),
    )


@contextmanager
def with_shapes(shapes: Mapping[str, KvShape]) -> Iterator[None]:
    """Meanwhile caches are made with rows of these shapes.

    Transformers looks for one shape in the configuration, for all attention types, and finds none or another one where
    types differ, or values are not as wide as keys.
    """
    widest = _widest(shapes)
    ours = {
        "find_num_key_value_heads": lambda config: widest.num_heads,
        "find_head_dim": lambda config: widest.head_dim,
    }
    with _being_patched:
        allocators, finders = dict(ATTN_TYPE_TO_ALLOCATOR), {name: getattr(cache_module, name) for name in ours}
        ATTN_TYPE_TO_ALLOCATOR.update({name: _shaped(allocators[name], shape) for name, shape in shapes.items()})
        vars(cache_module).update(ours)
        try:
            yield
        finally:
            vars(cache_module).update(finders)
            ATTN_TYPE_TO_ALLOCATOR.update(allocators)


class WithoutMemory(TorchFunctionMode):
    """Caches that are made meanwhile get tensors without memory.

    Transformers allocates a whole cache of its own, which `KvPages` replaces: a device need not have room for both.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.zeros and kwargs and kwargs.get("dtype") is torch.uint8:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **(kwargs or {}))


def _widest(shapes: Mapping[str, KvShape]) -> KvShape:
    return KvShape(
        num_heads=max(shape.num_heads for shape in shapes.values()),
        head_dim=max(shape.head_dim for shape in shapes.values()),
    )


def _shaped(allocator_class: type[CacheAllocator], shape: KvShape) -> Callable[..., CacheAllocator]:
    def make(*, config: Any, num_key_value_heads: int, **kwargs: Any) -> CacheAllocator:
        window = getattr(config, "sliding_window", None)
        return allocator_class(
            config=SimpleNamespace(head_dim=shape.head_dim, sliding_window=window),
            num_key_value_heads=shape.num_heads,
            **kwargs,
        )

    return make


def _allocators(model: PreTrainedModel, page_size: int, shapes: Mapping[str, KvShape]) -> list[CacheAllocator]:
    config = model.config.get_text_config()
    with _being_patched:  # by an engine that another thread builds
        classes = dict(ATTN_TYPE_TO_ALLOCATOR)
    return [
        _shaped(classes[attention_type], shapes[attention_type])(
            index=index,
            config=config,
            num_key_value_heads=0,
            cache_dtype=model.dtype,
            page_size=page_size,
            layer_indices=layers,
            allow_block_sharing=False,
        )
        for index, (attention_type, layers) in enumerate(group_layers_by_attn_type(config).items())
    ]


def bytes_of_a_page_in_every_layer(model: PreTrainedModel, page_size: int, shapes: Mapping[str, KvShape]) -> int:
    """What transformers calls a block when it is told how many to have: `with_shapes` as wide as the widest."""
    widest = _widest(shapes)
    page = FullAttentionCacheAllocator.get_bytes_per_page(widest.num_heads, widest.head_dim, model.dtype, page_size)
    return int(model.config.get_text_config().num_hidden_layers * page)


class KvPages:
    """The cache's sectors in a device's memory, of which any range can be taken away and given back.

    `memory` is uint8 [(num_reserved + capacity) * sector_bytes]. Sectors are numbered from 0 here; transformers
    counts the reserved ones too, which padding reads from and writes to.
    """

    num_reserved = 2

    def __init__(self, cache: PagedAttentionCache, device: Device, num_sectors: int) -> None:
        """Puts the cache, of `num_sectors`, into memory of `device`. It must have been made `WithoutMemory`.

        Raises DeviceMemoryExceeded.
        """
        self._cache, self._pool, self._device = cache, cache.pool, device
        self._allocators: list[CacheAllocator] = list(cache.cache_allocators.values())
        self.sector_bytes = cache.bytes_per_sector
        self._all = range(self.num_reserved, self.num_reserved + num_sectors)
        self._mine = set(self._all)
        cache.num_sectors = num_sectors
        self.memory = self._move(device)
        self._is_released = False
        # Transformers' own would hand out every sector again, those that hold weights too.
        self._pool.reset = self._reset_pool
        self._pool.reset()

    def release(self) -> None:
        """Gives the memory back, though others refer to the cache; nothing can be computed with it then. Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._forget_memory()
            memory, self.memory = self.memory, torch.empty(0, dtype=torch.uint8)
            self._device.free(memory)

    @property
    def num_sectors(self) -> int:
        """Sectors that the cache has now."""
        return len(self._mine)

    @property
    def num_free(self) -> int:
        """Sectors of which no block is in use or kept for its prefix."""
        self._pool.try_to_free_sectors()
        return self._pool.num_free_sectors

    @property
    def num_in_use(self) -> int:
        """Sectors with blocks of running requests."""
        return sum(len(self._sectors_of(a, self._live_blocks(a))) for a in self._allocators)

    @property
    def num_cached(self) -> int:
        """Sectors with blocks that are kept for their prefix alone."""
        return sum(
            len(self._sectors_of(a, a.ledger.cached_blocks) - self._sectors_of(a, self._live_blocks(a)))
            for a in self._allocators
        )

    def evict_cached(self) -> None:
        """Forgets the keys of finished requests, kept for their prefix."""
        self._cache.evict_cached_blocks()

    def take(self, sectors: range) -> bool:
        """Gives up `sectors`, copying the blocks that live there elsewhere; cached prefixes go first if need be.

        Returns False, with every request as it was, where the rest of the cache cannot hold them. `num_in_use` never
        grows.
        """
        wanted = {sector + self.num_reserved for sector in sectors}
        assert wanted <= self._mine, "sectors that the cache does not have"
        several = [allocator for allocator in self._allocators if allocator.blocks_per_sector > 1]
        if any(wanted & self._sectors_of(a, self._live_blocks(a)) for a in several):
            # Blocks that moved in beside cached ones would bring sectors into use that nothing running had a part of.
            self.evict_cached()
        if not self._move_out_of(wanted):
            self.evict_cached()
            if not self._move_out_of(wanted):
                return False
        self._mine -= wanted
        self._cache.num_sectors = len(self._mine)
        return True

    def give(self, sectors: range) -> None:
        """Adds `sectors` to the cache."""
        new = {sector + self.num_reserved for sector in sectors}
        assert not new & self._mine, "sectors that the cache has already"
        self._mine |= new
        self._cache.num_sectors = len(self._mine)
        # Ascending, and taken from the end: pages fill the arena from the top, away from the weights.
        self._pool.free_sectors = sorted([*self._pool.free_sectors, *new])

    def check_integrity(self, others: set[int]) -> None:
        """Raises AssertionError unless every sector is one of `others`, free, or some attention type's.

        A block of the latter is exactly one of free, cached, or in the tables of as many requests as its count says.
        """
        free, others = set(self._pool.free_sectors), {sector + self.num_reserved for sector in others}
        assert len(free) == len(self._pool.free_sectors), "a sector is free twice"
        states = [free, others]
        for allocator in self._allocators:
            owners = Counter(block for table in allocator.block_table.values() for block in table)
            cached, ledger = set(allocator.ledger.cached_blocks), allocator.ledger
            unused = [leaf for leaves in self._free_blocks(allocator).trees.values() for leaf in leaves]
            assert len(unused) == len(set(unused)) == len(self._free_blocks(allocator)), "a block is free twice"
            assert not owners.keys() & cached, "a block in use is kept as if it were not"
            assert not (owners.keys() | cached) & set(unused), "a block in use is free"
            shared = {block: count for block, count in owners.items() if count > 1}
            assert shared == ledger.shared_ref_counts, "shared blocks are miscounted"
            assert ledger.block_to_hash == {block: key for key, block in ledger.hash_to_block.items()}
            assert cached <= ledger.block_to_hash.keys() <= owners.keys() | cached, "a hash of a block that is gone"
            blocks = owners.keys() | cached | set(unused)
            sectors = self._sectors_of(allocator, blocks)
            assert len(blocks) == len(sectors) * allocator.blocks_per_sector, "blocks have been lost"
            states.append(sectors)
        assert sum(map(len, states)) == len(set().union(*states)), "a sector in two states"
        assert set().union(*states) == set(self._all), "sectors without a state"
        assert set().union(*states) - others == self._mine, "the cache uses sectors that are not its own"

    def _move_out_of(self, wanted: set[int]) -> bool:
        self._pool.try_to_free_sectors()
        outside = sorted(set(self._pool.free_sectors) - wanted)
        moves, num_missing = [], []
        for allocator in self._allocators:
            held = self._live_blocks(allocator) | allocator.ledger.cached_blocks.keys()
            blocks = sorted(block for block in held if block // allocator.blocks_per_sector in wanted)
            trees = self._free_blocks(allocator).trees
            spare = sum(len(leaves) for sector, leaves in trees.items() if sector not in wanted)
            moves.append((allocator, blocks))
            num_missing.append(max(0, -(-(len(blocks) - spare) // allocator.blocks_per_sector)))
        if sum(num_missing) > len(outside):
            return False
        self._pool.free_sectors = outside
        for (allocator, blocks), missing in zip(moves, num_missing, strict=True):
            self._move_blocks(allocator, blocks, missing, wanted)
        return True

    def _move_blocks(self, allocator: CacheAllocator, blocks: list[int], num_new: int, wanted: set[int]) -> None:
        """Copies `blocks` out of the `wanted` sectors, and to there `num_new` more sectors for them."""
        free = self._free_blocks(allocator)
        for sector in wanted & free.trees.keys():
            free._length -= len(free.trees.pop(sector))
        for _ in range(num_new):
            self._pool.allocate_sector(allocator.index)
        if not blocks:
            return
        targets = self._pool.get_free_blocks(allocator.index, len(blocks))
        allocator.copy_blocks(blocks, targets)
        moved, ledger = dict(zip(blocks, targets, strict=True)), allocator.ledger
        for table in allocator.block_table.values():
            table[:] = [moved.get(block, block) for block in table]
        for counts in (ledger.shared_ref_counts, ledger.block_to_hash, ledger.cached_blocks):
            renamed = {moved.get(block, block): value for block, value in counts.items()}
            counts.clear()
            counts.update(renamed)
        for key, block in ledger.hash_to_block.items():
            ledger.hash_to_block[key] = moved.get(block, block)

    def _live_blocks(self, allocator: CacheAllocator) -> set[int]:
        return {block for table in allocator.block_table.values() for block in table}

    def _sectors_of(self, allocator: CacheAllocator, blocks: Iterable[int]) -> set[int]:
        return {block // allocator.blocks_per_sector for block in blocks}

    def _free_blocks(self, allocator: CacheAllocator) -> RegularTrees:
        return self._pool._free_blocks[allocator.index]

    def _reset_pool(self) -> None:
        type(self._pool).reset(self._pool)
        self._pool.free_sectors = sorted(self._mine)

    def _move(self, device: Device) -> torch.Tensor:
        cache = self._cache
        num_bytes = (self.num_reserved + cache.num_sectors) * cache.bytes_per_sector
        self._forget_memory()
        cache.cache_tensor = device.allocate(num_bytes, "the KV cache").zero_()
        for allocator in self._allocators:
            allocator.register_cache_tensor(
                cache.bytes_per_sector, cache.num_sectors * cache.bytes_per_sector, cache.cache_tensor, cache.pool
            )
        return cache.cache_tensor

    def _forget_memory(self) -> None:
        self._cache.cache_tensor = None
        for allocator in self._allocators:
            allocator.cache_tensor = allocator._copy_view = None
            allocator._kv_token_views, allocator._kv_page_views = {}, {}
