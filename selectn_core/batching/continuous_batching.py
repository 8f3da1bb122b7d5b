"""Transformers' continuous batching, driven step by step.

What is added to a `ContinuousBatchingManager`: callbacks before a step is scheduled, when it is planned and when it is
over, per-request sampling, the per-request attention, outputs handed to a callback, a KV cache that lives in the
device's memory and grows and shrinks there (`pages`), and preempted requests' keys in host memory (`swap`).
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import (
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from selectn_core.batching.attention import ATTENTION_NAME
from selectn_core.batching.attention_path import attention_path
from selectn_core.batching.batch_inputs import BatchInputs
from selectn_core.batching.kv_pages import (
    KvPages,
    WithoutMemory,
    bytes_of_a_page_in_every_layer,
    kv_geometry,
    with_shapes,
)
from selectn_core.batching.kv_swap import KvSwap, SwapIsCheaper
from selectn_core.batching.probe import KvShape
from selectn_core.batching.sampler import NOT_FINITE, SamplingProcessors
from selectn_core.batching.scheduler import ObservedScheduler, to_compute
from selectn_core.config import BatchConfig
from selectn_core.device import Device
from selectn_core.latency.steps import Chunk, StepShape
from selectn_core.requests.sampling import SamplingParams

# Requests that are looked up in the prefix cache and have not begun: these count once, however often that is.
_MOST_LOOKED_UP = 64


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the generation thread calls, in the order of a step.

    `before_schedule` comes when no step is under way, so that KV pages may move; it returns which requests that hold no
    KV may begin, in their turn (None: all that wait). `token_budget` then says how many of the tokens that a step may
    have it should have.
    `on_step_planned` comes when the next step is known and its inputs are not yet laid out: pages may still move.
    `on_outputs` has what a step gave to all requests at once; failures may come beside.
    `swap_is_cheaper` decides, for a preempted request's tokens and bytes of KV, whether they go to host memory.
    """

    before_schedule: Callable[[], Sequence[str] | None]
    token_budget: Callable[[int], int]
    on_step_planned: Callable[[StepShape], None]
    on_step_done: Callable[[StepShape, float], None]
    on_outputs: Callable[[Sequence[GenerationOutput]], None]
    swap_is_cheaper: SwapIsCheaper


class ContinuousBatching:
    """Transformers' continuous batching over one model and one device's memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: BatchConfig,
        device: Device,
        callbacks: Callbacks,
        *,
        shapes: Mapping[str, KvShape],
        num_sectors: int,
        num_host_sectors: int = 0,
    ) -> None:
        """Builds a KV cache of `num_sectors` sectors in `device`'s memory, and `num_host_sectors` for swapping.

        `shapes` are what the model's attention types keep (`kv_shapes`).

        Raises DeviceMemoryExceeded if it does not fit.
        """
        self._model, self._device, self._callbacks = model, device, callbacks
        self._step: tuple[StepShape, float] | None = None
        self._is_own_step = False  # of requests that only this class knows
        self.prefix_queried_tokens = self.prefix_found_tokens = 0
        self.geometry = kv_geometry(model, config.page_size, shapes)
        self.plain_attention = model.config._attn_implementation
        windows = {"sliding_attention": getattr(model.config.get_text_config(), "sliding_window", None)}
        self.attention_paths = {
            name: attention_path(device.torch_device, model.dtype, shape, windows.get(name))
            for name, shape in shapes.items()
        }
        block_bytes = bytes_of_a_page_in_every_layer(model, config.page_size, shapes)
        # In transformers' blocks, of which sectors are no multiple: it may be one more, which is given back.
        num_blocks = max(1, math.ceil(num_sectors * self.geometry.sector_bytes / block_bytes))
        self._manager = _new_manager(model, config, num_blocks)
        self._router = self._manager.output_router = _CallbackRouter(callbacks.on_outputs)
        self._processors = self._manager.logit_processor = SamplingProcessors()
        model.set_attn_implementation(ATTENTION_NAME)
        with with_shapes(shapes), WithoutMemory():
            self._build_processor()
        self.pages = KvPages(self._processor.cache, device, num_sectors)
        try:
            self.swap = KvSwap(
                self._processor.cache,
                self._processor.scheduler,
                self._manager.distributed_helper,
                device,
                num_host_sectors,
                callbacks.swap_is_cheaper,
            )
        except BaseException:
            self.pages.release()
            raise
        self._processor.offloading_manager = self.swap

    @property
    def attention_name(self) -> str:
        """The name of how this attends: what is measured with it is not valid for another."""
        packed = sorted(name for name, path in self.attention_paths.items() if path.name == "packed")
        return ATTENTION_NAME + (f", packed: {', '.join(packed)}" if packed else "")

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

    def generate_now(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[torch.Tensor]:
        """Greedy generation on the calling thread, before `start`, unseen by the callbacks.

        Returns the logits of the tokens, [num_tokens, vocab_size] for each prompt; no KV is kept.
        """
        logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        params, callbacks = SamplingParams(max_tokens=num_tokens), self._callbacks
        self._callbacks = replace(
            callbacks,
            before_schedule=lambda: None,
            token_budget=lambda most: most,
            on_step_planned=lambda shape: None,
            on_step_done=lambda shape, duration_s: None,
        )
        self._processors.observe = lambda seed, row: logits[seed].append(row)
        try:
            for i, prompt in enumerate(prompts):
                self._manager.add_request(
                    list(prompt), request_id=f"now-{i}", max_new_tokens=num_tokens, sampling=(params, i)
                )
            while self._processor.prepare_next_batch():
                self._manager._generation_step()
                self._processor.update_batch()
        finally:
            self._processors.observe = None
            self._callbacks = callbacks
        self.check_integrity()  # which forgets cached prefixes
        self.prefix_queried_tokens = self.prefix_found_tokens = 0
        return [torch.stack(rows) for rows in logits]

    def run_step(self, requests: Sequence[tuple[int, int]], params: SamplingParams | None = None) -> None:
        """One step of requests with that many tokens, each after that many keys that were never computed.

        Greedy, where no `params` say how tokens are chosen. On the calling thread, before `start`. For what a step
        costs: its results mean nothing, and go nowhere.
        """
        for i, (num_tokens, num_past) in enumerate(requests):
            state = RequestState(
                request_id=f"step-{i}",
                initial_tokens=[0] * (num_past + num_tokens),
                max_new_tokens=1,
                eos_token_id=-1,
                logit_processor_kwargs={"sampling": (params or SamplingParams(), 0)},
            )
            state.position_offset, state.remaining_prefill_tokens = num_past, [0] * num_tokens
            self._processor.scheduler.add_waiting_request(state)
        self._is_own_step = True
        try:
            assert self._processor.prepare_next_batch()
        finally:
            self._is_own_step = False
        self._manager._generation_step()
        self._processor.update_batch()
        self.drop_requests()

    def drop_requests(self) -> None:
        """Ends every request, as an error would."""
        self._processor.fail_all_requests(RuntimeError("dropped"))

    def preempt_newest(self) -> bool:
        """Takes its KV from the running request that began last, to be kept in host memory or computed again later.

        On the generation thread, between steps. False where no other request would be left running.
        """
        return self.swap.preempt_newest()

    def cancel(self, request_id: str) -> None:
        """Drops a request before the next step; no output follows."""
        self._manager.cancel_request(request_id)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> threading.Thread:
        """Starts (or after a failure restarts) the generation thread and returns it."""
        # A step that has failed may still be computing, and its inputs are laid out anew at once.
        self._device.synchronize()
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
        self._model.set_attn_implementation(self.plain_attention)

    def release(self) -> None:
        """Gives back the memory of cache, inputs and swapped KV; after `close`, when no weights are in it any more.

        Transformers' objects and ours refer to each other. Memory of a device is not to wait for the garbage collector
        to find that nobody else does.
        """
        self.pages.release()
        self.swap.release()
        self._processors.observe = None
        self._processors.drop_step()
        processor = self._processor
        vars(processor).pop("update_batch", None)
        vars(processor.cache).pop("search_prefix_match", None)
        if processor.inputs_and_outputs is not None:
            vars(processor.inputs_and_outputs).clear()
        processor.inputs_and_outputs = processor.model_runner.inputs_and_outputs = None
        self._manager.batch_processor = None

    # -- capacity -----------------------------------------------------------------------------------------------

    @property
    def num_active(self) -> int:
        """Requests that hold KV cache now."""
        return len(self._processor.scheduler.active_requests)

    def progress(self) -> dict[str, Chunk]:
        """Of every request that holds KV cache, in turn, the prefill that is left; no tokens for those that decode."""
        states = self._processor.scheduler.active_requests.values()
        return {
            state.request_id: Chunk(
                0 if state.status == RequestStatus.DECODING else len(state.remaining_prefill_tokens),
                state.position_offset,
            )
            for state in states
        }

    def backlog(self) -> dict[str, Chunk]:
        """Of every other request, what to compute for its next token: one where its KV is in host memory."""
        return {
            state.request_id: Chunk(len(to_compute(state)), state.position_offset)
            for state in self._processor.scheduler.waiting_requests.values()
        }

    def check_integrity(self) -> None:
        """Raises AssertionError unless all KV is free again; call it when no request is left."""
        scheduler = self._processor.scheduler
        assert not scheduler.active_requests, "requests are still active"
        assert not scheduler.waiting_requests, "requests are still waiting"
        self.swap.check_integrity()
        assert self.swap.used_bytes == 0, "swapped KV has leaked"
        self.pages.evict_cached()
        assert self.pages.num_free == self.pages.num_sectors, "KV blocks have leaked"

    # -- construction -------------------------------------------------------------------------------------------

    def _build_processor(self) -> None:
        """Builds cache and processor now, through a scheduler class that is registered only for that moment."""
        key = f"selectn-{uuid.uuid4().hex}"
        SCHEDULER_MAPPING[key] = partial(
            ObservedScheduler, self._before_schedule, lambda most: self._callbacks.token_budget(most), self._begin_step
        )
        self._manager.continuous_batching_config.scheduler_type = key
        try:
            self._manager.warmup()
        finally:
            del SCHEDULER_MAPPING[key]
        processor = self._manager.batch_processor
        assert processor is not None
        update_batch = processor.update_batch

        def update_and_record() -> None:
            self._router.not_finite = self._not_finite()
            update_batch()
            self._drop_not_finite()
            self._end_step()

        processor.update_batch = update_and_record
        packed = {name for name, path in self.attention_paths.items() if path.name == "packed"}
        BatchInputs(processor.inputs_and_outputs, processor.cache, self._device, packed=packed)
        self._count_prefixes(processor.cache)
        self._processor = processor

    def _count_prefixes(self, cache: PagedAttentionCache) -> None:
        """Counts the prompt tokens that are looked up in the cache, and those that are there."""
        search, recent = cache.search_prefix_match, deque[str](maxlen=_MOST_LOOKED_UP)

        def search_and_count(request_id: str, prompt_ids: list[int]) -> int:
            found = search(request_id, prompt_ids)
            if request_id not in recent:  # one that finds no room is looked up again in the next step
                recent.append(request_id)
                self.prefix_queried_tokens += len(prompt_ids)
            self.prefix_found_tokens += found
            return found

        cache.search_prefix_match = search_and_count

    def _not_finite(self) -> set[str]:
        """The requests whose token was chosen among logits that are not finite: it means nothing."""
        requests, tokens, _ = self._processor.inputs_and_outputs.prepare_batch_update()
        with_token = [each.state.request_id for each in requests if each.has_new_token]
        return {with_token[row] for row in self._processors.rows_not_finite(tokens)}

    def _drop_not_finite(self) -> None:
        """Frees what such requests hold now, and forgets cached prefixes: theirs may be what is damaged."""
        scheduler, failed = self._processor.scheduler, self._router.not_finite
        self._router.not_finite = set()
        for request_id in failed & set(scheduler.active_requests):
            scheduler.finish_request(request_id)
            scheduler.block_new_requests = False
        if failed:
            self.pages.evict_cached()

    def _before_schedule(self) -> Sequence[str] | None:
        scheduler, capacity = self._processor.scheduler, self.pages.num_sectors
        beginning = self._callbacks.before_schedule()
        if self.pages.num_sectors > capacity or not scheduler.active_requests:
            # A preemption blocks new requests until one finishes, even where the others have been cancelled or memory
            # has grown since.
            scheduler.block_new_requests = False
        return None if self._is_own_step else beginning

    def _begin_step(self, shape: StepShape, started_s: float) -> None:
        self._step = (shape, started_s)
        self._callbacks.on_step_planned(shape)

    def _end_step(self) -> None:
        if self._step is not None:
            shape, started_s = self._step
            self._step = None
            self._callbacks.on_step_done(shape, time.perf_counter() - started_s)


class _CallbackRouter(OutputRouter):
    """Hands outputs to one callback on the generation thread, those of a step together."""

    def __init__(self, on_outputs: Callable[[Sequence[GenerationOutput]], None]) -> None:
        super().__init__()
        self._on_outputs = on_outputs
        self.not_finite: set[str] = set()  # of the step whose outputs come next, the requests that have failed

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs if self.not_finite else ():
            if output.request_id in self.not_finite and output.error is None:
                output.generated_tokens.pop()
                output.error, output.status = NOT_FINITE, RequestStatus.FAILED
        self._on_outputs(outputs)


def _new_manager(model: PreTrainedModel, config: BatchConfig, num_blocks: int) -> ContinuousBatchingManager:
    # The manager accepts transformers' own attention only: it is switched after the manager has looked.
    return model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=config.page_size,
            num_blocks=num_blocks,
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=config.max_requests,
            max_blocks_per_request=0,
            allow_block_sharing=config.prefix_sharing,
            max_memory_percent=1e9,  # what fits is known here, to the byte
            safety_margin=0.0,  # memory is counted to the end of every request that begins
            use_async_batching=False,  # a step's plan is applied before it runs, not one step ahead
            use_cuda_graph=False,  # a replayed graph does not call hooks
            auto_switch_to_flash=False,
        ),
    )
