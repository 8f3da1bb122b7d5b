"""Whom an ingress asks for its status, by Ray: the replicas and ingresses of its application, and the whole cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.coordinator.actor import COORDINATOR_NAME
from cluster.coordinator.coordinator import CoordinatorStatus
from cluster.node.agents import NAMESPACE, latest_reports
from deployments.status.collect import WAIT_S, IngressAnswer, NodesAnswer, ReplicaAnswer
from selectn_core.decision_log import DecisionLog, LoggedDecision

# Calls of Ray that block, in threads of their own: each is bounded where Ray lets it be.
CALL_S, NUM_THREADS = 0.8 * WAIT_S, 3
# A replica that has not answered by then is asked anew.
GIVE_UP_S = 30.0

T = TypeVar("T")


class ClusterSources:
    """`Sources` for one ingress."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        *,
        own: Callable[[], IngressAnswer],
        decisions: DecisionLog,
        replica_ids: Callable[[], Collection[str]],
    ) -> None:
        """`replica_ids` are those that run. Raises RuntimeError outside a Serve replica."""
        context = serve.get_replica_context()
        self.ingress_id: str = context.replica_id.unique_id
        self._app_name, self._deployment = context.app_name, context.deployment
        self._replicas, self.own, self._decisions, self.replica_ids = replicas, own, decisions, replica_ids
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="status")  # started when somebody looks

    async def replica(self, replica_id: str) -> ReplicaAnswer:
        call = self._replicas.status.remote(replica_id=replica_id)
        try:
            return await asyncio.wait_for(_awaited(call), GIVE_UP_S)
        except TimeoutError:
            call.cancel()
            raise

    async def ingresses(self) -> Sequence[IngressAnswer]:
        peers = await self._in_thread(lambda: self._peers)
        answers = await peers.broadcast("status").results_async(timeout_s=CALL_S, return_exceptions=True)
        return [each for each in answers if isinstance(each, IngressAnswer)]

    @cached_property
    def _peers(self) -> DeploymentHandle:
        """This deployment, itself among it. Not made before somebody looks: a handle has a router of its own."""
        return serve.get_deployment_handle(self._deployment, self._app_name)

    async def nodes(self) -> NodesAnswer:
        return await self._in_thread(_nodes)

    async def coordinator(self) -> CoordinatorStatus | None:
        return await self._in_thread(_coordinator)

    async def find(self, decision_id: str, place: str) -> LoggedDecision | None:
        if place == self.ingress_id:
            return self._decisions.find(place, decision_id)
        if place in self.replica_ids():
            return await self._replicas.decision.remote(decision_id, replica_id=place)
        peers = await self._in_thread(lambda: self._peers)
        answers = await peers.broadcast("decision", decision_id).results_async(timeout_s=CALL_S, return_exceptions=True)
        return next((each for each in answers if isinstance(each, LoggedDecision)), None)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


async def _awaited(call: Awaitable[T]) -> T:
    """A coroutine, which wait_for can cancel, around Serve's response objects, which are not futures."""
    return await call


def _nodes() -> NodesAnswer:
    names = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
    return NodesAnswer(names=names, reports=latest_reports(CALL_S))


def _coordinator() -> CoordinatorStatus | None:
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return None
    return ray.get(actor.status.remote(), timeout=CALL_S)
