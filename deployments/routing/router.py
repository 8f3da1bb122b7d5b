"""Serve's request router by host-memory headroom: a request goes where admission has placed it, if it still can.

Runs in the process of the caller. Serve spins on an empty answer and hangs a request on an exception: neither happens.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.messages import GenerateRequest
from deployments.routing import shared_board as boards
from deployments.routing.headroom_report import HeadroomReport

logger = logging.getLogger(__name__)


class HeadroomRouter(RequestRouter):
    """Ranks replicas by the board's order; control calls go to the replica they name, else to the least busy one."""

    def initialize_state(self, **_: Any) -> None:
        """Serve's hook."""
        self._shared = boards.board_of(self.app_name)
        self._read: dict[str, tuple[dict[str, Any], HeadroomReport | None]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's hook: the running replicas, or their reports, have changed."""
        super().update_replicas(replicas)
        self._read = {each.replica_id.unique_id: self._read_stats(each) for each in replicas}
        with self._shared.locked() as board:
            board.observe({replica_id: report for replica_id, (_, report) in self._read.items()})
        self._shared.changed()

    def _read_stats(self, replica: RunningReplica) -> tuple[dict[str, Any], HeadroomReport | None]:
        """What the replica has said, and the report that it is. Serve tells of all when one has said anything."""
        stats = replica.routing_stats
        before = self._read.get(replica.replica_id.unique_id)
        return before if before is not None and before[0] == stats else (stats, HeadroomReport.from_json(stats))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve's hook."""
        super().on_replica_actor_died(replica_id)
        with self._shared.locked() as board:
            board.forget(replica_id.unique_id)
        self._shared.changed()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook: ranks of replicas, the best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # or an empty or full rank is tried again at once
        request = _generate_request(pending_request)
        if request is None:
            named = [each for each in candidate_replicas if each.replica_id.unique_id == _named(pending_request)]
            return [named or candidate_replicas]  # one that is not there is told so by whoever gets the call
        try:
            with self._shared.locked() as board:
                order = board.order(request.request_id)
        except Exception:  # would hang the request
            logger.exception("ranking failed; taking any replica")
            order = []
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        # One to a rank: of several Serve takes the one with the fewest requests, however long they are.
        ranks = [[by_id[each]] for each in order if each in by_id]
        return ranks or [candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve's hook: the replica has taken the call."""
        request = _generate_request(pending_request)
        if request is not None:
            with self._shared.locked() as board:
                board.moved(request.request_id, replica_id.unique_id)


def _generate_request(pending_request: PendingRequest) -> GenerateRequest | None:
    return next((each for each in pending_request.args if isinstance(each, GenerateRequest)), None)


def _named(pending_request: PendingRequest) -> object:
    """The replica that a control call is for: its argument `replica_id`."""
    return pending_request.kwargs.get("replica_id")
