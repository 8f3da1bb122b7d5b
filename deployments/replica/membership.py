"""Makes a Serve replica a member of its cluster, and the cluster's services run, if nobody has yet."""

from __future__ import annotations

import logging

import ray
from ray import serve

from cluster.coordinator.actor import CoordinatorConnection
from cluster.node.telemetry import TelemetryConfig
from cluster.replica.member import AgentConnection, Member
from cluster.services import CoordinationConfig, start_services

logger = logging.getLogger(__name__)


def open_member(config: CoordinationConfig, telemetry: TelemetryConfig, *, num_sharing: int) -> Member | None:
    """This replica's membership; None where the configuration wants none. Blocks while services start."""
    if not config.coordinator:
        return None
    try:
        start_services(config, telemetry, num_sharing=num_sharing)
    except ray.exceptions.RayError as error:  # a replica of another node may have more luck, or this one later
        logger.warning("the cluster's services do not start: %s", error)
    node_id, context = ray.get_runtime_context().get_node_id(), serve.get_replica_context()
    return Member(
        replica_id=f"{context.app_name}/{context.replica_id.unique_id}",
        node_id=node_id,
        agent=AgentConnection(node_id),
        exchange=CoordinatorConnection(config.protocol),
        hold_s=config.period_s,
    )
