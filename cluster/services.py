"""What runs once per cluster beside the replicas: the coordinator, and an agent on every node that reports to it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated

import ray

from cluster.coordinator.actor import COORDINATOR_NAME, CoordinatorSink, open_coordinator
from cluster.coordinator.coordinator import LEASE, CoordinatorConfig
from cluster.node.agents import NAMESPACE, start_node_agents, stop_node_agents
from cluster.node.telemetry import TelemetryConfig
from selectn_core.bounds import Bounds, check_numbers, require
from selectn_core.config import MOST_GIB


@dataclass(frozen=True, kw_only=True)
class CoordinationConfig:
    """How replicas share buses and host memory; the first application of a cluster decides.

    With `coordinator` false every replica is on its own: its bus and its node's host memory are taken to be free.
    `lease_s`: for so long what the coordinator allowed counts; `period_s`: how often it is asked again. `host_gib` is
    what replicas may reserve of each node's host memory; None: nine tenths of its limit.
    """

    coordinator: bool = True
    lease_s: Annotated[float, LEASE] = 10.0
    period_s: Annotated[float, Bounds(above=0, at_most=LEASE.at_most / 4)] = 2.0
    host_gib: Annotated[float | None, Bounds(at_least=0, at_most=MOST_GIB)] = None

    def __post_init__(self) -> None:
        check_numbers(self, "cluster")
        allowed = f"more than 0, at most a quarter of cluster.lease_s: {self.lease_s / 4:g}"
        require(0 < self.period_s <= self.lease_s / 4, "cluster.period_s", self.period_s, allowed)

    @property
    def protocol(self) -> CoordinatorConfig:
        """What the coordinator is made from."""
        return CoordinatorConfig(lease_s=self.lease_s)


def start_services(config: CoordinationConfig, telemetry: TelemetryConfig, *, num_sharing: int) -> None:
    """Has this Ray cluster run the coordinator and the node agents, unless it does; they outlive the caller.

    `num_sharing`: how many emulated devices may share a bus. Raises RayError if Ray does not start them in time.
    """
    open_coordinator(config.protocol)
    reservable_bytes = None if config.host_gib is None else int(config.host_gib * (1 << 30))
    sink = CoordinatorSink(num_sharing=num_sharing)
    start_node_agents(telemetry, sink, reservable_bytes=reservable_bytes)


def stop_services() -> None:
    """Ends them. Harmless where there are none; a replica that still runs makes the coordinator anew."""
    stop_node_agents()
    with contextlib.suppress(ValueError):  # there is none of that name
        ray.kill(ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE), no_restart=True)
