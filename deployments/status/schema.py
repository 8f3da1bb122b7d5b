"""What `GET /status.json` says: frozen, plain data. docs/api.md describes it; None is "not known", "there is none"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from selectn_core.decision_log import Kind

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShownDecision:
    """A `LoggedDecision`, and in one sentence what it was. The rest of its explanation is made when it is asked for."""

    id: str
    kind: Kind
    unix_s: float
    verdict: str
    reason: str
    inputs: Mapping[str, float | None]
    summary: str
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A decision in plain words: what was known, what was decided, why, and what would have changed it."""

    decision: ShownDecision
    known: str
    decided: str
    why: str
    otherwise: str


@dataclass(frozen=True, kw_only=True)
class AttainmentPart:
    """`Attainment.snapshot`: how requests ended, and the latencies at `percentile`."""

    percentile: float | None
    num_requests: int
    outcomes: Mapping[str, int]
    attained: float | None
    ttft_s: float | None
    tpot_s: float | None
    itl_p99_s: float | None


@dataclass(frozen=True, kw_only=True)
class ReplicaFacts:
    """What a replica says of itself. `k` of `num_units` units are offloaded now, `k_wanted` when memory allows.

    `limited_by` is why k is not larger. The coordinator allows it `k_min` to `k_max` and `share_bytes_per_s`, for
    `lease_left_s`; `link_bytes_per_s` is what the link gives. `k_history` has (Unix seconds, k) of each change.
    `startup_s` is what its start took, by phase. `problems` are for people.
    """

    model: str
    node_id: str
    bus: str | None
    state: str
    device: str
    unit: str
    num_units: int
    k: int
    k_wanted: int
    num_slots: int
    limited_by: str
    k_min: int | None
    k_max: int | None
    share_bytes_per_s: float | None
    link_bytes_per_s: float | None
    lease_left_s: float | None
    headroom_tokens: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    num_running: int
    num_waiting: int
    num_at_door: int
    device_bytes: int
    device_capacity_bytes: int
    offloaded_bytes: int
    host_bytes: int
    ttft_objective_s: float | None
    tpot_objective_s: float | None
    attainment: AttainmentPart
    k_history: tuple[tuple[float, int], ...]
    startup_s: Mapping[str, float]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReplicaPart:
    """A replica, whether it answers or not. `problem` says why not; then `facts`, if there are any, are `age_s` old."""

    id: str
    problem: str | None = None
    age_s: float = 0.0
    facts: ReplicaFacts | None = None


@dataclass(frozen=True, kw_only=True)
class IngressPart:
    """An ingress: those that wait in it, and what became of requests that no engine has had."""

    id: str
    num_waiting: int
    attainment: AttainmentPart


@dataclass(frozen=True, kw_only=True)
class GpuPart:
    """A GPU. `trouble` is what is wrong with it as a whole. Counters that cannot be read are None."""

    index: int
    name: str | None
    trouble: str | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    compute_percent: int | None
    pcie_generation: int | None
    pcie_width: int | None
    pcie_rx_bytes_per_s: int | None
    temperature_c: int | None
    power_w: float | None


@dataclass(frozen=True, kw_only=True)
class BusPart:
    """A host bus: what it carries, and the most of it that its replicas may be using, as the coordinator counts."""

    name: str
    bytes_per_s: float | None
    rate_from: str
    num_gpus: int
    committed_bytes_per_s: int | None
    num_replicas: int | None


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node's agent reports. `age_s` is how old its sample is, by this ingress's clock."""

    age_s: float
    host_available_bytes: int | None
    host_limit_bytes: int | None
    pressure_percent: float | None
    ledger_capacity_bytes: int | None
    ledger_reserved_bytes: int | None
    gpus: tuple[GpuPart, ...]
    buses: tuple[BusPart, ...]


@dataclass(frozen=True, kw_only=True)
class NodePart:
    """A node of the cluster, whether its agent answers or not."""

    id: str
    name: str
    problem: str | None = None
    facts: NodeFacts | None = None


@dataclass(frozen=True, kw_only=True)
class CoordinatorPart:
    """The coordinator. `is_settling`: it has started less than a lease ago, and raises nobody's share."""

    problem: str | None = None
    is_settling: bool | None = None
    num_nodes: int | None = None
    num_replicas: int | None = None
    num_refused: int | None = None
    oldest_report_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Status:
    """The whole. `ingress_id` is whose answer this is; `problems` are of what was asked and did not answer as a whole.

    Decisions are the latest of all places, the newest first.
    """

    version: int
    unix_s: float
    gathered_s: float
    ingress_id: str
    ingresses: tuple[IngressPart, ...]
    replicas: tuple[ReplicaPart, ...]
    nodes: tuple[NodePart, ...]
    coordinator: CoordinatorPart
    decisions: tuple[ShownDecision, ...]
    problems: tuple[str, ...]
