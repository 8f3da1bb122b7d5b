"""The client's thread against a coordinator in this process, and against calls that fail or hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig
from cluster.protocol.messages import Allowance, BusState, LinkDemand, NodeState, RangeUpdate, ReplicaReport
from cluster.replica.lease import RangeHolder
from cluster.replica.range_client import RangeClient
from tests.support.waiting import wait_until

LEASE_S, TIMEOUT_S = 1.0, 30.0
LINK = LinkDemand(k_min=1, k_max=30, unit_bytes=10, step_s=1.0)


class LocalCoordinator:
    """A settled coordinator, one node, one bus of 1000 bytes/s for two devices. `fault` happens before every call."""

    def __init__(self) -> None:
        config = CoordinatorConfig(lease_s=LEASE_S)
        now_s = time.monotonic()
        self.core = Coordinator(config, life=1, now_s=now_s - 2 * LEASE_S)
        bus = BusState(bus_id="b", bytes_per_s=1000, num_devices=2, replica_ids=("a",))
        report = NodeState(node_id="n", sequence=1, heard_life=1, buses=(bus,))
        self.core.on_node_report(report, now_s)
        self.fault: Callable[[], object] = lambda: None
        self.lock = threading.Lock()

    def __call__(self, report: ReplicaReport, hold_s: float) -> RangeUpdate | None:
        self.fault()
        with self.lock:
            if self.core.on_replica_report(report, time.monotonic()) == "old" or report.is_leaving:
                return None
            return self.core.update_for(report, time.monotonic())


class Told:
    """What on_range was called with; `wait_for` blocks until it was called so."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, int]]] = []
        self.changed = threading.Condition()

    def __call__(self, allowed: Allowance, k_range: tuple[int, int]) -> None:
        with self.changed:
            self.calls.append((allowed.link_bytes_per_s, k_range))
            self.changed.notify_all()

    def wait_for(self, link_bytes_per_s: int, k_range: tuple[int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: (link_bytes_per_s, k_range) in self.calls, TIMEOUT_S), self.calls


@pytest.fixture
def coordinator() -> LocalCoordinator:
    return LocalCoordinator()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def client(coordinator, told):
    holder = RangeHolder(replica_id="a", node_id="n", bus_id="b")
    with RangeClient(holder, coordinator, told, link=LINK, hold_s=0.1) as client:
        yield client


def test_a_range_and_the_range_after_a_change_of_demand(client, told):
    told.wait_for(1000, (1, 30))
    client.set_demand(link=LinkDemand(k_min=2, k_max=40, unit_bytes=10, step_s=0.25))
    told.wait_for(1000, (2, 25))
    assert client.state.has_lease


def test_it_falls_back_while_calls_hang_and_recovers(client, coordinator, told):
    told.wait_for(1000, (1, 30))
    client.set_demand(link=LinkDemand(k_min=1, k_max=90, unit_bytes=10, step_s=1.0))
    told.wait_for(1000, (1, 90))
    go_on = threading.Event()
    coordinator.fault = go_on.wait
    told.wait_for(500, (1, 50))
    assert not client.state.has_lease
    told.calls.clear()
    go_on.set()
    told.wait_for(1000, (1, 90))


def test_it_falls_back_while_calls_fail_and_says_why(client, coordinator, told):
    told.wait_for(1000, (1, 30))

    def fail() -> None:
        raise ConnectionError("no route")

    coordinator.fault = fail
    told.wait_for(500, (1, 30))
    assert client.state.last_error == "no route"
    told.calls.clear()
    coordinator.fault = lambda: None
    told.wait_for(1000, (1, 30))
    assert client.state.last_error is None


def test_a_callback_that_fails_ends_nothing(coordinator, told):
    def fail_first(allowed: Allowance, k_range: tuple[int, int]) -> None:
        told(allowed, k_range)
        if len(told.calls) == 1:
            raise RuntimeError("not now")

    holder = RangeHolder(replica_id="a", node_id="n", bus_id="b")
    with RangeClient(holder, coordinator, fail_first, link=LINK, hold_s=0.1) as client:
        told.wait_for(1000, (1, 30))
        client.set_demand(link=LinkDemand(k_min=1, k_max=20, unit_bytes=10, step_s=1.0))
        told.wait_for(1000, (1, 20))


def test_closing_says_goodbye(client, coordinator, told):
    told.wait_for(1000, (1, 30))
    client.close()
    assert coordinator.core.status(time.monotonic()).replicas == ()


def test_nothing_is_allowed_and_nobody_called_before_the_first_answer(coordinator, told):
    def fail() -> None:
        raise ConnectionError("no route")

    coordinator.fault = fail
    holder = RangeHolder(replica_id="a", node_id="n", bus_id="b")
    with RangeClient(holder, coordinator, told, link=LINK, hold_s=0.1) as client:
        wait_until(lambda: client.state.last_error is not None, TIMEOUT_S, "an error")
        assert client.state.allowed.link_bytes_per_s == 0
        assert told.calls == []
