"""Every metric there is, in one table: code, docs/metrics.md, dashboards and rules are made from it.

Names are as the code uses them. Ray exports them with `ray_` before, and a counter with `_total` behind. Those that
begin with `vllm_` have vLLM's names and meanings, so that dashboards and autoscaler rules made for vLLM work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from selectn_core.requests.attainment import OUTCOMES

Kind = Literal["counter", "gauge", "histogram"]
# The process that exports it. Every one of them sets its own labels: `DEFAULT_LABELS`.
Owner = Literal["replica", "genai", "ingress", "node", "coordinator"]

DEFAULT_LABELS: dict[Owner, tuple[str, ...]] = {
    "replica": ("model_name",),
    "genai": ("model_name",),  # of a replica, where they are wanted
    "ingress": (),
    "node": ("node",),
    "coordinator": (),
}

# Codes of the errors that requests are refused with for want of room, time, or of who serves.
REFUSALS = ("rate_limit_exceeded", "objective_unreachable", "unavailable", "replica_died")

# Upper bounds of buckets, in seconds, as vLLM has them.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# vLLM's end at the model's longest request, which is known too late here: buckets are fixed when a metric is made.
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))[:16]  # 1 to 100,000
STEP_TOKENS = tuple(float(2**power) for power in range(15))  # 1 to 16,384


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. `labels` are beside the owner's own; `buckets` are upper bounds, of a histogram alone.

    `known` are values of the labels that are sure to come: such counters are there with 0 from the start. One that
    first appears with a value has not grown, as Prometheus sees it.
    """

    name: str
    kind: Kind
    unit: str
    means: str
    owner: Owner = "replica"
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus; a histogram's has `_bucket`, `_sum` and `_count` behind."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*DEFAULT_LABELS[self.owner], *self.labels)


def _counter(name: str, unit: str, means: str, owner: Owner = "replica", **labels: Sequence[str]) -> Metric:
    """`labels`, each with the values that are sure to come."""
    known = tuple(product(*labels.values()))
    return Metric(name=name, kind="counter", unit=unit, means=means, labels=tuple(labels), owner=owner, known=known)


def _gauge(name: str, unit: str, means: str, *labels: str, owner: Owner = "replica") -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, means=means, labels=labels, owner=owner)


def _histogram(name: str, unit: str, means: str, buckets: Sequence[float], owner: Owner = "replica") -> Metric:
    return Metric(name=name, kind="histogram", unit=unit, means=means, buckets=tuple(buckets), owner=owner)


def _node(name: str, unit: str, means: str, *labels: str) -> Metric:
    return _gauge(name, unit, means, *labels, owner="node")


VLLM = (
    _histogram("vllm_time_to_first_token_seconds", "s", "TTFT, from arrival at the ingress", TTFT_S),
    _histogram(
        "vllm_inter_token_latency_seconds",
        "s",
        "ITL: time between two tokens of a request. Of more than 512 a second a fair sample: mean and quantiles hold, "
        "the count is smaller",
        TPOT_S,
    ),
    _histogram(
        "vllm_request_time_per_output_token_seconds", "s", "TPOT: a request's mean over tokens after the first", TPOT_S
    ),
    _histogram("vllm_e2e_request_latency_seconds", "s", "From arrival to the end", REQUEST_S),
    _histogram("vllm_request_queue_time_seconds", "s", "From arrival until the request begins", REQUEST_S),
    _histogram("vllm_request_prefill_time_seconds", "s", "From its beginning to its first token", REQUEST_S),
    _histogram("vllm_request_decode_time_seconds", "s", "From its first token to its last", REQUEST_S),
    _histogram("vllm_request_inference_time_seconds", "s", "From its beginning to its last token", REQUEST_S),
    _histogram("vllm_request_prompt_tokens", "tokens", "Prompt tokens of a request that has ended", TOKENS),
    _histogram("vllm_request_generation_tokens", "tokens", "Output tokens of a request that has ended", TOKENS),
    _histogram("vllm_request_params_max_tokens", "tokens", "`max_tokens` of a request that has ended", TOKENS),
    _histogram("vllm_iteration_tokens_total", "tokens", "Tokens computed in a step", STEP_TOKENS),
    _counter("vllm_prompt_tokens", "tokens", "Prompt tokens of requests whose prefill is done"),
    _counter("vllm_generation_tokens", "tokens", "Output tokens"),
    _counter(
        "vllm_request_success",
        "requests",
        "Requests that have ended, by how",
        finished_reason=("stop", "length", "abort", "error"),
    ),
    _gauge("vllm_num_requests_running", "requests", "Requests that hold KV cache"),
    _gauge("vllm_num_requests_waiting", "requests", "Requests in the engine or at its door without KV cache"),
    _gauge(
        "vllm_num_requests_waiting_by_reason",
        "requests",
        "capacity: at the door, for want of KV; deferred: in the engine, for their turn",
        "reason",
    ),
    _gauge("vllm_num_requests_swapped", "requests", "Preempted requests whose KV is in host memory"),
    _gauge("vllm_kv_cache_usage_perc", "share", "KV cache in use, 0 to 1"),
    _counter("vllm_prefix_cache_queries", "tokens", "Prompt tokens that were looked up in the prefix cache"),
    _counter("vllm_prefix_cache_hits", "tokens", "Prompt tokens that were found there"),
    _counter("vllm_num_preemptions", "requests", "Requests whose KV was taken from them while they ran"),
    _counter(
        "vllm_admission_rejections",
        "requests",
        "Requests refused before an engine had them",
        owner="ingress",
        reason=REFUSALS,
    ),
)

REPLICA = (
    _counter(
        "selectn_slo_requests",
        "requests",
        "Offered requests with objectives that have ended here, by objective (ttft, tpot, both) and met (true, false)",
        objective=("ttft", "tpot", "both"),
        met=("true", "false"),
    ),
    _counter("selectn_requests", "requests", "Requests that have ended here", outcome=OUTCOMES),
    _counter("selectn_goodput_tokens", "tokens", "Output tokens of requests that met both objectives"),
    _gauge("selectn_ttft_objective_seconds", "s", "The server's TTFT objective"),
    _gauge("selectn_tpot_objective_seconds", "s", "The server's TPOT objective"),
    _gauge("selectn_offloaded_units", "units", "k: units of the model that live only in host memory"),
    _gauge("selectn_units", "units", "Units that the model has"),
    _gauge("selectn_slots", "slots", "S: units that have a place on the device for their turn"),
    _gauge("selectn_interval", "units", "Units per offloaded one: the offloading interval; not set while k is 0"),
    _gauge("selectn_plan_limited_by", "1", "1: why k is not larger, by reason; 0 for the other reasons", "reason"),
    _counter("selectn_plan_changes", "changes", "How often k or the units have changed"),
    _gauge("selectn_offloaded_bytes", "bytes", "Weights that live only in host memory"),
    _gauge("selectn_host_store_bytes", "bytes", "The model's weights in host memory; processes may share them"),
    _gauge("selectn_kv_swap_used_bytes", "bytes", "KV of preempted requests in host memory"),
    _gauge("selectn_device_used_bytes", "bytes", "Device memory that the engine has taken"),
    _gauge("selectn_device_capacity_bytes", "bytes", "Device memory that it may take"),
    _gauge("selectn_kv_capacity_tokens", "tokens", "Tokens that the KV cache holds now"),
    _gauge("selectn_headroom_tokens", "tokens", "Tokens of footprints that are neither promised nor held"),
    _counter("selectn_link_copied_bytes", "bytes", "Bytes that the link has carried to the device"),
    _counter("selectn_link_busy_seconds", "s", "Time in which the link was copying"),
    _gauge("selectn_link_share_bytes_per_second", "bytes/s", "What the coordinator allows this replica of its bus"),
    _gauge("selectn_link_measured_bytes_per_second", "bytes/s", "What the link gives now, as the controller knows it"),
    _counter("selectn_stall_seconds", "s", "Time in which compute waited for a copy"),
    _histogram("selectn_step_seconds", "s", "Duration of a step", TPOT_S),
    _gauge("selectn_prediction_error_ratio", "share", "Mean error of predicted step times"),
    _gauge("selectn_controller_share_ratio", "share", "Share of step time that steps wait for decisions"),
    _counter("selectn_swapped_preemptions", "requests", "Of all preemptions, those whose KV went to host memory"),
    _gauge(
        "selectn_coordinator_lease_left_seconds",
        "s",
        "Until the share of the bus ends unless it is renewed; 0 without a lease",
    ),
    _gauge("selectn_startup_seconds", "s", "What this replica's start took, by phase", "phase"),
    _gauge("selectn_engine_up", "1", "1: the engine serves, or starts again after an error; 0: it has failed"),
)

_GENAI_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name")
# Buckets as the conventions recommend them.
_GENAI_REQUEST_S = tuple(0.01 * 2**power for power in range(14))
_GENAI_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_GENAI_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

GENAI = tuple(
    Metric(
        name=f"gen_ai_server_{name}_seconds",
        kind="histogram",
        unit="s",
        means=means,
        owner="genai",
        labels=_GENAI_LABELS,
        buckets=buckets,
    )
    for name, means, buckets in (
        ("request_duration", "gen_ai.server.request.duration: from arrival to the end", _GENAI_REQUEST_S),
        ("time_to_first_token", "gen_ai.server.time_to_first_token", _GENAI_TTFT_S),
        ("time_per_output_token", "gen_ai.server.time_per_output_token", _GENAI_TPOT_S),
    )
)

INGRESS = (
    _histogram(
        "selectn_ingress_time_to_first_token_seconds",
        "s",
        "From arrival until the ingress has the first text: less vLLM's TTFT it is the framework's share",
        TTFT_S,
        owner="ingress",
    ),
    _histogram(
        "selectn_ingress_queue_seconds",
        "s",
        "From arrival until a replica has let the request in",
        TTFT_S,
        owner="ingress",
    ),
    _counter(
        "selectn_admissions",
        "requests",
        "Requests that a replica has let in, and others by why not",
        owner="ingress",
        verdict=("admitted", "given_up", *REFUSALS),
    ),
    _counter(
        "selectn_ingress_unserved_requests",
        "requests",
        "Offered requests that no engine has had, by outcome: refused or cancelled, and whether they met the TTFT "
        "objective until they left",
        owner="ingress",
        outcome=("refused", "cancelled"),
        met=("true", "false"),
    ),
    _gauge("selectn_ingress_waiting_requests", "requests", "Requests that wait for a place", owner="ingress"),
    _gauge("selectn_ingress_known_replicas", "replicas", "Replicas whose headroom is known", owner="ingress"),
)

NODE = (
    _node("selectn_gpu_up", "1", "1: the GPU answers; 0: it is lost, needs a reset, or its driver hangs", "gpu"),
    _node("selectn_gpu_memory_used_bytes", "bytes", "Device memory in use, by every process", "gpu"),
    _node("selectn_gpu_memory_total_bytes", "bytes", "Device memory", "gpu"),
    _node("selectn_gpu_pcie_generation", "1", "PCIe generation of the link now; 1 while the GPU is idle", "gpu"),
    _node("selectn_gpu_pcie_width", "lanes", "PCIe lanes of the link now", "gpu"),
    _node("selectn_gpu_pcie_rx_bytes_per_s", "bytes/s", "From the host, over 20 ms", "gpu"),
    _node("selectn_gpu_pcie_tx_bytes_per_s", "bytes/s", "To the host, over 20 ms", "gpu"),
    _node("selectn_gpu_pcie_replays", "packets", "PCIe packets sent again since the driver was loaded", "gpu"),
    _node("selectn_gpu_compute_percent", "%", "Share of time in which a kernel ran", "gpu"),
    _node("selectn_gpu_temperature_c", "degrees Celsius", "Temperature", "gpu"),
    _node("selectn_gpu_power_w", "W", "Power", "gpu"),
    _node("selectn_gpu_throttled", "1", "1: something holds the clocks down", "gpu"),
    _node(
        "selectn_gpu_ecc_uncorrected_errors", "errors", "Uncorrected memory errors since the driver was loaded", "gpu"
    ),
    _node("selectn_gpu_xid_errors", "errors", "Xid errors since the node's agent started", "gpu"),
    _node("selectn_bus_bytes_per_s", "bytes/s", "What a host bus carries in one direction", "bus"),
    _node("selectn_host_memory_available_bytes", "bytes", "Host memory that may still be used"),
    _node("selectn_host_memory_limit_bytes", "bytes", "The limit on host memory: of a cgroup, or the machine"),
    _node("selectn_host_memory_pressure_percent", "%", "Share of the last 10 s in which a task waited for memory"),
    _node("selectn_ledger_capacity_bytes", "bytes", "Host memory that replicas of the node may reserve"),
    _node("selectn_ledger_reserved_bytes", "bytes", "Host memory that they have reserved"),
    _node("selectn_node_sampling_seconds", "s", "How long taking this node's sample took"),
)

COORDINATOR = (
    _gauge(
        "selectn_coordinator_epoch", "1", "The coordinator's life, in Unix seconds of its start", owner="coordinator"
    ),
    _gauge("selectn_coordinator_report_age_seconds", "s", "Age of the oldest node's last report", owner="coordinator"),
    _gauge("selectn_coordinator_nodes", "nodes", "Nodes that report", owner="coordinator"),
    _gauge(
        "selectn_coordinator_replicas", "replicas", "Replicas that hold or want a share of a bus", owner="coordinator"
    ),
    _gauge(
        "selectn_coordinator_bus_committed_bytes_per_second",
        "bytes/s",
        "The most that a bus's replicas may be using",
        "bus",
        owner="coordinator",
    ),
    _counter("selectn_coordinator_refused_reports", "reports", "Reports that made no sense", owner="coordinator"),
)

METRICS: tuple[Metric, ...] = (*VLLM, *REPLICA, *GENAI, *INGRESS, *NODE, *COORDINATOR)
BY_NAME = {metric.name: metric for metric in METRICS}


def of_owner(owner: Owner) -> tuple[Metric, ...]:
    """The metrics that a process of this kind exports."""
    return tuple(metric for metric in METRICS if metric.owner == owner)
