"""The one place that touches private names of transformers' continuous batching.

tests/unit/test_private_names.py fails, naming the culprit, when an upgrade moves one of them. What this module adds
to a `ContinuousBatchingManager`: callbacks before a step is scheduled, when it is planned and when it is over,
per-request sampling, the per-request attention, outputs handed to a callback, a KV cache that lives in the device's
memory and grows and shrinks there, and preempted requests' KV in host memory.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import (
    ATTN_TYPE_TO_ALLOCATOR,
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.cache_allocators.cache_pool import RegularTrees
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import find_num_key_value_heads

from selectn_core.attention import ATTENTION_NAME, make_segments
from selectn_core.config import BatchConfig
from selectn_core.device import Device
from selectn_core.kv_geometry import BlockGeometry, KvGeometry
from selectn_core.sampling import SamplingParams, perturb_for_argmax
from selectn_core.steps import StepShape

__all__ = ["Callbacks", "ContinuousBatching", "GenerationOutput", "KvPages", "kv_geometry"]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the generation thread calls, in the order of a step.

    `before_schedule` comes when no step is under way, so that KV pages may move; it returns whether new requests may
    begin. `on_step_planned` comes when the next step is known and its inputs are not yet laid out: pages may still
    move.
    """

    before_schedule: Callable[[], bool]
    on_step_planned: Callable[[StepShape], None]
    on_step_done: Callable[[StepShape, float], None]
    on_output: Callable[[GenerationOutput], None]


class ContinuousBatching:
    """Transformers' continuous batching over one model and one device's memory."""

    def __init__(
        self, model: PreTrainedModel, config: BatchConfig, device: Device, callbacks: Callbacks, *, num_sectors: int
    ) -> None:
        """Builds a KV cache of at most `num_sectors` sectors in `device`'s memory.

        Raises DeviceMemoryExceeded if it does not fit.
        """
        self._model, self._callbacks = model, callbacks
        self._step: tuple[StepShape, float] | None = None
        self._is_draining = False
        self.geometry = kv_geometry(model, config.page_size)
        self._manager = _new_manager(model, config, self.geometry, num_sectors)
        self._manager.output_router = _CallbackRouter(callbacks.on_output)
        self._manager.logit_processor = _SamplingProcessors()
        model.set_attn_implementation(ATTENTION_NAME)
        self._segments_hook = model.register_forward_pre_hook(_add_segments, with_kwargs=True)
        self._build_processor()
        self.pages = KvPages(self._processor.cache, device, num_sectors)

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int],
        seed: int,
    ) -> bool:
        """Queues a request; False if the generation thread cannot take it (it failed or is stopping)."""
        accepted = self._manager.add_request(
            list(prompt_ids),
            request_id=request_id,
            max_new_tokens=params.max_tokens,
            streaming=True,
            eos_token_id=list(eos_ids) or -1,
            sampling=(params, seed),
        )
        return accepted is not None

    def cancel(self, request_id: str) -> None:
        """Drops a request before the next step; no output follows."""
        self._manager.cancel_request(request_id)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> threading.Thread:
        """Starts (or after a failure restarts) the generation thread and returns it."""
        self._manager.start()
        thread = self._manager._generation_thread
        assert thread is not None
        return thread

    @property
    def fatal_error(self) -> Exception | None:
        """What ended the generation thread, if it failed."""
        return self._manager.background_thread_status.fatal_error

    def close(self) -> None:
        """Fails what is left, ends the generation thread and unhooks the model."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._segments_hook.remove()
        self._model.set_attn_implementation("sdpa")

    # -- capacity -----------------------------------------------------------------------------------------------

    @property
    def num_active(self) -> int:
        """Requests that hold KV cache now."""
        return len(self._processor.scheduler.active_requests)

    def check_integrity(self) -> None:
        """Raises AssertionError unless all KV is free again; call it when no request is left."""
        scheduler = self._processor.scheduler
        assert not scheduler.active_requests, "requests are still active"
        assert not scheduler.waiting_requests, "requests are still waiting"
        self.pages.evict_cached()
        assert self.pages.num_free == self.pages.num_sectors, "KV blocks have leaked"

    # -- construction -------------------------------------------------------------------------------------------

    def _build_processor(self) -> None:
        """Builds cache and processor now, through a scheduler class that is registered only for that moment."""
        key = f"selectn-{uuid.uuid4().hex}"
        SCHEDULER_MAPPING[key] = partial(_ObservedScheduler, self._before_schedule, self._begin_step)
        self._manager.continuous_batching_config.scheduler_type = key
        try:
            self._manager.warmup()
        finally:
            del SCHEDULER_MAPPING[key]
        processor = self._manager.batch_processor
        assert processor is not None
        update_batch = processor.update_batch

        def update_and_record() -> None:
            update_batch()
            self._end_step()

        processor.update_batch = update_and_record
        self._processor = processor

    def _before_schedule(self) -> None:
        scheduler, capacity = self._processor.scheduler, self.pages.num_sectors
        was_draining, self._is_draining = self._is_draining, not self._callbacks.before_schedule()
        if self._is_draining:
            scheduler.block_new_requests = True
        elif was_draining or self.pages.num_sectors > capacity or not scheduler.active_requests:
            # A preemption blocks new requests until one finishes, even where the others have been cancelled or memory
            # has grown since.
            scheduler.block_new_requests = False

    def _begin_step(self, shape: StepShape, started_s: float) -> None:
        self._step = (shape, started_s)
        self._callbacks.on_step_planned(shape)

    def _end_step(self) -> None:
        if self._step is not None:
            shape, started_s = self._step
            self._step = None
            self._callbacks.on_step_done(shape, time.perf_counter() - started_s)


class _ObservedScheduler(FIFOScheduler):
    """First come first served, with a word before it plans a step, and one about what the step is before it runs."""

    def __init__(
        self, before: Callable[[], None], on_planned: Callable[[StepShape, float], None], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._before, self._on_planned = before, on_planned

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        started_s = time.perf_counter()
        self._before()
        planned = super().schedule_batch(token_budget, cache_budget)
        if planned[0]:
            self._on_planned(_shape(planned[0]), started_s)
        return planned


def _shape(batch: Sequence[FutureRequestState]) -> StepShape:
    return StepShape(
        num_tokens=sum(request.query_length for request in batch),
        num_requests=len(batch),
        num_decodes=sum(request.query_length == 1 and request.state.position_offset > 0 for request in batch),
        kv_tokens=sum(request.state.position_offset + request.query_length for request in batch),
    )


class _CallbackRouter(OutputRouter):
    """Hands every output to one callback on the generation thread."""

    def __init__(self, on_output: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._on_output = on_output

    def deliver(self, output: GenerationOutput) -> None:
        self._on_output(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._on_output(output)


class _SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """Per-request sampling in one pass, so that greedy and sampled requests share a batch."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._rows: list[tuple[SamplingParams, int, int]] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        if set(kwargs) != {"sampling"}:
            raise ValueError(f"expected the one keyword 'sampling', got {sorted(kwargs)}")

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        self._rows = []
        for request in requests_in_batch:
            if request.has_new_token:
                state = request.state
                params, seed = state.logit_processor_kwargs["sampling"]
                # A preempted request comes back with its tokens in the prompt: the sum is its position still.
                self._rows.append((params, seed, len(state.initial_tokens) + len(state.generated_tokens)))
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        if not self._rows:  # a chunk of prefill alone: nobody gets a token in this step
            return scores
        params, seeds, positions = zip(*self._rows, strict=True)
        return perturb_for_argmax(scores, params, seeds, positions)


def _new_manager(
    model: PreTrainedModel, config: BatchConfig, geometry: KvGeometry, num_sectors: int
) -> ContinuousBatchingManager:
    # The manager accepts sdpa, eager and flash only; the attention is switched after it has looked.
    model.set_attn_implementation("sdpa")
    return model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=config.page_size,
            # In blocks of every layer's tokens, which is not what a block is where attention types differ.
            num_blocks=max(1, num_sectors * geometry.sector_bytes // _bytes_of_a_page_in_every_layer(model, config)),
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=config.max_requests,
            max_blocks_per_request=0,
            allow_block_sharing=config.prefix_sharing,
            max_memory_percent=1e9,  # what fits is known here, to the byte
            use_async_batching=False,  # a step's plan is applied before it runs, not one step ahead
            use_cuda_graph=False,  # a replayed graph does not call hooks
            auto_switch_to_flash=False,
        ),
    )


def _add_segments(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gives the attention of every layer its segments, computed once per step."""
    cache: PagedAttentionCache | None = kwargs.get("cache")
    if cache is None:
        return None
    query_bounds = kwargs["cu_seq_lens_q"].tolist()
    by_type = {
        name: make_segments(
            query_bounds,
            kwargs["cu_seq_lens_k"][name].tolist(),
            sliding_window=getattr(allocator, "sliding_window", None),
            device=kwargs["input_ids"].device,
        )
        for name, allocator in cache.cache_allocators.items()
    }
    num_layers = len(cache.layer_to_allocator)
    kwargs["segments"] = [by_type[cache.layer_to_allocator[i].layer_type] for i in range(num_layers)]
    return args, kwargs


# -- the KV cache in an arena ---------------------------------------------------------------------------------------


def kv_geometry(model: PreTrainedModel, page_size: int) -> KvGeometry:
    """The sectors and blocks that a `PagedAttentionCache` of this model will have."""
    allocators = _allocators(model, page_size)
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


def _allocators(model: PreTrainedModel, page_size: int) -> list[CacheAllocator]:
    config = model.config.get_text_config()
    return [
        ATTN_TYPE_TO_ALLOCATOR[attention_type](
            index=index,
            config=config,
            num_key_value_heads=find_num_key_value_heads(config),
            cache_dtype=model.dtype,
            page_size=page_size,
            layer_indices=layers,
            allow_block_sharing=False,
        )
        for index, (attention_type, layers) in enumerate(group_layers_by_attn_type(config).items())
    ]


def _bytes_of_a_page_in_every_layer(model: PreTrainedModel, config: BatchConfig) -> int:
    return sum(allocator.bytes_per_block for allocator in _allocators(model, config.page_size))


class KvPages:
    """The cache's sectors in a device's memory, of which any range can be taken away and given back.

    `memory` is uint8 [(num_reserved + capacity) * sector_bytes]. Sectors are numbered from 0 here; transformers
    counts the reserved ones too, which padding reads from and writes to.
    """

    num_reserved = 2

    def __init__(self, cache: PagedAttentionCache, device: Device, num_sectors: int) -> None:
        """Puts the cache, of `num_sectors`, into memory of `device`; what transformers allocated is given back first.

        Raises DeviceMemoryExceeded.
        """
        self._cache, self._pool = cache, cache.pool
        self._allocators: list[CacheAllocator] = list(cache.cache_allocators.values())
        self.sector_bytes = cache.bytes_per_sector
        self._all = range(self.num_reserved, self.num_reserved + num_sectors)
        self._mine = set(self._all)
        cache.num_sectors = num_sectors
        self.memory = self._move(device)
        # Transformers' own would hand out every sector again, those that hold weights too.
        self._pool.reset = self._reset_pool
        self._pool.reset()

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

        Returns False, with every request as it was, where the rest of the cache cannot hold them.
        """
        wanted = {sector + self.num_reserved for sector in sectors}
        assert wanted <= self._mine, "sectors that the cache does not have"
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
        cache.cache_tensor = None
        for allocator in self._allocators:
            allocator.cache_tensor = allocator._copy_view = None
            allocator._kv_token_views, allocator._kv_page_views = {}, {}
        cache.cache_tensor = device.allocate(num_bytes, "the KV cache").zero_()
        for allocator in self._allocators:
            allocator.register_cache_tensor(
                cache.bytes_per_sector, cache.num_sectors * cache.bytes_per_sector, cache.cache_tensor, cache.pool
            )
        return cache.cache_tensor
