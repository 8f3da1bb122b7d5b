"""A status as it may be: of a replica that serves, one that is silent, and names that somebody else has chosen."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.status.schema import (
    AttainmentPart,
    BusPart,
    CoordinatorPart,
    GpuPart,
    IngressPart,
    NodeFacts,
    NodePart,
    ReplicaFacts,
    ReplicaPart,
    Status,
)
from deployments.status.words import shown
from selectn_core.decision_log import LoggedDecision

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m"
NOW_S = 1_800_000_000.0

INTERVAL: Mapping[str, float | None] = {
    "k_before": 15,
    "k_after": 12,
    "k_asked_for": 12,
    "num_units": 30,
    "slots_before": 2,
    "slots_after": 2,
    "step_tokens": 9,
    "step_decodes": 8,
    "step_kv_tokens": 1600,
    "held_s": 0.231,
    "predicted_s": 0.188,
    "limit_s": 0.19,
    "is_urgent": 0.0,
    "link_bytes_per_s": 1.5e9,
    "share_bytes_per_s": 2e9,
    "max_offloaded_bytes": 3e8,
    "needed_bytes": 0,
    "offloaded_bytes": 170_000_000,
    "freed_bytes": 140_000_000,
    "next_unit_bytes": 14_000_000,
}
LATE: Mapping[str, float | None] = {
    "tokens": 500,
    "prompt_tokens": 100,
    "waited_s": 0.0,
    "ttft_s": 2.0,
    "num_waiting": 3,
    "queued_tokens": 1200,
    "free_tokens": -300,
    "rate_tokens_per_s": 400.0,
    "before_tokens": 1200.0,
    "spread_tokens": 775.0,
    "left_s": 1.5,
    "longest_tokens": None,
    "retry_after_s": 4.0,
}


def interval_decision(reason: str = "objective", **inputs: float | None) -> LoggedDecision:
    return LoggedDecision(
        id="i-r1-7",
        kind="interval",
        unix_s=NOW_S - 5,
        verdict="offload_fewer",
        reason=reason,
        inputs={**INTERVAL, **inputs},
    )


def admission_decision(reason: str = "late", **inputs: float | None) -> LoggedDecision:
    return LoggedDecision(
        id="a-in1-3",
        kind="admission",
        unix_s=NOW_S - 3,
        verdict="refused",
        reason=reason,
        inputs={**LATE, **inputs},
        request_id="cmpl-1",
    )


def attainment_part(attained: float | None = 0.983) -> AttainmentPart:
    return AttainmentPart(
        percentile=99.0,
        num_requests=211,
        outcomes={"completed": 205, "cancelled": 2, "failed": 0, "refused": 4},
        attained=attained,
        ttft_s=1.4,
        tpot_s=0.21,
        itl_p99_s=0.3,
    )


def replica_facts() -> ReplicaFacts:
    return ReplicaFacts(
        model=HOSTILE,
        node_id="n1",
        bus="bus0",
        state="running",
        device="emulated",
        unit="layer",
        num_units=30,
        k=12,
        k_wanted=12,
        num_slots=2,
        limited_by="objective",
        k_min=0,
        k_max=20,
        share_bytes_per_s=2e9,
        link_bytes_per_s=1.5e9,
        lease_left_s=7.5,
        headroom_tokens=12_345,
        kv_used_tokens=4000,
        kv_capacity_tokens=20_000,
        num_running=8,
        num_waiting=1,
        num_at_door=2,
        device_bytes=500 << 20,
        device_capacity_bytes=1 << 30,
        offloaded_bytes=170_000_000,
        host_bytes=540_000_000,
        ttft_objective_s=2.0,
        tpot_objective_s=0.2,
        attainment=attainment_part(),
        k_history=((NOW_S - 400, 8), (NOW_S - 200, 15), (NOW_S - 5, 12)),
        startup_s={"weights": 1.2, "device": 0.4, "record": 40.0, "total": 43.0},
        problems=("user_config is wrong",),
    )


def node_facts() -> NodeFacts:
    gpu = GpuPart(
        index=0,
        name=HOSTILE,
        trouble="gpu_lost: fell off the bus",
        memory_used_bytes=1 << 30,
        memory_total_bytes=24 << 30,
        compute_percent=80,
        pcie_generation=4,
        pcie_width=16,
        pcie_rx_bytes_per_s=12_000_000_000,
        temperature_c=61,
        power_w=230.0,
    )
    bus = BusPart(
        name="bus0",
        bytes_per_s=2.5e10,
        rate_from="pcie_link",
        num_gpus=1,
        committed_bytes_per_s=2_000_000_000,
        num_replicas=1,
    )
    return NodeFacts(
        age_s=0.8,
        host_available_bytes=40 << 30,
        host_limit_bytes=64 << 30,
        pressure_percent=0.5,
        ledger_capacity_bytes=50 << 30,
        ledger_reserved_bytes=2 << 30,
        gpus=(gpu,),
        buses=(bus,),
    )


def a_status() -> Status:
    return Status(
        version=1,
        unix_s=NOW_S,
        gathered_s=0.02,
        ingress_id="in1",
        ingresses=(IngressPart(id="in1", num_waiting=3, attainment=attainment_part(0.5)),),
        replicas=(
            ReplicaPart(id="r1", facts=replica_facts()),
            ReplicaPart(id="r2", problem="no answer for 12 s"),
        ),
        nodes=(
            NodePart(id="n1", name=HOSTILE, facts=node_facts()),
            NodePart(id="n2", name="second", problem="its agent does not answer, or there is none"),
        ),
        coordinator=CoordinatorPart(is_settling=True, num_nodes=2, num_replicas=1, num_refused=0, oldest_report_s=1.5),
        decisions=(shown(admission_decision()), shown(interval_decision())),
        problems=("ingresses: no answer for 1 s",),
    )
