"""Serve's own routing around a request router, in this process: everything is real but the replicas' actors.

The one place in the tests that touches private names of Ray for that. Serve has no public way to run a request router
without a cluster; its own tests do it like this (`test_pow_2_request_router.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

MAX_ONGOING_REQUESTS = 4


class Actor:
    """In place of a replica's actor, which would need a cluster: it says how many requests it has, or is dead."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._actor_id = id(self)
        self.get_num_ongoing_requests = self

    def remote(self) -> asyncio.Future[int]:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        answer.set_result(self.num_requests)
        return answer


@dataclass(frozen=True, eq=False)
class _Info(RunningReplicaInfo):
    """What Serve's controller tells of a replica."""

    def get_actor_handle(self) -> Any:
        return _actors[self.actor_name]


_actors: dict[str, Actor] = {}


class ServeRouting:
    """A request router of one deployment, fed and asked as Serve does it. Use it inside an event loop."""

    def __init__(self, router_class: type[RequestRouter], app_name: str) -> None:
        self._deployment = DeploymentID(name="Replica", app_name=app_name)
        self.router = router_class(
            deployment_id=self._deployment,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=False,
            create_replica_wrapper_func=RunningReplica,
            initial_backoff_s=0.001,
            max_backoff_s=0.01,
        )
        self.router.initialize_state()
        self.actors: dict[str, Actor] = {}

    def running(self, routing_stats: Mapping[str, Mapping[str, Any]]) -> None:
        """The replicas that run, by name, and what each has reported last."""
        self.actors = {name: self.actors.get(name, Actor()) for name in routing_stats}
        _actors.clear()
        _actors.update(self.actors)
        self.router._update_running_replicas([self._info(name, stats) for name, stats in routing_stats.items()])

    def died(self, name: str) -> None:
        """A call has found the replica's actor dead."""
        self.router.on_replica_actor_died(self._id(name))

    async def route(self, *args: Any, **kwargs: Any) -> str:
        """The replica that a call with these arguments goes to. Waits as long as Serve does."""
        metadata = RequestMetadata(request_id="r", internal_request_id=f"i{id(args)}", call_method="generate")
        pending = PendingRequest(args=list(args), kwargs=kwargs, metadata=metadata)
        replica = await self.router._choose_replica_for_request(pending)
        self.router.on_request_routed(pending, replica.replica_id, None)
        return str(replica.replica_id.unique_id)

    def _id(self, name: str) -> ReplicaID:
        return ReplicaID(unique_id=name, deployment_id=self._deployment)

    def _info(self, name: str, stats: Mapping[str, Any]) -> _Info:
        return _Info(
            replica_id=self._id(name),
            node_id="n",
            node_ip="127.0.0.1",
            availability_zone=None,
            actor_name=name,
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            routing_stats=dict(stats),
        )
