"""Replicas without an engine, as plain Ray actors, and a node's reports: for tests of the coordinator."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from cluster.coordinator.actor import CoordinatorConnection
from cluster.coordinator.coordinator import CoordinatorConfig
from cluster.protocol.messages import BusState, LinkDemand, NodeState
from cluster.replica.lease import RangeHolder
from cluster.replica.range_client import RangeClient, RangeState

NODE, BUS = "node", "bus"


class BusUser:
    """A replica that notes when it was told what. All processes of a machine share the monotonic clock."""

    def __init__(self, replica_id: str, config: CoordinatorConfig, link: LinkDemand, hold_s: float) -> None:
        self._told: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._client = RangeClient(
            RangeHolder(replica_id=replica_id, node_id=NODE, bus_id=BUS),
            CoordinatorConnection(config),
            lambda allowed, k_range: self._told.append((time.monotonic(), allowed.link_bytes_per_s)),
            link=link,
            hold_s=hold_s,
        )
        self._client.start()

    def state(self) -> RangeState:
        return self._client.state

    def set_link(self, link: LinkDemand) -> None:
        self._client.set_demand(link=link)

    def told(self) -> list[tuple[float, int]]:
        """(when, bytes/s it may use from then on)."""
        return self._told

    def close(self) -> None:
        self._client.close()
        self._told.append((time.monotonic(), 0))


class ReportingNode:
    """Reports a node with one bus for as long as a `with` block lasts; `replica_ids` may be changed meanwhile."""

    def __init__(self, config: CoordinatorConfig, bytes_per_s: int, replica_ids: tuple[str, ...], period_s: float):
        self.replica_ids = replica_ids
        self._connection, self._bytes_per_s, self._period_s = CoordinatorConnection(config), bytes_per_s, period_s
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ReportingNode:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._should_end.set()
        self._thread.join()

    def _run(self) -> None:
        heard_life = 0
        while not self._should_end.wait(self._period_s):
            bus = BusState(
                bus_id=BUS,
                bytes_per_s=self._bytes_per_s,
                num_devices=len(self.replica_ids),
                replica_ids=self.replica_ids,
            )
            report = NodeState(
                node_id=NODE,
                sequence=time.time_ns(),
                heard_life=heard_life,
                buses=(bus,),
            )
            try:
                heard_life = self._connection.report_node(report)
            except Exception:
                heard_life = 0  # a test is killing the coordinator: the next report finds it again
