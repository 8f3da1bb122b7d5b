"""The coordinator's status as Ray metrics."""

from __future__ import annotations

from collections import Counter

from cluster.coordinator.coordinator import CoordinatorStatus
from cluster.metrics.meters import Meters


def publish_status(meters: Meters, status: CoordinatorStatus) -> None:
    """Sets every gauge of the coordinator."""
    committed: Counter[str] = Counter()
    for replica in status.replicas:
        committed[replica.bus_id] += replica.committed_bytes_per_s
    meters.set("selectn_coordinator_epoch", status.life / 1e9)
    meters.set("selectn_coordinator_nodes", status.num_nodes)
    meters.set("selectn_coordinator_replicas", len(status.replicas))
    meters.total("selectn_coordinator_refused_reports", status.num_refused)
    if status.oldest_report_s is not None:
        meters.set("selectn_coordinator_report_age_seconds", status.oldest_report_s)
    for bus, bytes_per_s in committed.items():
        meters.set("selectn_coordinator_bus_committed_bytes_per_second", bytes_per_s, bus=bus)
