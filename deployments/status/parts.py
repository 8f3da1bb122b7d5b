"""Parts of the status out of what replicas, nodes and the coordinator report in words of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cluster.coordinator.coordinator import CoordinatorStatus
from cluster.node.agent import UNLIMITED_BYTES
from cluster.protocol.node_reports import BusReport, GpuReport, NodeReport, Reading, Unavailable
from deployments.status.schema import (
    AttainmentPart,
    BusPart,
    CoordinatorPart,
    GpuPart,
    NodeFacts,
    ReplicaFacts,
)

# Of the changes of k that a replica remembers so many are shown, the latest.
MOST_CHANGES = 96
MOST_TEXT = 300

T = TypeVar("T")


def attainment_part(snapshot: Mapping[str, Any]) -> AttainmentPart:
    """Of `Attainment.snapshot`; an ingress has no latencies there."""
    return AttainmentPart(
        percentile=snapshot.get("percentile"),
        num_requests=snapshot["num_requests"],
        outcomes=dict(snapshot["outcomes"]),
        attained=snapshot["attained"],
        ttft_s=snapshot.get("ttft_s"),
        tpot_s=snapshot.get("tpot_s"),
        itl_p99_s=snapshot.get("itl_p99_s"),
    )


def replica_facts(state: Mapping[str, Any], *, node_id: str, k_history: Sequence[tuple[float, int]]) -> ReplicaFacts:
    """Of a replica's `snapshot`, and of when k has changed."""
    cluster, steering = state["cluster"] or {}, state["steering"] or {}
    objectives, k_range = state["objectives"] or {}, cluster.get("range") or (None, None)
    problems = (state["user_config_problem"], *(cluster.get(name) for name in ("problem", "host_problem")))
    return ReplicaFacts(
        model=state["model"],
        node_id=node_id,
        bus=cluster.get("bus"),
        state=state["state"],
        device=state["device"],
        unit=state["unit"],
        num_units=state["num_units"],
        k=state["num_offloaded"],
        k_wanted=state["num_offloaded_wanted"],
        num_slots=state["num_slots"],
        limited_by=state["limited_by"],
        k_min=k_range[0],
        k_max=k_range[1],
        share_bytes_per_s=cluster.get("link_bytes_per_s"),
        link_bytes_per_s=steering.get("link_bytes_per_s"),
        lease_left_s=cluster.get("lease_left_s"),
        headroom_tokens=state["headroom_tokens"],
        kv_used_tokens=state["kv_used_tokens"],
        kv_capacity_tokens=state["kv_capacity_tokens"],
        num_running=state["running"],
        num_waiting=state["waiting"],
        num_at_door=state["at_door"],
        device_bytes=state["device_bytes"],
        device_capacity_bytes=state["device_capacity_bytes"],
        offloaded_bytes=state["offloaded_bytes"],
        host_bytes=state["host_bytes"],
        ttft_objective_s=objectives.get("ttft_s"),
        tpot_objective_s=objectives.get("tpot_s"),
        attainment=attainment_part(state["attainment"]),
        k_history=tuple(k_history)[-MOST_CHANGES:],
        startup_s=dict(state["startup_s"]),
        problems=tuple(str(each)[:MOST_TEXT] for each in problems if each),
    )


def node_facts(report: NodeReport, *, now_unix_s: float, coordinator: CoordinatorStatus | None) -> NodeFacts:
    """Of a node's report; what its buses' replicas may be using is the coordinator's."""
    telemetry, ledger = report.telemetry, report.ledger
    memory, pressure = _known(telemetry.host.memory), _known(telemetry.host.pressure)
    return NodeFacts(
        age_s=max(0.0, now_unix_s - telemetry.sampled_unix_s),
        host_available_bytes=memory.available_bytes if memory is not None else None,
        host_limit_bytes=memory.limit_bytes if memory is not None else None,
        pressure_percent=pressure.some_avg10_percent if pressure is not None else None,
        ledger_capacity_bytes=ledger.capacity_bytes if ledger and ledger.capacity_bytes < UNLIMITED_BYTES else None,
        ledger_reserved_bytes=ledger.reserved_bytes if ledger is not None else None,
        gpus=tuple(gpu_part(gpu) for gpu in telemetry.gpus),
        buses=tuple(_bus_part(report.node_id, bus, coordinator) for bus in telemetry.buses),
    )


def gpu_part(gpu: GpuReport) -> GpuPart:
    memory, utilisation = _known(gpu.memory), _known(gpu.utilisation)
    return GpuPart(
        index=gpu.index,
        name=_known(gpu.name),
        trouble=f"{gpu.trouble.cause}: {gpu.trouble.detail}"[:MOST_TEXT] if gpu.trouble is not None else None,
        memory_used_bytes=memory.used_bytes if memory is not None else None,
        memory_total_bytes=memory.total_bytes if memory is not None else None,
        compute_percent=utilisation.compute_percent if utilisation is not None else None,
        pcie_generation=_known(gpu.pcie_generation),
        pcie_width=_known(gpu.pcie_width),
        pcie_rx_bytes_per_s=_known(gpu.pcie_rx_bytes_per_s),
        temperature_c=_known(gpu.temperature_c),
        power_w=_known(gpu.power_w),
    )


def _bus_part(node_id: str, bus: BusReport, coordinator: CoordinatorStatus | None) -> BusPart:
    sharing = None
    if coordinator is not None:
        sharing = [each for each in coordinator.replicas if (each.node_id, each.bus_id) == (node_id, bus.name)]
    return BusPart(
        name=bus.name,
        bytes_per_s=_known(bus.bytes_per_s),
        rate_from=bus.rate_from,
        num_gpus=len(bus.gpus),
        committed_bytes_per_s=sum(each.committed_bytes_per_s for each in sharing) if sharing is not None else None,
        num_replicas=len(sharing) if sharing is not None else None,
    )


def coordinator_part(status: CoordinatorStatus | None, problem: str | None) -> CoordinatorPart:
    if status is None:
        return CoordinatorPart(problem=problem or "there is none")
    return CoordinatorPart(
        is_settling=status.is_settling,
        num_nodes=status.num_nodes,
        num_replicas=len(status.replicas),
        num_refused=status.num_refused,
        oldest_report_s=status.oldest_report_s,
    )


def _known(reading: Reading[T]) -> T | None:
    return None if isinstance(reading, Unavailable) else reading
