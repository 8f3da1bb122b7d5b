"""Replicas, agents and the coordinator together on three Ray nodes, under real HTTP load, whatever is killed.

All waiting is for a state, with a generous limit; nothing is asserted of how long it took.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from cluster.bus_allocation import allocate_bus
from cluster.coordinator import CoordinatorStatus, ReplicaStatus
from deployments.serving import free_port
from tests.integration import serving_cluster
from tests.integration.agent_cluster import Driver
from tests.integration.processes import wait_until
from tests.integration.serving_cluster import HOST_GIB, LINK_GB_PER_S

TIMEOUT_S = 90
SIDES = {"left": 2, "right": 1}
BUS_BYTES_PER_S = int(LINK_GB_PER_S * 1e9)
HOST_BYTES = int(HOST_GIB * 2**30)
PROMPTS = [f"request number {number}" for number in range(4)]


class Load:
    """Clients that ask one thing after another of both applications, and compare every answer with the expected."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.num_answers = dict.fromkeys(SIDES, 0)
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self._expected: dict[str, str] = {}
        self._should_end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(side, number)) for side in SIDES for number in range(2)
        ]

    def __enter__(self) -> Load:
        with httpx.Client(base_url=self.base_url, timeout=TIMEOUT_S, trust_env=False) as client:
            for prompt in PROMPTS:
                self._expected[prompt] = self._ask(client, "right", prompt).json()["choices"][0]["text"]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._should_end.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self) -> None:
        """Returns when both applications have answered a few more requests."""
        before = dict(self.num_answers)

        def have_answered() -> bool:
            return all(self.num_answers[side] >= before[side] + 3 for side in SIDES)

        wait_until(have_answered, TIMEOUT_S, "answers from both applications")

    def _run(self, side: str, number: int) -> None:
        with httpx.Client(base_url=self.base_url, timeout=TIMEOUT_S, trust_env=False) as client:
            while not self._should_end.is_set():
                prompt = PROMPTS[number % len(PROMPTS)]
                number += 1
                try:
                    response = self._ask(client, side, prompt)
                except httpx.HTTPError as error:
                    self.failed.append(f"{side}: {error!r}")
                    continue
                if response.status_code != 200:
                    self.failed.append(f"{side}: {response.status_code} {response.text[:300]}")
                    self._should_end.wait(0.2)
                    continue
                text = response.json()["choices"][0]["text"]
                if text != self._expected[prompt]:
                    self.wrong.append(f"{side}: {prompt!r}: {text!r} instead of {self._expected[prompt]!r}")
                self.num_answers[side] += 1

    def _ask(self, client: httpx.Client, side: str, prompt: str) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return client.post(f"/{side}/v1/completions", json=body)


@pytest.fixture(scope="module")
def driver(checkpoint) -> Iterator[tuple[Driver, str]]:
    """The cluster, serving. Fails at the end if a process is left, or if the coordinator ever promised too much."""
    driver, port = Driver(), free_port("127.0.0.1")
    try:
        driver.run(serving_cluster.start, checkpoint, port)

        def is_serving() -> bool:
            states = driver.run(serving_cluster.application_states)
            assert not any(states[side].startswith("DEPLOY_FAILED") for side in SIDES), states
            return all(states[side].startswith("RUNNING") for side in SIDES)

        wait_until(is_serving, 2 * TIMEOUT_S, "both applications running")
        yield driver, f"http://127.0.0.1:{port}"
    finally:
        try:
            left = driver.run(serving_cluster.stop)
        finally:
            driver.close()
    assert left == []


@pytest.fixture(scope="module")
def serving(driver) -> Iterator[Cluster]:
    runner, base_url = driver
    with Load(base_url) as load:
        yield Cluster(runner, load)
    assert load.wrong == []


class Cluster:
    """The cluster under load, as the tests look at it."""

    def __init__(self, driver: Driver, load: Load) -> None:
        self.run, self.load = driver.run, load

    def replicas(self, status: CoordinatorStatus) -> dict[str, list[ReplicaStatus]]:
        """Live ones by side."""
        live = [each for each in status.replicas if each.is_live]
        return {side: [each for each in live if each.replica_id.startswith(f"{side}/")] for side in SIDES}

    def has_converged(self) -> bool:
        """Whether each replica has what the allocation of all demands gives it, and the coordinator knows no other."""
        status = self.run(serving_cluster.status)
        if status is None or status.is_settling or len(status.replicas) != sum(SIDES.values()):
            return False
        return all(
            len(replicas) == SIDES[side] and host_bytes_offered(replicas) == most_host_bytes(replicas)
            for side, replicas in self.replicas(status).items()
        )

    def ledgers(self) -> dict[str, tuple[int, int]]:
        """(replicas, reserved bytes) by node; empty while an agent does not answer or is too young to know."""
        reports = self.run(serving_cluster.reports)
        complete = [each for each in reports.values() if each.ledger is not None and each.ledger.is_complete]
        if len(complete) != len(SIDES) + 1:
            return {}
        assert max(each.ledger.reserved_bytes for each in complete) <= HOST_BYTES
        return {name: (len(each.ledger.replicas), each.ledger.reserved_bytes) for name, each in reports.items()}

    def wait_until_whole(self, ledgers: dict[str, tuple[int, int]]) -> None:
        """Ranges are those of the allocation again, the ledgers have what they had, and requests are answered."""
        wait_until(self.has_converged, TIMEOUT_S, f"ranges to converge: {self.run(serving_cluster.status)}")
        wait_until(lambda: self.ledgers() == ledgers, TIMEOUT_S, f"ledgers {ledgers}, not {self.ledgers()}")
        self.run(serving_cluster.check_ledgers)
        self.load.wait_for_more()

    def check_accounts(self) -> int:
        """No change that the coordinator ever made promised more than a bus has. How many there were."""
        accounts = self.run(serving_cluster.accounts)
        for each in accounts:
            assert max(each.used_bytes_per_s.values()) <= BUS_BYTES_PER_S, each
            assert not each.is_raise or each.promised_bytes_per_s <= BUS_BYTES_PER_S, each
        return len(accounts)


def host_bytes_offered(replicas: list[ReplicaStatus]) -> int:
    """Host memory that the replicas' shares, as they reported them, let them use."""
    total = 0
    for each in replicas:
        affordable = each.allowed.link_bytes_per_s * each.link.step_s // each.link.unit_bytes
        total += each.link.unit_bytes * int(min(each.link.k_max, affordable))
    return total


def most_host_bytes(replicas: list[ReplicaStatus]) -> int:
    return allocate_bus({each.replica_id: each.link for each in replicas}, BUS_BYTES_PER_S).host_bytes


@pytest.fixture(scope="module")
def ledgers(serving) -> dict[str, tuple[int, int]]:
    """What they have when all is well."""
    wait_until(serving.has_converged, TIMEOUT_S, "ranges")
    wait_until(lambda: bool(serving.ledgers()), TIMEOUT_S, "ledgers")
    return serving.ledgers()


def test_replicas_share_buses_and_host_memory(serving, ledgers):
    """The left bus cannot stream all layers of two replicas; each node has one store and its replicas' KV."""
    status = serving.run(serving_cluster.status)
    (right,), lefts = serving.replicas(status)["right"], serving.replicas(status)["left"]
    assert host_bytes_offered([right]) == 4 * right.link.unit_bytes
    assert host_bytes_offered(lefts) == 5 * right.link.unit_bytes, "8 MB/s at 1.5 MB/s for a layer"
    assert min(host_bytes_offered([each]) for each in lefts) > 0
    snapshot = serving.run(serving_cluster.snapshot, "right")
    assert snapshot["cluster"]["range"] == [right.link.k_min, 4]
    assert snapshot["cluster"]["epoch"]["life"] == status.life
    assert snapshot["cluster"]["lease_left_s"] > 0
    kv_bytes = snapshot["memory"]["host"]["kv_swap_bytes"]
    (num_left, left_bytes), (num_right, right_bytes) = ledgers["left"], ledgers["right"]
    assert (num_left, num_right) == (2, 1)
    assert left_bytes - right_bytes == kv_bytes, "the store counts once"
    assert right_bytes - kv_bytes >= snapshot["host_bytes"]
    assert ledgers["head"] == (0, 0)


def test_a_replica_for_which_its_node_has_no_host_memory_is_refused(serving):
    """It does not start, and Serve says why."""

    def state() -> str:
        return serving.run(serving_cluster.application_states)["greedy"]

    wait_until(lambda: state().startswith("DEPLOY_FAILED"), TIMEOUT_S, "the refusal")
    assert "refuses host memory" in state()
    assert "lower host.kv_gib" in state()


def test_the_coordinator_is_killed_twice_in_a_row(serving, ledgers):
    num_failed = len(serving.load.failed)
    killed: list[int] = []

    def is_another() -> bool:
        pid = serving.run(serving_cluster.coordinator_pid)
        return pid is not None and pid not in killed

    for _ in range(2):
        wait_until(is_another, TIMEOUT_S, "a coordinator")
        killed.append(serving.run(serving_cluster.coordinator_pid))
        serving.run(serving_cluster.send_signal, killed[-1], "SIGKILL")
    wait_until(is_another, TIMEOUT_S, "a third coordinator")
    serving.wait_until_whole(ledgers)
    assert serving.load.failed[num_failed:] == []


def test_the_coordinator_is_cut_off_for_longer_than_a_lease(serving, ledgers):
    num_failed = len(serving.load.failed)
    pid = serving.run(serving_cluster.coordinator_pid)
    serving.run(serving_cluster.send_signal, pid, "SIGSTOP")
    try:

        def has_lost_its_lease() -> bool:
            return serving.run(serving_cluster.snapshot, "right")["cluster"]["lease_left_s"] is None

        wait_until(has_lost_its_lease, TIMEOUT_S, "the lease to run out")
        fallen = serving.run(serving_cluster.snapshot, "right")["cluster"]
        assert fallen["link_bytes_per_s"] == fallen["fallback_bytes_per_s"] == BUS_BYTES_PER_S // 2
        serving.load.wait_for_more()
    finally:
        serving.run(serving_cluster.send_signal, pid, "SIGCONT")
    serving.wait_until_whole(ledgers)
    assert serving.load.failed[num_failed:] == []


def test_an_agent_is_killed(serving, ledgers):
    """Its successor learns from the replicas' claims what is in use."""
    num_failed, pid = len(serving.load.failed), serving.run(serving_cluster.agent_pid, "left")
    before = serving.run(serving_cluster.reports)["left"].agent_id
    serving.run(serving_cluster.send_signal, pid, "SIGKILL")

    def is_another() -> bool:
        report = serving.run(serving_cluster.reports).get("left")
        return report is not None and report.agent_id != before

    wait_until(is_another, TIMEOUT_S, "another agent")
    serving.wait_until_whole(ledgers)
    assert serving.load.failed[num_failed:] == []


def test_a_replica_is_killed(serving, ledgers):
    """Its share and its host memory go to the one that takes its place. Only its own requests may fail."""
    num_failed = len(serving.load.failed)
    before = {each.replica_id for each in serving.run(serving_cluster.status).replicas}
    pids = serving.run(serving_cluster.processes_of, "ServeReplica:left:SelectNReplica")
    serving.run(serving_cluster.send_signal, pids[0], "SIGKILL")

    def is_replaced() -> bool:
        status = serving.run(serving_cluster.status)
        return status is not None and len({each.replica_id for each in status.replicas} - before) == 1

    wait_until(is_replaced, TIMEOUT_S, "another replica")
    serving.wait_until_whole(ledgers)
    assert all(each.startswith("left: 5") for each in serving.load.failed[num_failed:])


def test_all_is_given_back_at_the_end(serving, ledgers):
    """After everything else: what was promised at any time fitted, and nothing is left of the replicas."""
    assert serving.check_accounts() > 20
    assert serving.load.wrong == []
    serving.load.__exit__()
    serving.run(serving_cluster.delete_applications)
    nothing = dict.fromkeys(ledgers, (0, 0))
    wait_until(lambda: serving.ledgers() == nothing, TIMEOUT_S, "empty ledgers")
    wait_until(lambda: serving.run(serving_cluster.status).replicas == (), TIMEOUT_S, "no replica known")
