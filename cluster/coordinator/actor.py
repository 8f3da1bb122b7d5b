"""The coordinator as a Ray actor: named, detached, restartable; replicas long-poll it, since nobody can call them.

One asyncio loop, so the state machine needs no lock. A restarted actor is a new life with nothing remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig, CoordinatorStatus
from cluster.coordinator.metrics import publish_status
from cluster.metrics.meters import Meters
from cluster.node.agent import ActorSink
from cluster.node.agents import NAMESPACE
from cluster.node.node_state import node_state
from cluster.protocol.messages import NodeState, RangeUpdate, ReplicaReport
from cluster.protocol.node_reports import NodeReport

COORDINATOR_NAME = "selectn_coordinator"
# Every replica has one call waiting, and a second one for a moment when its demand changes.
MAX_WAITING_CALLS = 20_000
PUBLISH_S = 1.0


class CoordinatorActor:
    """What Ray makes an actor of; see `open_coordinator`."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._core = Coordinator(config, life=time.time_ns(), now_s=time.monotonic())
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._swept_s = time.monotonic()
        self._meters = Meters("coordinator")
        self._publishing: asyncio.Task[None] | None = None

    async def wait_for_update(self, report: ReplicaReport, hold_s: float) -> RangeUpdate | None:
        """What the replica may do: at once if that is something else than it reported, else after `hold_s`.

        The answer renews the lease in either case. None: the report is an old one, a newer one of the same replica
        took its place, or there is nothing that may be given out yet.
        """
        now_s = time.monotonic()
        self._sweep(now_s)
        heard = self._core.on_replica_report(report, now_s)
        if heard == "old":
            return None
        _wake(self._waiting.pop(report.replica_id, None))
        wanting = {other.replica_id for other in self._core.wanting_updates(report, now_s)} if heard == "new" else ()
        for replica_id in wanting:
            _wake(self._waiting.get(replica_id))
        if report.is_leaving:
            return None
        if report.replica_id not in wanting and not await self._is_current_after(report, hold_s):
            return None
        return self._core.update_for(report, time.monotonic())

    async def report_node(self, report: NodeState) -> int:
        """Takes a node's state; returns the `heard_life` of its next report."""
        now_s = time.monotonic()
        self._core.on_node_report(report, now_s)
        self._sweep(now_s)
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish())
        return self._core.life

    async def status(self) -> CoordinatorStatus:
        """What the coordinator knows, for people and dashboards."""
        return self._core.status(time.monotonic())

    async def _publish(self) -> None:
        """Metrics, once a second from the first report on: a node that falls silent is to be seen too."""
        while True:
            publish_status(self._meters, self._core.status(time.monotonic()))
            await asyncio.sleep(PUBLISH_S)

    async def _is_current_after(self, report: ReplicaReport, hold_s: float) -> bool:
        """Waits until there is something new for the replica; False if a newer report of it came instead."""
        future = self._waiting[report.replica_id] = asyncio.get_running_loop().create_future()
        try:
            with contextlib.suppress(TimeoutError):
                # The caller's own number: what is none is no time at all.
                await asyncio.wait_for(future, min(hold_s, self._config.lease_s / 2) if hold_s >= 0 else 0)
        finally:
            is_current = self._waiting.get(report.replica_id) is future
            if is_current:
                del self._waiting[report.replica_id]
        return is_current

    def _sweep(self, now_s: float) -> None:
        if now_s >= self._swept_s + self._config.lease_s / 2:
            self._swept_s = now_s
            self._core.sweep(now_s)


def open_coordinator(config: CoordinatorConfig) -> ActorHandle:
    """The cluster's coordinator, created if there is none; one that exists keeps its configuration.

    Ray restarts it for as long as there is a node to run on. Raises RayError if Ray cannot be asked.
    """
    actor = ray.remote(CoordinatorActor).options(
        name=COORDINATOR_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=MAX_WAITING_CALLS,
    )
    return actor.remote(config)


class CoordinatorConnection:
    """Calls of the coordinator that find it again, or make it anew, after it was lost. For RangeClient."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._handle: ActorHandle | None = None

    def __call__(self, report: ReplicaReport, hold_s: float) -> RangeUpdate | None:
        """`CoordinatorActor.wait_for_update`. Blocks for `hold_s` and a while; raises RayError if it fails."""
        return self._call("wait_for_update", report, hold_s, timeout_s=hold_s + self._config.lease_s)

    def report_node(self, report: NodeState) -> int:
        """`CoordinatorActor.report_node`; blocks for up to a lease, and raises RayError."""
        return self._call("report_node", report, timeout_s=self._config.lease_s)

    def _call(self, method: str, *arguments: object, timeout_s: float) -> Any:
        handle = self._handle or open_coordinator(self._config)
        self._handle = None
        result = ray.get(getattr(handle, method).remote(*arguments), timeout=timeout_s)
        self._handle = handle
        return result


class CoordinatorSink:
    """Where node agents send their reports: to the coordinator, in its words. Pickled into the agents' processes.

    Where there is none nobody is told: a replica that looks for it will make it.
    """

    def __init__(self, *, num_sharing: int) -> None:
        """`num_sharing`: see `node_state`."""
        self._send = ActorSink(COORDINATOR_NAME, namespace=NAMESPACE, method="report_node")
        self._num_sharing = num_sharing
        self._heard_life, self._heard_s = 0, 0.0

    def __call__(self, report: NodeReport) -> None:
        """Returns when a report has been taken; raises where it was not, and knows of no life then."""
        # A sample from before this life was heard of may lack a replica that the one before it knew.
        is_newer = report.telemetry.sampled_s >= self._heard_s
        state = node_state(report, heard_life=self._heard_life if is_newer else 0, num_sharing=self._num_sharing)
        heard_life, self._heard_life = self._heard_life, 0
        self._heard_life = self._send(state)
        if self._heard_life != heard_life:
            self._heard_s = time.monotonic()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
