"""The cluster of `serving_cluster` under load, as tests and benchmarks look at it, and what they do to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from cluster.bus.allocation import allocate_bus
from cluster.coordinator.coordinator import CoordinatorStatus, ReplicaStatus
from deployments.commands.recovery import Loss
from deployments.commands.serving import free_port
from tests.support import serving_cluster
from tests.support.agent_cluster import Driver
from tests.support.load import Load, LongRequests, Reference
from tests.support.serving_cluster import APP, LINK_GB_PER_S, NUM_REPLICAS, Pace
from tests.support.waiting import wait_until, wait_within

START_TIMEOUT_S = 180
MAX_MOVES = 40
BUS_BYTES_PER_S = int(LINK_GB_PER_S * 1e9)

Ledgers = dict[str, tuple[int, int]]


@contextlib.contextmanager
def watched_cluster(
    pace: Pace,
    checkpoint: str,
    bounds_s: dict[Loss, float],
    *,
    nvml: dict[str, str] | None = None,
    with_greedy: bool = False,
) -> Iterator[WatchedCluster]:
    """The cluster, serving, under load until the end. Raises AssertionError if a process is left, or an answer wrong.

    See `serving_cluster.start`.
    """
    driver, port = Driver(), free_port("127.0.0.1")
    try:
        driver.run(serving_cluster.start, pace, checkpoint, port, nvml or {}, with_greedy)

        def is_serving() -> bool:
            state = driver.run(serving_cluster.application_states)[APP]
            assert not state.startswith("DEPLOY_FAILED"), state
            return state.startswith("RUNNING")

        wait_until(is_serving, START_TIMEOUT_S, "the application runs")
        reference = Reference(checkpoint)
        with Load(f"http://127.0.0.1:{port}", reference) as load:
            yield WatchedCluster(driver, load, pace, bounds_s)
        assert load.wrong == []
    finally:
        try:
            left = driver.run(serving_cluster.stop)
        finally:
            driver.close()
    assert left == []


class WatchedCluster:
    """Every wait is for a state, within the time that docs/operations.md states."""

    def __init__(self, driver: Driver, load: Load, pace: Pace, bounds_s: dict[Loss, float]) -> None:
        self.run, self.load, self.pace, self.bounds_s = driver.run, load, pace, bounds_s
        self.long = LongRequests(load.base_url, load.reference)

    # -- what there is ------------------------------------------------------------------------------------------

    def replicas(self) -> dict[str, list[ReplicaStatus]] | None:
        """Live ones by node name; None while the coordinator does not answer, or is too young to raise anybody."""
        status = self.run(serving_cluster.status)
        return None if status is None or status.is_settling else self._by_node(status)

    def _by_node(self, status: CoordinatorStatus) -> dict[str, list[ReplicaStatus]]:
        names = self.run(serving_cluster.node_names)
        found: dict[str, list[ReplicaStatus]] = {name: [] for name in NUM_REPLICAS}
        for each in status.replicas:
            if each.is_live and names.get(each.node_id) in found:
                found[names[each.node_id]].append(each)
        return found

    def replica_ids(self, node: str) -> set[str]:
        """Of those that its ledger lists."""
        return set(self.run(serving_cluster.replicas_by_node).get(node, ()))

    def has_converged(self, num_replicas: dict[str, int] | None = None) -> bool:
        """Whether each replica has what the allocation of all demands gives it, and no node has more or fewer."""
        wanted, by_node = num_replicas or NUM_REPLICAS, self.replicas()
        return by_node is not None and all(
            len(by_node[node]) == count and host_bytes_offered(by_node[node]) == most_host_bytes(by_node[node])
            for node, count in wanted.items()
        )

    def is_running(self) -> bool:
        """Whether Serve has every replica that it wants."""
        return bool(self.run(serving_cluster.application_states)[APP].startswith("RUNNING"))

    def ledgers(self) -> Ledgers:
        """(replicas, reserved bytes) by node; empty while an agent does not answer or is too young to know."""
        reports = self.run(serving_cluster.reports)
        ledgers = {name: each.ledger for name, each in reports.items() if each.ledger is not None}
        complete = {name: ledger for name, ledger in ledgers.items() if ledger.is_complete}
        if {*reports} != self.run(serving_cluster.living_nodes) or len(complete) != len(reports):
            return {}
        return {name: (len(ledger.replicas), ledger.reserved_bytes) for name, ledger in complete.items()}

    def whole_ledgers(self) -> Ledgers:
        """What the ledgers have when all is well, as soon as it is."""
        wait_until(self.is_running, START_TIMEOUT_S, "the application runs")
        wait_until(self.has_converged, START_TIMEOUT_S, "ranges")
        before = self._sequences()

        def are_newer() -> bool:
            return all(now > before.get(node, -1) + 1 for node, now in self._sequences().items())

        wait_until(lambda: are_newer() and bool(self.ledgers()), START_TIMEOUT_S, "ledgers of after that")
        return self.ledgers()

    def _sequences(self) -> dict[str, int]:
        """Of each node's latest report, which was sampled a while ago."""
        return {node: report.sequence for node, report in self.run(serving_cluster.reports).items()}

    # -- losses -------------------------------------------------------------------------------------------------

    def recovered(self, loss: Loss, ledgers: Ledgers, since_s: float, *, times: int = 1) -> float:
        """Seconds from `since_s` (monotonic) until all is as it was, which must be within what the docs state.

        That is: every replica runs, has the range of the allocation, is in its ledger and nobody else is; `times` in a
        row count as one after the other. And requests are answered.
        """
        end_s = since_s + times * self.bounds_s[loss]
        for is_so, what in (
            (self.is_running, lambda: self.run(serving_cluster.application_states)),
            (self.has_converged, lambda: self.run(serving_cluster.status)),
            (lambda: self.ledgers() == ledgers, lambda: f"{self.ledgers()}, not {ledgers}"),
        ):
            wait_within(is_so, end_s, f"back to full after {loss}", what)
        seconds = time.monotonic() - since_s
        self.run(serving_cluster.check_ledgers)
        self.load.wait_for_more()
        return seconds

    def kill_coordinator(self) -> float:
        """Returns when it was killed, on the monotonic clock, as soon as another is there."""
        killed = self._wait_for_pid(serving_cluster.coordinator_pid)
        began_s = self._kill(killed)
        self._wait_for_pid(serving_cluster.coordinator_pid, other_than=killed)
        return began_s

    def move_coordinator(self, node: str) -> None:
        """Kills it until Ray has it start on that node: where a detached actor of no CPUs goes cannot be asked for."""
        for _ in range(MAX_MOVES):
            wait_until(lambda: self.run(serving_cluster.coordinator_node) is not None, START_TIMEOUT_S, "a coordinator")
            if self.run(serving_cluster.coordinator_node) == node:
                return
            self.kill_coordinator()
        raise AssertionError(f"Ray started the coordinator {MAX_MOVES} times elsewhere than on {node}")

    @contextlib.contextmanager
    def coordinator_cut_off(self) -> Iterator[None]:
        """It neither hears nor answers while the block lasts."""
        pid = self._wait_for_pid(serving_cluster.coordinator_pid)
        self.run(serving_cluster.send_signal, pid, "SIGSTOP")
        try:
            yield
        finally:
            self.run(serving_cluster.send_signal, pid, "SIGCONT")

    def kill_agent(self, node: str) -> float:
        """Returns when it was killed, as soon as another is there."""
        killed = self._wait_for_pid(serving_cluster.agent_pid, node)
        began_s = self._kill(killed)
        self._wait_for_pid(serving_cluster.agent_pid, node, other_than=killed)
        return began_s

    def kill_replica(self, replica_id: str, pid: int | None = None) -> float:
        """Returns when it was killed, as soon as its node's ledger lacks it. `pid`: where it does not answer."""
        began_s = self._kill(pid or self.run(serving_cluster.replica_pids)[replica_id])

        def is_gone() -> bool:
            return all(replica_id not in there for there in self.run(serving_cluster.replicas_by_node).values())

        wait_within(is_gone, began_s + self.bounds_s["replica killed"], "the ledger forgets the replica")
        return began_s

    def kill_node(self, node: str) -> float:
        """Returns when it was killed, as soon as Ray counts it as dead."""
        began_s = time.monotonic()
        self.run(serving_cluster.kill_node, node)
        is_gone_by_s = began_s + self.bounds_s["node lost"]
        wait_within(lambda: node not in self.run(serving_cluster.living_nodes), is_gone_by_s, "the node counts as dead")
        return began_s

    def add_node(self, node: str) -> float:
        """Returns when it joined."""
        self.run(serving_cluster.add_node, node)
        return time.monotonic()

    def _kill(self, pid: int) -> float:
        began_s = time.monotonic()
        self.run(serving_cluster.send_signal, pid, "SIGKILL")
        return began_s

    def _wait_for_pid(self, ask: Callable[..., int | None], *arguments: str, other_than: int | None = None) -> int:
        found: list[int] = []

        def is_there() -> bool:
            pid = self.run(ask, *arguments)
            if pid is not None and pid != other_than:
                found.append(pid)
            return bool(found)

        wait_until(is_there, max(self.bounds_s.values()), f"{ask.__name__} other than {other_than}")
        return found[0]


def host_bytes_offered(replicas: list[ReplicaStatus]) -> int:
    """Host memory that the replicas' shares, as they reported them, let them use."""
    total = 0
    for each in replicas:
        affordable = each.allowed.link_bytes_per_s * each.link.step_s // each.link.unit_bytes
        total += each.link.unit_bytes * int(min(each.link.k_max, affordable))
    return total


def most_host_bytes(replicas: list[ReplicaStatus]) -> int:
    return allocate_bus({each.replica_id: each.link for each in replicas}, BUS_BYTES_PER_S).host_bytes
