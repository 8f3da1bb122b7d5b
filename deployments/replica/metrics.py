"""A replica's metrics: what its requests and steps were, and what its engine holds, as Ray's metrics.

A room of its own because nothing that serves waits for it: requests leave plain numbers here, and a thread makes
metrics of them. Ray takes three microseconds for each, which on the engine's thread would be time of every step.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.metrics.meters import Meters
from deployments.replica.tracing import SYSTEM, operation_of
from selectn_core.offload.control import LIMITS
from selectn_core.requests.attainment import Outcome, each_met
from selectn_core.requests.handle import RequestHandle, RequestSpans, RequestTiming
from selectn_core.requests.objectives import Objectives

if TYPE_CHECKING:  # which imports torch
    from selectn_core.latency.steps import StepRecord

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
# Of what waits to be published; the oldest is dropped for more: a thread that hangs must not fill the memory.
MOST_WAITING, MOST_ENDED = 1 << 16, 1 << 13
CLOSING_TIMEOUT_S = 2.0
# Times between tokens that become observations, at most, of those that wait: a fair sample has the same mean and the
# same quantiles, and 64 streams have thousands a second.
MOST_GAPS = 512
# vLLM's words for how a request ended.
FINISHED = {"cancelled": "abort"}

Snapshot = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class EndedRequest:
    """What is kept of a request that has ended: numbers, and nothing of its text."""

    outcome: Outcome
    finish_reason: str
    operation: str
    timing: RequestTiming
    spans: RequestSpans
    objectives: Objectives | None
    num_prompt_tokens: int
    num_tokens: int
    max_tokens: int | None


class RequestNumbers:
    """What requests were, until it is published: an engine's observer."""

    def __init__(self) -> None:
        self._gaps_s: deque[float] = deque(maxlen=MOST_WAITING)
        self._firsts: deque[tuple[float, int]] = deque(maxlen=MOST_WAITING)  # TTFT, prompt tokens
        self._ended: deque[EndedRequest] = deque(maxlen=MOST_ENDED)
        self._num_tokens = 0

    def tokens(self, handle: RequestHandle, num_tokens: int, gap_s: float | None) -> None:
        self._num_tokens += num_tokens
        if gap_s is None:
            self._firsts.append((handle.first_token_s - handle.arrived_s, handle.num_prompt_tokens))
        else:
            self._gaps_s.append(gap_s)

    def ended(self, handle: RequestHandle, outcome: Outcome, finish_reason: str, objectives: Objectives | None) -> None:
        params = handle.params
        self._ended.append(
            EndedRequest(
                outcome=outcome,
                finish_reason=finish_reason,
                operation=operation_of(handle.request_id),
                timing=handle.timing,
                spans=handle.spans,
                objectives=objectives,
                num_prompt_tokens=handle.num_prompt_tokens,
                num_tokens=handle.num_tokens,
                max_tokens=params.max_tokens if params is not None else None,
            )
        )

    def publish(self, meters: Meters, genai: Meters | None = None) -> None:
        """Makes metrics of all that has come since; `genai` by OpenTelemetry's names."""
        meters.total("vllm_generation_tokens", self._num_tokens)
        for _ in range(len(self._firsts)):
            ttft_s, prompt_tokens = self._firsts.popleft()
            meters.observe("vllm_time_to_first_token_seconds", ttft_s)
            meters.add("vllm_prompt_tokens", prompt_tokens)
        gaps_s = [self._gaps_s.popleft() for _ in range(len(self._gaps_s))]
        for gap_s in gaps_s if len(gaps_s) <= MOST_GAPS else random.sample(gaps_s, MOST_GAPS):
            meters.observe("vllm_inter_token_latency_seconds", gap_s)
        for _ in range(len(self._ended)):
            ended = self._ended.popleft()
            _publish_ended(meters, ended)
            if genai is not None:
                _publish_genai(genai, ended)


def _publish_ended(meters: Meters, ended: EndedRequest) -> None:
    timing, spans = ended.timing, ended.spans
    meters.add("selectn_requests", 1, outcome=ended.outcome)
    if ended.objectives is not None:
        met = each_met(timing, ended.objectives, ended.outcome)
        for objective, is_met in (("ttft", met[0]), ("tpot", met[1]), ("both", all(met))):
            meters.add("selectn_slo_requests", 1, objective=objective, met=str(is_met).lower())
        if all(met):
            meters.add("selectn_goodput_tokens", ended.num_tokens)
    if ended.outcome == "refused":
        return
    meters.add("vllm_request_success", 1, finished_reason=FINISHED.get(ended.finish_reason, ended.finish_reason))
    meters.observe("vllm_e2e_request_latency_seconds", spans.total_s)
    meters.observe("vllm_request_queue_time_seconds", spans.queue_s)
    if ended.max_tokens is not None:
        meters.observe("vllm_request_params_max_tokens", ended.max_tokens)
    meters.observe("vllm_request_prompt_tokens", ended.num_prompt_tokens)
    meters.observe("vllm_request_generation_tokens", ended.num_tokens)
    if not ended.num_tokens:
        return
    meters.observe("vllm_request_prefill_time_seconds", spans.prefill_s)
    meters.observe("vllm_request_decode_time_seconds", spans.decode_s)
    meters.observe("vllm_request_inference_time_seconds", spans.prefill_s + spans.decode_s)
    if timing.tpot_s is not None:
        meters.observe("vllm_request_time_per_output_token_seconds", timing.tpot_s)


def _publish_genai(meters: Meters, ended: EndedRequest) -> None:
    timing = ended.timing
    labels = {"gen_ai_operation_name": ended.operation, "gen_ai_provider_name": SYSTEM}
    for name, seconds in (
        ("request_duration", ended.spans.total_s),
        ("time_to_first_token", timing.ttft_s),
        ("time_per_output_token", timing.tpot_s),
    ):
        if seconds is not None:
            meters.observe(f"gen_ai_server_{name}_seconds", seconds, **labels)


def publish_state(meters: Meters, state: Mapping[str, Any]) -> None:
    """What an engine holds and does now (`Engine.snapshot`), and what its door and cluster say of it."""
    num_waiting, num_at_door = state["waiting"], state["at_door"]
    gauges = {
        "vllm_num_requests_running": state["running"],
        "vllm_num_requests_waiting": num_waiting + num_at_door,
        "vllm_num_requests_swapped": state["kv_swap_used_requests"],
        "vllm_kv_cache_usage_perc": state["kv_used_tokens"] / max(1, state["kv_capacity_tokens"]),
        "selectn_offloaded_units": state["num_offloaded"],
        "selectn_units": state["num_units"],
        "selectn_slots": state["num_slots"],
        "selectn_offloaded_bytes": state["offloaded_bytes"],
        "selectn_host_store_bytes": state["host_bytes"],
        "selectn_kv_swap_used_bytes": state["memory"]["host"]["kv_swap_used_bytes"],
        "selectn_device_used_bytes": state["device_bytes"],
        "selectn_device_capacity_bytes": state["device_capacity_bytes"],
        "selectn_kv_capacity_tokens": state["kv_capacity_tokens"],
        "selectn_headroom_tokens": state["headroom_tokens"],
        "selectn_engine_up": float(state["state"] == "running"),
    }
    if state["num_offloaded"]:
        gauges["selectn_interval"] = state["num_units"] / state["num_offloaded"]
    steering, objectives, cluster = state["steering"] or {}, state["objectives"] or {}, state["cluster"] or {}
    gauges |= {
        name: value
        for name, value in {
            "selectn_ttft_objective_seconds": objectives.get("ttft_s"),
            "selectn_tpot_objective_seconds": objectives.get("tpot_s"),
            "selectn_link_measured_bytes_per_second": steering.get("link_bytes_per_s"),
            "selectn_prediction_error_ratio": steering.get("prediction_error"),
            "selectn_controller_share_ratio": steering.get("controller_share"),
            "selectn_link_share_bytes_per_second": cluster.get("link_bytes_per_s"),
            "selectn_coordinator_lease_left_seconds": _lease_left_s(cluster),
        }.items()
        if value is not None
    }
    for name, value in gauges.items():
        meters.set(name, value)
    meters.set("vllm_num_requests_waiting_by_reason", num_at_door, reason="capacity")
    meters.set("vllm_num_requests_waiting_by_reason", num_waiting, reason="deferred")
    for reason in LIMITS:
        meters.set("selectn_plan_limited_by", float(reason == state["limited_by"]), reason=reason)
    for phase, seconds in state["startup_s"].items():
        meters.set("selectn_startup_seconds", seconds, phase=phase)
    for name, total in {
        "vllm_prefix_cache_queries": state["prefix_queried_tokens"],
        "vllm_prefix_cache_hits": state["prefix_found_tokens"],
        "vllm_num_preemptions": state["preemptions"],
        "selectn_swapped_preemptions": state["preemptions_swapped"],
        "selectn_plan_changes": state["num_plan_changes"],
        "selectn_link_copied_bytes": state["link_bytes"],
        "selectn_link_busy_seconds": state["link_busy_s"],
        "selectn_stall_seconds": state["stall_s"],
    }.items():
        meters.total(name, total)


def _lease_left_s(cluster: Mapping[str, Any]) -> float | None:
    """0 without a lease; None where no bus is shared, or nothing has been allowed yet."""
    return None if cluster.get("range") is None else cluster.get("lease_left_s") or 0.0


class ReplicaMetrics:
    """Publishes once a second until it is closed. `numbers` is what the engine is to tell."""

    def __init__(
        self, meters: Meters, snapshot: Snapshot, steps: deque[StepRecord], genai: Meters | None = None
    ) -> None:
        """`snapshot` is what `publish_state` takes, `steps` the engine's log; `genai`: see `RequestNumbers`."""
        self.numbers, self._genai = RequestNumbers(), genai
        self._meters, self._snapshot, self._steps = meters, snapshot, steps
        self._last_iteration = steps[-1].iteration if steps else -1  # those before were a profile's
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publishes what requests have left, once the engine is closed; waits a moment for it. Idempotent."""
        self._should_end.set()
        self._thread.join(CLOSING_TIMEOUT_S)

    def publish(self) -> None:
        """Everything, now."""
        self.numbers.publish(self._meters, self._genai)
        self._publish_steps()
        publish_state(self._meters, self._snapshot())

    def _publish_steps(self) -> None:
        records = self._steps
        new = []
        for record in reversed(records.copy()):
            if record.iteration <= self._last_iteration:
                break
            new.append(record)
        for record in reversed(new):
            self._last_iteration = record.iteration
            self._meters.observe("vllm_iteration_tokens_total", record.shape.num_tokens)
            self._meters.observe("selectn_step_seconds", record.duration_s)

    def _run(self) -> None:
        is_failing = False
        while True:
            is_last = self._should_end.wait(PERIOD_S)
            try:
                if is_last:
                    self.numbers.publish(self._meters, self._genai)
                    self._publish_steps()
                    return
                self.publish()
                is_failing = False
            except Exception:  # the replica serves all the same
                if not is_failing:
                    logger.exception("this replica's metrics are not published")
                is_failing = True
                if is_last:
                    return
