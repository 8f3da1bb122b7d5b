"""The KV cache's pages in an arena: sectors that weights can take away and give back."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from selectn_core.memory.sector_set import SectorSet

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
        self._mine = SectorSet(self._all.stop, self._all)
        self._free = SectorSet(self._all.stop)  # transformers' pool takes from it, and puts back
        cache.num_sectors = num_sectors
        self.memory = self._move(device)
        self._is_released = False
        # Transformers' own would hand out every sector again, those that hold weights too.
        self._pool.reset = self._reset_pool
        self._pool.try_to_free_sectors = self._free_whole_sectors
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
        """Sectors with blocks of running requests. Any thread may ask."""
        return max(0, self.num_sectors - len(self._free) - sum(self._num_idle(each) for each in self._allocators))

    def evict_cached(self) -> None:
        """Forgets the keys of finished requests, kept for their prefix."""
        self._cache.evict_cached_blocks()

    def take(self, sectors: range) -> bool:
        """Gives up `sectors`, copying the blocks that live there elsewhere; cached prefixes go first if need be.

        Returns False, with every request as it was, where the rest of the cache cannot hold them. `num_in_use` never
        grows.
        """
        wanted = self._numbered(sectors)
        assert self._mine.count(wanted) == len(wanted), "sectors that the cache does not have"
        self._pool.try_to_free_sectors()
        if self._free.count(wanted) < len(wanted) and not self._move_out_of(wanted):
            return False
        self._free.remove(wanted)
        self._mine.remove(wanted)
        self._cache.num_sectors = len(self._mine)
        return True

    def give(self, sectors: range) -> None:
        """Adds `sectors` to the cache."""
        new = self._numbered(sectors)
        assert not self._mine.count(new), "sectors that the cache has already"
        self._mine.add(new)
        self._free.add(new)  # the highest is taken first: pages fill the arena from the top, away from the weights
        self._cache.num_sectors = len(self._mine)

    def check_integrity(self, others: set[int]) -> None:
        """Raises AssertionError unless every sector is one of `others`, free, or some attention type's.

        A block of the latter is exactly one of free, cached, or in the tables of as many requests as its count says.
        """
        free, others = set(self._free), {sector + self.num_reserved for sector in others}
        assert self._pool.free_sectors is self._free, "the pool takes from elsewhere"
        assert len(free) == len(self._free), "free sectors are miscounted"
        states, num_in_use = [free, others], 0
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
            num_in_use += len(self._sectors_of(allocator, owners))
        assert num_in_use == self.num_in_use, "sectors in use are miscounted"
        assert sum(map(len, states)) == len(set().union(*states)), "a sector in two states"
        assert set().union(*states) == set(self._all), "sectors without a state"
        assert set().union(*states) - others == set(self._mine), "the cache uses sectors that are not its own"

    def _numbered(self, sectors: range) -> range:
        """As transformers counts them."""
        return range(sectors.start + self.num_reserved, sectors.stop + self.num_reserved)

    def _move_out_of(self, wanted: range) -> bool:
        """Has the `wanted` sectors, of which some are not free, hold nothing; cached prefixes go first if need be."""
        several = [allocator for allocator in self._allocators if allocator.blocks_per_sector > 1]
        if any(_places(table, _blocks_of(wanted, a)) for a in several for table in a.block_table.values()):
            # Blocks that moved in beside cached ones would bring sectors into use that nothing running had a part of.
            self.evict_cached()
        if self._try_to_move_out_of(wanted):
            return True
        self.evict_cached()
        return self._try_to_move_out_of(wanted)

    def _try_to_move_out_of(self, wanted: range) -> bool:
        self._pool.try_to_free_sectors()
        moves = [_Move(allocator, self._free_blocks(allocator), wanted) for allocator in self._allocators]
        if sum(move.num_new for move in moves) > len(self._free) - self._free.count(wanted):
            return False
        self._free.remove(wanted)
        for move in moves:
            self._move_blocks(move, wanted)
        return True

    def _move_blocks(self, move: _Move, wanted: range) -> None:
        """Copies blocks out of the `wanted` sectors."""
        allocator, free = move.allocator, self._free_blocks(move.allocator)
        for sector in [sector for sector in free.trees if sector in wanted]:
            free._length -= len(free.trees.pop(sector))
        for _ in range(move.num_new):
            self._pool.allocate_sector(allocator.index)
        if move.blocks:
            targets = self._pool.get_free_blocks(allocator.index, len(move.blocks))
            allocator.copy_blocks(move.blocks, targets)
            move.rename(targets)

    def _num_idle(self, allocator: CacheAllocator) -> int:
        """Sectors of an attention type whose blocks are all free, or kept for their prefix alone."""
        free, cached, per_sector = (
            self._free_blocks(allocator),
            allocator.ledger.cached_blocks,
            allocator.blocks_per_sector,
        )
        if per_sector == 1:
            return len(free) + len(cached)
        num_idle = Counter({sector: len(leaves) for sector, leaves in list(free.trees.items())})
        num_idle.update(block // per_sector for block in list(cached))
        return sum(number == per_sector for number in num_idle.values())

    def _sectors_of(self, allocator: CacheAllocator, blocks: Iterable[int]) -> set[int]:
        return {block // allocator.blocks_per_sector for block in blocks}

    def _free_blocks(self, allocator: CacheAllocator) -> RegularTrees:
        return self._pool._free_blocks[allocator.index]

    def _reset_pool(self) -> None:
        type(self._pool).reset(self._pool)
        self._free = SectorSet(self._all.stop)
        self._free.extend(self._mine)
        self._pool.free_sectors = self._free

    def _free_whole_sectors(self) -> None:
        """What the pool's own does, without asking the sectors one by one for their place."""
        for allocator in self._allocators:
            self._free.extend(self._free_blocks(allocator).delete_full_trees())

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


class _Move:
    """The blocks of one attention type that have to leave some sectors, and where they are known by their numbers."""

    def __init__(self, allocator: CacheAllocator, free: RegularTrees, wanted: range) -> None:
        """`num_new` sectors, beside what `free` has elsewhere, are needed for `blocks`."""
        self.allocator, blocks = allocator, _blocks_of(wanted, allocator)
        tables = allocator.block_table.values()
        self._places = [(table, places) for table in tables if (places := _places(table, blocks))]
        cached = [block for block in allocator.ledger.cached_blocks if block in blocks]
        self.blocks = sorted({*cached, *(table[i] for table, places in self._places for i in places)})
        spare = len(free) - sum(len(leaves) for sector, leaves in free.trees.items() if sector in wanted)
        self.num_new = max(0, -(-(len(self.blocks) - spare) // allocator.blocks_per_sector))

    def rename(self, targets: Sequence[int]) -> None:
        """Has everything that names one of the blocks name its target."""
        moved, ledger = dict(zip(self.blocks, targets, strict=True)), self.allocator.ledger
        for table, places in self._places:
            for i in places:
                table[i] = moved[table[i]]
        for names in (ledger.shared_ref_counts, ledger.block_to_hash, ledger.cached_blocks):
            for block, target in moved.items() if names else ():
                if block in names:
                    names[target] = names.pop(block)
        for target in targets:
            if target in ledger.block_to_hash:
                ledger.hash_to_block[ledger.block_to_hash[target]] = target


def _blocks_of(sectors: range, allocator: CacheAllocator) -> range:
    return range(sectors.start * allocator.blocks_per_sector, sectors.stop * allocator.blocks_per_sector)


def _places(table: Sequence[int], blocks: range) -> list[int]:
    """Where in a request's table any of `blocks` are."""
    first, end = blocks.start, blocks.stop
    return [i for i, block in enumerate(table) if first <= block < end]
