"""One engine: a model, a device, continuous batching, and an executor whose interval may change at every iteration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from selectn_core.batching import Callbacks, ContinuousBatching, kv_geometry, kv_shapes
from selectn_core.config import EngineConfig, SloConfig
from selectn_core.control.guarantee import Guarantee
from selectn_core.control.steering import Steering
from selectn_core.device import Device, open_device, resolve_kind
from selectn_core.engine.accounts import MemoryAccount, account
from selectn_core.engine.capacity import (
    Capacity,
    TokenLimits,
    decode_step_s,
    latest,
    waiting_prefill_tokens,
)
from selectn_core.engine.device_budget import (
    arena_sectors,
    check_room,
    everything_bytes,
    host_sectors,
    out_of_memory,
)
from selectn_core.engine.fingerprint import fingerprint_of
from selectn_core.engine.link_needs import LinkNeeds, UnitDemand
from selectn_core.engine.measure_workspace import measure_workspace
from selectn_core.engine.request_lifecycle import RequestLifecycle
from selectn_core.engine.self_test import Limits, check_model, refusing
from selectn_core.engine.supervisor import Supervisor
from selectn_core.errors import RequestError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import StepLog, StepShape
from selectn_core.memory.arena import Arena
from selectn_core.memory.kv_geometry import KvGeometry
from selectn_core.memory.plan_memory import unmeasured_plan
from selectn_core.memory.workspace import Workspace
from selectn_core.offload.control import LinkShare
from selectn_core.offload.executor import Executor
from selectn_core.offload.offloading import Offloading
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from selectn_core.offload.target import Target
from selectn_core.planning.record import Fingerprint, PerformanceRecord
from selectn_core.requests.attainment import Attainment
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives, requested_objectives
from selectn_core.requests.observer import Observer
from selectn_core.requests.sampling import SamplingParams
from selectn_core.requests.table import RequestTable
from selectn_core.weights.architecture import context_limit
from selectn_core.weights.checkpoint import LoadedModel
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.resident import ResidentWeights
from selectn_core.weights.store_places import ReserveHost, reserve_nothing
from selectn_core.weights.units import find_units, last_of_a_new_kind

logger = logging.getLogger(__name__)


class Engine:
    """Serves one model on one device.

    `start.load_engine` builds it, `start` lets it generate, `close` ends it; a `with` block does the last two. Requests
    may be submitted before `start` and from any thread.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        executor_class: type[Executor] = OverlappedExecutor,
        reserve_host: ReserveHost = reserve_nothing,
    ) -> None:
        """Places `loaded` on the configured device. `reserve_host` is asked before weights take more host memory.

        Raises ConfigError, UnsupportedModel, or DeviceMemoryExceeded where not even the fewest resident units fit.
        """
        self.config = config
        self.model, self.tokenizer, self.model_name = loaded.model, loaded.tokenizer, loaded.name
        self.units = find_units(self.model, config.offload.unit)
        self._context_limit = context_limit(self.model.config)
        if self._context_limit is not None and self._context_limit.is_narrowed:
            limit = self._context_limit
            logger.warning("requests may have %d tokens, prompt and output: %s", limit.num_tokens, limit.reason)
        self.steps = StepLog()
        self.startup_s: dict[str, float] = {}  # by phase: weights, device, record
        # Called on the generation thread when a step is planned and has not begun.
        self.on_step_planned: Callable[[StepShape], None] = lambda shape: None
        self._record: PerformanceRecord | None = None
        self.requests = RequestTable(config.batch)
        self._limit_compute_threads()
        with refusing(self.model, "its keys and values cannot be sized"):
            self._kv_shapes = kv_shapes(self.model, last_of_a_new_kind(self.units).module)
            geometry = kv_geometry(self.model, config.batch.page_size, self._kv_shapes)
        everything = everything_bytes(self.model, self.units, geometry, config.batch.kv_tokens)
        self.device: Device = open_device(config.device, default_capacity_bytes=everything)
        self._held = ExitStack()  # what gives memory back, in the reverse order of taking it
        self._held.callback(self.device.close)
        try:
            is_free_to_move = config.host.weights == "auto"
            self.store = HostStore(
                self.units,
                self.device,
                loaded.store,
                reserve_private=(lambda num_bytes: reserve_host(num_bytes, None)) if is_free_to_move else None,
            )
            self._held.callback(self.store.close)
            self.resident = ResidentWeights(self.model, self.units, self.device)
            self._held.callback(self.resident.close)
            with refusing(self.model, "continuous batching does not take it"):
                self.workspace = self._measured_workspace(geometry)
                self.batching = self._make_batching(geometry)
            self._held.callback(self.batching.release)
            self._held.callback(self.batching.close)
            self.arena = Arena(self.batching.pages, min_kv_sectors=geometry.sectors_for(config.batch.kv_tokens))
            self.target = Target(self.units, self.arena, config.offload)
            self.executor = executor_class(self.model, self.store, self.device, self.target.plan, self.arena)
            self.executor.attach()
            self._held.callback(self.executor.detach)
            self.offloading = Offloading(config, self.requests, self.batching, self.arena, self.executor, self.target)
            self.guarantee = Guarantee(self.offloading, config.batch.max_requests)
            self.link_needs = LinkNeeds(self.offloading, config)
            self.limits = TokenLimits(self.offloading, self.guarantee, self._context_limit)
            self.lifecycle = RequestLifecycle(
                self.requests,
                self.batching,
                self.limits,
                vocab_size=self.model.config.get_text_config().vocab_size,
                eos_ids=self.default_eos_ids,
                objectives=lambda: self.objectives,
                percentile=config.slo.percentile,
            )
            self.supervisor = Supervisor(self.batching, self.requests, self.lifecycle.fail_all)
            self._self_test()
            check_room(self.device, self.workspace_bytes)
        except BaseException as error:
            self._held.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise out_of_memory(error) from error
            raise

    def _self_test(self) -> None:
        limits = Limits(
            batch=self.config.batch,
            max_model_len=self.max_model_len,
            kv_capacity_tokens=self.kv_capacity_tokens,
            eos_ids=frozenset(self.default_eos_ids),
        )
        check_model(self.model, self.units, self.batching, self.executor, limits)

    # -- what it is for -----------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint:
        """What a performance record must be of."""
        return fingerprint_of(self.model, self.config, self.device, self.batching.attention_name)

    def steer(self, record: PerformanceRecord) -> None:
        """Lets the configured policy decide from now on. Raises RecordRefused for a record of something else."""
        record.require(self.fingerprint)
        record.require_units([unit.num_bytes for unit in self.units])
        self._record = record
        self.offloading.put_in_control(Steering(self.offloading, self.config, record))

    def resume_policy(self) -> None:
        """Lets the policy decide again after a plan by hand, if there has been one; else changes nothing."""
        if self._record is not None and self.offloading.control.is_manual:
            self.steer(self._record)

    @property
    def objectives(self) -> Objectives | None:
        """What requests are served for that do not name their own; None where nothing says."""
        return self.offloading.control.objectives

    def set_objectives(self, slo: SloConfig) -> None:
        """Changes the objectives from the next step on, for requests in flight too."""
        self.offloading.control.set_objectives(slo)  # first: where it refuses them nothing has changed
        self.config = replace(self.config, slo=slo)
        self.lifecycle.attainment = Attainment(slo.percentile)

    def objectives_for(self, *, ttft_ms: float | None, tpot_ms: float | None) -> Objectives | None:
        """A request's objectives: its own where it names them, else the engine's. Raises RequestError."""
        default = self.objectives
        if ttft_ms is None and tpot_ms is None:
            return None
        if default is None:
            raise RequestError("slo: this server has no latency objectives: none was configured", field="slo")
        return requested_objectives(default, self.config.slo, ttft_ms=ttft_ms, tpot_ms=tpot_ms)

    @property
    def _model_limit(self) -> int | None:
        return self._context_limit.num_tokens if self._context_limit is not None else None

    def _make_batching(self, geometry: KvGeometry) -> ContinuousBatching:
        num_sectors = arena_sectors(self.device, geometry, self.workspace, self.config.batch)
        longest = self._model_limit or geometry.tokens_in(num_sectors)
        return ContinuousBatching(
            self.model,
            self.config.batch,
            self.device,
            Callbacks(
                before_schedule=self._before_schedule,
                token_budget=self._token_budget,
                on_step_planned=self._on_step_planned,
                on_step_done=self._on_step_done,
                on_outputs=lambda outputs: self.lifecycle.on_outputs(outputs),
                swap_is_cheaper=self._swap_is_cheaper,
            ),
            shapes=self._kv_shapes,
            num_sectors=num_sectors,
            num_host_sectors=host_sectors(self.config, geometry, longest),
        )

    # -- its host bus -------------------------------------------------------------------------------------------

    @property
    def gpu_uuid(self) -> str | None:
        """Of the GPU that it runs on, as NVML names it; None where that is none."""
        return self.device.gpu_uuid

    def set_link_share(self, share: LinkShare) -> None:
        """What this replica may use of its host bus from the next step on, whoever decides; any thread."""
        self.offloading.set_link_share(share)

    def set_link_range(self, bytes_per_s: float, guaranteed_bytes_per_s: float, k_max: int) -> None:
        """As `set_link_share`, for up to `k_max` units as large as the largest."""
        self.set_link_share(self.link_needs.share(bytes_per_s, guaranteed_bytes_per_s, k_max))

    def take_least_link_share(self) -> None:
        """As `set_link_share`: an equal share, and as few units offloaded as memory allows."""
        self.set_link_share(self.link_needs.least_share())

    @property
    def guaranteed_units(self) -> int:
        """The fewest units that must be offloaded for what requests were guaranteed."""
        return self.guarantee.num_offloaded

    @property
    def wanted_units(self) -> int:
        """The fewest with which those in flight, and a few more like them, have memory."""
        return self.guarantee.wanted_offloaded

    def link_demand(self, *, needed: int = 0, wanted: int = 0) -> UnitDemand:
        """What this engine wants of its host bus (`LinkNeeds.demand`)."""
        return self.link_needs.demand(needed=needed, wanted=wanted)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts generating. Raises EngineUnavailable on an engine that was closed."""
        self.supervisor.start()

    def close(self) -> None:
        """Ends generation, fails what is left and gives all memory back. Idempotent."""
        if not self.supervisor.close():
            return
        self.lifecycle.fail_all("the engine was closed")
        self._held.close()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_healthy(self) -> bool:
        """Whether requests are being served."""
        return self.supervisor.state == "running"

    # -- requests -----------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens that one request may have (`TokenLimits`)."""
        return self.limits.max_model_len

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds now, whoever they belong to."""
        return self.limits.kv_capacity_tokens

    @property
    def used_kv_tokens(self) -> int:
        """Tokens that the parts of the KV cache in use would hold."""
        return self.limits.used_kv_tokens

    @property
    def kv_swap_bytes(self) -> int:
        """Host bytes that are kept for the KV of preempted requests."""
        return self.batching.swap.capacity_bytes

    @property
    def default_eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation, from the model's generation configuration."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    def reachable_kv_tokens(self, k_max: int | None = None) -> int:
        """Tokens of footprints that the KV cache holds if up to `k_max` units are offloaded (`TokenLimits`)."""
        return self.limits.reachable_kv_tokens(k_max)

    def capacity(self, k_max: int | None = None) -> Capacity:
        """What this engine can take if it offloads up to `k_max` units (None: what is guaranteed)."""
        longest = self.max_model_len
        return Capacity(
            kv_capacity_tokens=self.reachable_kv_tokens(k_max),
            longest_request_tokens=longest,
            is_model_limit=longest == self.limits.model_limit,
            waiting_prefill_tokens=waiting_prefill_tokens(self.handles()),
            prefill_s_per_token=self.steps.prefill_s_per_token(),
            decode_step_s=decode_step_s(latest(self.steps.records)),
        )

    def handles(self) -> list[RequestHandle]:
        """The requests in flight, waiting ones included; any thread."""
        return list(self.requests.by_ticket().values())

    def footprint_tokens(self, total_tokens: int) -> int:
        """What a request of `total_tokens`, prompt and output, takes of `capacity`."""
        return self.limits.footprint_tokens(total_tokens)

    def check_request(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError for what `submit` would refuse whenever it came, RequestTooLarge for want of memory."""
        self.lifecycle.check(prompt_ids, params)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        objectives: Objectives | None = None,
        waited_s: float = 0.0,
        returns: bool = False,
    ) -> RequestHandle:
        """Queues a request and returns at once. `objectives` None: the engine's.

        `waited_s` is for how long the request has waited elsewhere: so much less of its TTFT objective is left.
        `returns`: one that is refused now will be offered again, so it does not count as refused.

        Raises RequestError (empty, too long, token out of range, id in use), EngineOverloaded when
        `batch.max_waiting` requests wait, EngineUnavailable when nothing would serve it.
        """
        return self.lifecycle.submit(
            prompt_ids, params, request_id=request_id, objectives=objectives, waited_s=waited_s, returns=returns
        )

    def observe(self, observer: Observer) -> None:
        """Has `observer` hear of all requests that are submitted from now on."""
        self.lifecycle.observer = observer

    # -- a step: plan, run, record ------------------------------------------------------------------------------

    def _before_schedule(self) -> list[str]:
        """Which new requests may begin in the step that is about to be scheduled, in their turn."""
        # Before it runs a profile's requests have no handles.
        return self.offloading.before_schedule(drops_unknown=self.is_healthy())

    def _token_budget(self, most: int) -> int:
        return self.offloading.control.token_budget(most)

    def _on_step_planned(self, shape: StepShape) -> None:
        self.on_step_planned(shape)
        self.offloading.step_planned(shape)

    def _on_step_done(self, shape: StepShape, duration_s: float) -> None:
        self.offloading.step_done(self.steps, shape, duration_s)

    def _swap_is_cheaper(self, num_tokens: int, num_bytes: int) -> bool:
        return self.offloading.swap_is_cheaper(num_tokens, num_bytes, self.steps.prefill_s_per_token())

    def set_num_offloaded(self, num_offloaded: int, num_slots: int | None = None) -> None:
        """Offloads so many units by hand from the next step on (`Offloading.set_num_offloaded`)."""
        self.offloading.set_num_offloaded(num_offloaded, num_slots)

    def check_num_offloaded(self, name: str, num_offloaded: int, num_slots: int) -> None:
        """Raises ConfigError, naming `name`, where `set_num_offloaded` would."""
        self.target.of(name, num_offloaded, num_slots)

    def set_plan(self, plan: OffloadPlan, *, urgent: bool = False) -> None:
        """Offloads these units by hand from the next step on (`Offloading.set_plan`)."""
        self.offloading.set_plan(plan, urgent=urgent)

    # -- sizes and state ----------------------------------------------------------------------------------------

    def snapshot(self, *, is_brief: bool = False) -> dict[str, Any]:
        """What the engine holds and does now, as JSON-able values; bytes and seconds.

        `is_brief`: for whom asks often. What all steps of the log are gone through for is None.
        """
        plan, usage, steering = self.executor.plan, self.device.link_usage(), self.offloading.control.snapshot()
        num_requests = len(self.requests)
        running = min(num_requests, self.batching.num_active)
        return {
            "state": self.supervisor.state,
            "model": self.model_name,
            "device": self.device.kind,
            "provenance": self.device.provenance,
            "num_layers": len({unit.layer for unit in self.units}),
            "unit": self.config.offload.unit,
            "num_units": len(self.units),
            "num_offloaded": plan.num_offloaded,
            "num_offloaded_wanted": self.executor.wanted.num_offloaded,
            "num_slots": plan.num_slots,
            "host_bytes": self.store.num_bytes,
            "host_store": self.store.location,
            "host_store_reason": self.store.reason,
            "host_allocated_bytes": self.device.host_allocated_bytes,
            "offloaded_bytes": self.offloading.offloaded_bytes(plan),
            "attention": {name: asdict(path) for name, path in self.batching.attention_paths.items()},
            "memory": self.account().to_json(),
            "device_bytes": self.device.allocated_bytes,
            "device_capacity_bytes": self.device.capacity_bytes,
            "kv_bytes": self.batching.pages.num_sectors * self.arena.sector_bytes,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "max_model_len": self.max_model_len,
            "max_model_len_reason": self.limits.max_model_len_reason,
            "running": running,
            "waiting": num_requests - running,
            "kv_used_tokens": self.used_kv_tokens,
            "kv_swap_used_requests": self.batching.swap.num_kept,
            "prefix_queried_tokens": self.batching.prefix_queried_tokens,
            "prefix_found_tokens": self.batching.prefix_found_tokens,
            "startup_s": dict(self.startup_s),
            "num_steps": self.steps.num_steps,
            "limited_by": self.offloading.control.limited_by(plan),
            "num_plan_changes": self.executor.stats.num_plan_changes,
            "interval_history": None if is_brief else [list(change) for change in list(self.steps.interval_history)],
            "step_over_bound": None if is_brief else self.steps.median_over_bound(usage.bytes_per_s),
            "link_bytes": usage.copied_bytes,
            "link_busy_s": usage.busy_s,
            "stall_s": self.executor.stats.stall_s,
            "objectives": asdict(self.objectives) if self.objectives is not None else None,
            "attainment": self.lifecycle.attainment.snapshot(),
            "steering": steering and {**steering, "prediction_error": self.steps.prediction_error()},
            "preemptions": self.batching.swap.num_preemptions,
            "preemptions_swapped": self.batching.swap.num_swapped,
        }

    def account(self) -> MemoryAccount:
        """Who holds which bytes now."""
        return account(
            self.arena,
            self.executor,
            self.batching,
            resident_bytes=self.resident.num_bytes,
            workspace_bytes=self.workspace_bytes,
            capacity_bytes=self.device.capacity_bytes,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if store, homes, slots or KV pages are not as they should be; call it between steps."""
        self.store.check_integrity()
        self.executor.check_integrity()
        self.arena.check_integrity()
        self.batching.swap.check_integrity()
        assert self.arena.weight_bytes == self.executor.held_bytes, "weights hold other sectors than their own"

    def _limit_compute_threads(self) -> None:
        """Leaves a core to the emulated link, whose copies would otherwise wait for the model's own threads."""
        if resolve_kind(self.config.device) == "emulated":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(self.config.device.compute_threads or max(1, cores - 1))

    @property
    def workspace_bytes(self) -> int:
        """Device bytes that are left to activations."""
        return self.workspace.bytes_for(self.arena.num_sectors)

    def _measured_workspace(self, geometry: KvGeometry) -> Workspace:
        """What activations need, where the device's size is given: an emulated one may be as large as it takes."""
        is_emulated = self.device.kind == "emulated"
        if is_emulated and self.config.device.memory_gib is None:
            return Workspace()
        limit = self._model_limit or geometry.tokens_in(self.device.free_bytes // geometry.sector_bytes)
        with self._computing_on_device() if not is_emulated else nullcontext():
            return measure_workspace(
                self.model, self.units, self.config.batch, self.device, geometry, self._kv_shapes, limit
            )

    def _computing_on_device(self) -> Executor:
        everything = unmeasured_plan(self.units, len(self.units), 1)
        return SynchronousExecutor(self.model, self.store, self.device, everything)
