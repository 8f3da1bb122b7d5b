"""Replicas, agents, the coordinator and a whole node lost on a real Ray cluster, under real HTTP load throughout.

Everything is back to full within what docs/operations.md states for this configuration
(deployments/commands/recovery.py), with much room for starting processes on a busy machine. No other times are
asserted.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.metrics.table import METRICS
from cluster.protocol.node_reports import GpuReport, NodeTelemetry, NvmlInfo, Unavailable
from deployments.dashboards.queries import PANELS, RATE
from tests.standins.nvml import NO_COMPILER, StandIn, find_compiler
from tests.support import audit, serving_cluster
from tests.support.load import NUM_CLIENTS, Answer, LongRequest, hosts
from tests.support.prometheus import PROMETHEUS, WINDOW, panels_of_serve_llm, prometheus, scraped
from tests.support.serving_cluster import BUS, HOST_GIB, IMPATIENT
from tests.support.waiting import wait_until, wait_within
from tests.support.watched_cluster import (
    BUS_BYTES_PER_S,
    Ledgers,
    WatchedCluster,
    host_bytes_offered,
    watched_cluster,
)

TIMEOUT_S = 90
HOST_BYTES = int(HOST_GIB * 2**30)
BOUNDS_S = IMPATIENT.bounds_s(replica_start_s=60, actor_start_s=30, answer_s=20)
# Panels of Ray's dashboard: of separate prefill, and of vLLM's connector that keeps KV in host memory.
NOT_HERE = ("NIXL", "KV Offload")
# At having requests of both kinds on a given replica, all under way.
NUM_ATTEMPTS = 5
# Long requests that are sent at once: two more than all replicas but one have places for, so each gets some.
TOGETHER = (False, True) * 5


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> StandIn | None:
    """The GPUs of node "right"; None where nothing can build the stand-in for their driver."""
    return StandIn(tmp_path_factory.mktemp("nvml")) if find_compiler() else None


@pytest.fixture(scope="module")
def serving(checkpoint, gpus) -> Iterator[WatchedCluster]:
    nvml = gpus.environment if gpus is not None else {}
    with watched_cluster(IMPATIENT, checkpoint, BOUNDS_S, nvml=nvml, with_greedy=True) as serving:
        yield serving


@pytest.fixture(scope="module")
def ledgers(serving) -> Ledgers:
    """What they have when all is well."""
    return serving.whole_ledgers()


@contextlib.contextmanager
def nothing_lost(serving: WatchedCluster) -> Iterator[None]:
    """No request of the load may end with an error, whatever the block does."""
    serving.load.take_lost()
    yield
    serving.load.wait_for_more()
    assert serving.load.take_lost() == []


@contextlib.contextmanager
def only_streams_lost(serving: WatchedCluster) -> Iterator[None]:
    """In the block a replica dies. Of the load it costs the streams that it had begun, one of each client at most."""
    serving.load.take_lost()
    yield
    lost = serving.load.take_lost()
    assert len(lost) <= NUM_CLIENTS["stream"]
    assert all(is_broken_stream(each) for each in lost), lost


def is_broken_stream(answer: Answer) -> bool:
    """A stream that had begun, and whose end says why there is no more."""
    code = answer.error["code"] if answer.error is not None else None
    return answer.is_stream and answer.status == 200 and bool(answer.text) and code == "replica_died"


class TestSharing:
    def test_replicas_share_buses_and_host_memory(self, serving, ledgers):
        """The left bus cannot stream all layers of two replicas; each node has one store and its replicas' KV."""
        replicas = serving.replicas()
        (right,), lefts = replicas["right"], replicas["left"]
        assert host_bytes_offered([right]) == 4 * right.link.unit_bytes
        assert host_bytes_offered(lefts) == 5 * right.link.unit_bytes, "8 MB/s at 1.5 MB/s for a layer"
        assert min(host_bytes_offered([each]) for each in lefts) > 0
        snapshot = serving.run(serving_cluster.snapshots)[right.replica_id]
        k_min, k_max = snapshot["cluster"]["range"]
        assert 0 <= k_min <= k_max == 4, "the least is what its requests need at the moment"
        assert snapshot["cluster"]["epoch"]["life"] == serving.run(serving_cluster.status).life
        assert snapshot["cluster"]["lease_left_s"] > 0
        kv_bytes = snapshot["memory"]["host"]["kv_swap_bytes"]
        (num_left, left_bytes), (num_right, right_bytes) = ledgers["left"], ledgers["right"]
        assert (num_left, num_right) == (2, 1)
        assert left_bytes - right_bytes == kv_bytes, "the store counts once"
        assert right_bytes - kv_bytes >= snapshot["host_bytes"]
        assert ledgers["head"] == (0, 0)

    def test_every_metric_is_exported(self, serving, gpus):
        """By the process that owns it; nothing else under these prefixes is."""
        ports = serving.run(serving_cluster.metrics_ports)
        wanted = {metric.exported for metric in METRICS if metric.owner != "genai"}
        if gpus is None:
            wanted -= {name for name in wanted if "_gpu_" in name}
        found: set[str] = set()

        def is_all_there() -> bool:
            text = "".join(scraped(port) for port in ports)
            found.update(re.findall(r"^# TYPE (ray_(?:selectn|vllm)_\w+)", text, flags=re.MULTILINE))
            return found >= wanted

        end_s = time.monotonic() + TIMEOUT_S
        wait_within(is_all_there, end_s, "every metric", lambda: f"all but {sorted(wanted - found)}")
        assert found <= {metric.exported for metric in METRICS}

    @pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian's package has it)")
    def test_every_panel_shows_something(self, serving, tmp_path):
        """Of our dashboard, and of Ray's own for LLMs, asked of a Prometheus that scrapes this run."""
        ports = serving.run(serving_cluster.metrics_ports)
        asked = [(f"{panel.title}: {query.legend}", query.expr) for panel in PANELS for query in panel.queries]
        asked = [(title, expr.replace(RATE, WINDOW)) for title, expr in asked]
        asked += [each for each in panels_of_serve_llm() if not each[0].startswith(NOT_HERE)]
        with prometheus(tmp_path, ports) as server:

            def empty() -> list[str]:
                return [title for title, expr in asked if all(math.isnan(each) for each in server.series(expr))]

            end_s = time.monotonic() + TIMEOUT_S
            wait_within(lambda: not empty(), end_s, "a value of every query", lambda: f"none of {empty()}")

    def test_a_replica_for_which_its_node_has_no_host_memory_is_refused(self, serving):
        """It does not start, and Serve says why."""

        def state() -> str:
            return serving.run(serving_cluster.application_states)["greedy"]

        wait_until(lambda: state().startswith("DEPLOY_FAILED"), TIMEOUT_S, "the refusal")
        assert "refuses host memory" in state()
        assert "lower host.kv_gib" in state()
        serving.run(serving_cluster.delete_application, "greedy")


class TestServicesDie:
    """Requests need neither coordinator nor agents: none may fail."""

    def test_the_coordinator_is_killed_twice_in_a_row(self, serving, ledgers):
        with nothing_lost(serving):
            began_s = serving.kill_coordinator()
            serving.kill_coordinator()
            serving.recovered("coordinator killed", ledgers, began_s, times=2)

    def test_the_coordinator_is_cut_off_for_longer_than_a_lease(self, serving, ledgers):
        with nothing_lost(serving):
            with serving.coordinator_cut_off():

                def allowed() -> list[dict]:
                    return [each["cluster"] for each in serving.run(serving_cluster.snapshots).values()]

                wait_until(
                    lambda: {each["lease_left_s"] for each in allowed()} == {None}, TIMEOUT_S, "leases to run out"
                )
                for each in allowed():
                    assert each["link_bytes_per_s"] == each["fallback_bytes_per_s"] <= BUS_BYTES_PER_S // 2
                serving.load.wait_for_more()
            serving.recovered("coordinator cut off", ledgers, time.monotonic())

    def test_an_agent_is_killed(self, serving, ledgers):
        """Its successor learns from the replicas' claims what is in use."""
        with nothing_lost(serving):
            serving.recovered("agent killed", ledgers, serving.kill_agent("left"))


class TestNvmlFails:
    """The driver of two GPUs of node "right" fails in every way, while that node serves with an emulated device."""

    @pytest.fixture
    def driver(self, serving, ledgers, gpus) -> Iterator[StandIn]:
        """Fails if anything but telemetry is disturbed, or if it does not recover."""
        if gpus is None:
            pytest.skip(NO_COMPILER)
        with nothing_lost(serving):
            before = serving.replica_ids("right")
            yield gpus
            gpus.describe()
            wait_until(lambda: troubles(serving) == [None, None], TIMEOUT_S, "healthy GPUs")
            wait_until(lambda: len(buses(serving)) == 3, TIMEOUT_S, "the coordinator knows all buses again")
            serving.recovered("agent killed", ledgers, time.monotonic())
            assert serving.replica_ids("right") == before

    def test_where_there_is_none_the_report_says_so(self, serving, ledgers):
        nvml = serving.run(serving_cluster.reports)["left"].telemetry.nvml
        if isinstance(nvml, NvmlInfo):
            pytest.skip("this machine has an NVML")
        assert nvml.cause == "nvml_absent"
        assert [bus.bus_id for bus in serving.run(serving_cluster.node_states)["left"].buses] == [BUS]

    def test_a_lost_gpu_and_counters_that_are_not_supported(self, serving, driver):
        not_supported = 3
        driver.describe("lost 1", f"error 0 nvmlDeviceGetTotalEccErrors {not_supported}")
        found: list[GpuReport] = []

        def is_reported() -> bool:
            """GPUs are asked side by side, and one may have been when the driver's answers changed."""
            found[:] = telemetry(serving).gpus
            if [trouble(gpu) for gpu in found] != [None, "gpu_lost"]:
                return False
            counters = (found[0].ecc_corrected_errors, found[0].ecc_uncorrected_errors)
            return {cause(each) for each in counters} == {"not_supported"}

        wait_until(is_reported, TIMEOUT_S, "a lost GPU, and counters that are not supported")
        working, lost = found
        assert (working.temperature_c, lost.pcie_width) == (51, 16)
        assert lost.trouble is not None
        assert "lost" in lost.trouble.detail.lower()
        # The coordinator has nothing to divide of a bus whose rate nobody knows; the others are as before.
        wait_until(lambda: len(buses(serving)) == 2, TIMEOUT_S, "the coordinator knows that a bus is gone")
        assert BUS in buses(serving)

    def test_a_call_that_hangs_keeps_nobody_elses_report(self, serving, driver):
        driver.describe("hang 0 nvmlDeviceGetPcieReplayCounter")
        wait_until(lambda: troubles(serving) == ["timed_out", None], TIMEOUT_S, "a GPU that does not answer")
        hanging = telemetry(serving).gpus[0].trouble
        assert hanging is not None
        assert "pcie_replays" in hanging.detail
        first = serving.run(serving_cluster.reports)["right"]
        wait_until(lambda: sequence(serving) >= first.sequence + 2, TIMEOUT_S, "reports go on")
        later = serving.run(serving_cluster.reports)["right"]
        assert later.agent_id == first.agent_id
        assert not any(isinstance(value, Unavailable) for value in vars(later.telemetry.gpus[1]).values())
        assert later.ledger.is_complete

    def test_one_that_does_not_start(self, serving, driver):
        driver_not_loaded = 9
        driver.describe(f"error * nvmlInit {driver_not_loaded}")
        serving.kill_agent("right")
        wait_until(lambda: nvml_cause(serving) == "nvml_failed", TIMEOUT_S, "a driver that is not loaded")
        assert telemetry(serving).gpus == ()
        driver.describe("hang * nvmlInit")
        serving.kill_agent("right")
        wait_until(lambda: nvml_cause(serving) == "timed_out", TIMEOUT_S, "a driver that hangs when it starts")
        wait_until(lambda: buses(serving) == [BUS], TIMEOUT_S, "the coordinator knows the other bus")

    def test_one_that_takes_the_agent_with_it(self, serving, driver):
        """Agents die as long as it does, without a report; replicas keep what they have."""
        first = serving.run(serving_cluster.reports)["right"]
        driver.describe("crash 1 nvmlDeviceGetPcieReplayCounter")
        wait_until(lambda: "right" not in serving.run(serving_cluster.reports), TIMEOUT_S, "no agent")
        serving.load.wait_for_more()
        status = serving.run(serving_cluster.status)
        assert sum(each.is_live for each in status.replicas) == 3
        driver.describe()
        wait_until(lambda: "right" in serving.run(serving_cluster.reports), TIMEOUT_S, "another agent")
        assert serving.run(serving_cluster.reports)["right"].agent_id != first.agent_id


def telemetry(serving: WatchedCluster) -> NodeTelemetry:
    """Of node "right", when its agent answers."""
    wait_until(lambda: "right" in serving.run(serving_cluster.reports), TIMEOUT_S, "an agent that answers")
    return serving.run(serving_cluster.reports)["right"].telemetry


def sequence(serving: WatchedCluster) -> int:
    return serving.run(serving_cluster.reports)["right"].sequence


def trouble(gpu: GpuReport) -> str | None:
    return gpu.trouble.cause if gpu.trouble is not None else None


def troubles(serving: WatchedCluster) -> list[str | None]:
    return [trouble(gpu) for gpu in telemetry(serving).gpus]


def nvml_cause(serving: WatchedCluster) -> str | None:
    return cause(telemetry(serving).nvml)


def cause(reading: object) -> str | None:
    return reading.cause if isinstance(reading, Unavailable) else None


def buses(serving: WatchedCluster) -> list[str]:
    """Buses of node "right" as the coordinator knows them."""
    return [bus.bus_id for bus in serving.run(serving_cluster.node_states)["right"].buses]


class UnderWay:
    """Requests that are under way when `victims` die, who are frozen from now on.

    On them is at least one whole response, of which nothing is sent before its end, and one stream that has begun. Some
    streams more come when the victims do not answer any more, and nobody knows it.
    """

    def __init__(
        self, serving: WatchedCluster, victims: set[str], freeze: Callable[[], None], thaw: Callable[[], None]
    ) -> None:
        self._serving, self._victims = serving, victims
        self._requests: list[LongRequest] = []
        self._on_victims: list[LongRequest] = []
        for _ in range(NUM_ATTEMPTS):
            self._start_some()
            freeze()
            time.sleep(0.5)  # what was sent before has come
            wholes, self._begun = self._left_on_victims()
            if wholes and self._begun:
                break
            thaw()
            self._let_all_end()
        assert wholes, "no whole response is under way on a victim"
        assert self._begun, "no stream is under way on a victim"
        self._requests += serving.long.start(True, True, True)

    def _let_all_end(self) -> None:
        """Before others are tried: where all places are taken the first would end before the last is let in."""
        for request in self._requests:
            request.end()

    def _start_some(self) -> None:
        """A few of both kinds; returns when replicas have let them in, and the first on a victim has begun."""
        some = self._serving.long.start(*TOGETHER)
        self._requests += some

        def there() -> dict[LongRequest, str]:
            return hosts(some, self._serving.run(serving_cluster.prefixes))

        wait_until(lambda: len(there()) == len(some), TIMEOUT_S, "replicas let them in")
        on_victims = [request for request, replica_id in there().items() if replica_id in self._victims]
        streams = [request for request in on_victims if request.answer.is_stream]
        wait_until(lambda: not streams or any(each.has_begun for each in streams), TIMEOUT_S, "a stream begins")
        self._on_victims += on_victims

    def _left_on_victims(self) -> tuple[list[LongRequest], list[LongRequest]]:
        """Whole responses, and streams that have begun, which have not come to their end."""
        left = [each for each in self._on_victims if not each.answer.is_complete]
        wholes = [each for each in left if not each.answer.is_stream]
        return wholes, [each for each in left if each.answer.is_stream and each.has_begun]

    def check_ends(self) -> None:
        """All have the right answer, but for streams on a victim of which something had been sent."""
        answers = {request: request.end() for request in self._requests}
        broken = [request for request, answer in answers.items() if not answer.is_complete]
        assert set(self._begun) <= set(broken) <= set(self._on_victims), broken
        assert all(is_broken_stream(each.answer) for each in broken), broken


class TestReplicasDie:
    def test_a_replica_is_killed(self, serving, ledgers):
        """Its share and its host memory go to the one that takes its place."""
        with only_streams_lost(serving):
            victim = min(serving.replica_ids("left"))
            pid = serving.run(serving_cluster.replica_pids)[victim]
            under_way = UnderWay(
                serving,
                {victim},
                lambda: serving.run(serving_cluster.send_signal, pid, "SIGSTOP"),
                lambda: serving.run(serving_cluster.send_signal, pid, "SIGCONT"),
            )
            began_s = serving.kill_replica(victim, pid)
            under_way.check_ends()
            serving.recovered("replica killed", ledgers, began_s)

    def test_a_request_is_run_again_once(self, serving, ledgers):
        """The second replica that dies under it ends it, with a clear error."""
        serving.load.take_lost()
        pids = serving.run(serving_cluster.replica_pids)
        (request,) = serving.long.start(False)
        began_s = time.monotonic()
        for _ in range(2):

            def host() -> str | None:
                return hosts([request], serving.run(serving_cluster.prefixes)).get(request)

            wait_until(lambda: host() in pids, TIMEOUT_S, "another replica lets it in")
            victim = host()
            serving.kill_replica(victim, pids.pop(victim))
        answer = request.end()
        assert (answer.status, answer.error["code"], answer.text) == (503, "replica_died", "")
        assert "has died" in answer.error["message"]
        serving.recovered("replica killed", ledgers, began_s, times=2)
        lost = serving.load.take_lost()
        assert {each.error["code"] for each in lost} <= {"replica_died"}
        assert len(lost) <= 2 * sum(NUM_CLIENTS.values())


class TestANodeDies:
    def test_with_all_that_it_has(self, serving, ledgers):
        """Its replica, its agent and the coordinator at once; later the machine comes back."""
        serving.move_coordinator("right")
        before = {node: serving.replica_ids(node) for node in ("left", "right")}
        with only_streams_lost(serving):
            under_way = UnderWay(
                serving,
                before["right"],
                lambda: serving.run(serving_cluster.freeze_node, "right"),
                lambda: serving.run(serving_cluster.thaw_node, "right"),
            )
            serving.kill_node("right")
            under_way.check_ends()
            # What is left serves, under a coordinator that has moved.
            wait_until(lambda: serving.has_converged({"left": 2, "right": 0}), BOUNDS_S["node lost"], "ranges")
            assert serving.replica_ids("left") == before["left"]
            serving.load.wait_for_more()
        with nothing_lost(serving):
            serving.recovered("node lost", ledgers, serving.add_node("right"))
            assert not serving.replica_ids("right") & before["right"]
            reports = serving.run(serving_cluster.reports)
            assert {name for name, each in reports.items() if each.ledger.is_complete} == {"head", "left", "right"}


def on_every_replica(serving: WatchedCluster, replica_ids: set[str]) -> list[LongRequest]:
    """Some of both kinds, under way on each replica."""
    requests: list[LongRequest] = []
    for _ in range(NUM_ATTEMPTS):
        some = serving.long.start(*TOGETHER)
        requests += some
        while under_way := [each for each in some if each.thread.is_alive()]:
            if {*hosts(under_way, serving.run(serving_cluster.prefixes)).values()} == replica_ids:
                return requests
    raise AssertionError(f"no long request on some of {replica_ids}")


class TestTheEnd:
    def test_a_replica_that_is_told_to_stop_finishes_and_hands_back_what_it_holds(self, serving, ledgers):
        before = {node: serving.replica_ids(node) for node in ("left", "right")}
        everybody = before["left"] | before["right"]
        with nothing_lost(serving):
            requests = on_every_replica(serving, everybody)
            serving.run(serving_cluster.scale_to, 2)

            def left() -> set[str]:
                return serving.replica_ids("left") | serving.replica_ids("right")

            wait_until(lambda: len(left()) == 2, TIMEOUT_S, "one replica fewer")
            assert all(request.end().is_complete for request in requests)
            (gone,) = everybody - left()
            assert left() < everybody
        (node,) = [node for node, there in before.items() if gone in there]
        # It said goodbye: nobody had to find out that its process is gone.
        goodbyes = [each for each in serving.run(audit.ledger_accounts) if each.why == f"goodbye of {gone}"]
        assert [gone in each.replicas for each in goodbyes] == [False]
        expected = {"left": 2, "right": 1}
        expected[node] -= 1
        wait_until(lambda: serving.has_converged(expected), BOUNDS_S["replica killed"], "ranges")
        num_replicas, _ = serving.ledgers()[node]
        assert num_replicas == expected[node]

    def test_nothing_is_left_and_nothing_was_ever_promised_twice(self, serving, ledgers):
        """After everything else: accounts were written down at every change, by whoever made it."""
        serving.load.stop()
        serving.run(serving_cluster.delete_application, serving_cluster.APP)
        nothing = dict.fromkeys(ledgers, (0, 0))
        wait_until(lambda: serving.ledgers() == nothing, TIMEOUT_S, f"empty ledgers, not {serving.ledgers()}")
        wait_until(lambda: not any(serving.replicas().values()), TIMEOUT_S, "no replica known")
        accounts, ledger_accounts = serving.run(audit.accounts), serving.run(audit.ledger_accounts)
        assert len(accounts) > 20
        for each in accounts:
            assert max(each.used_bytes_per_s.values()) <= BUS_BYTES_PER_S, each
            assert not each.is_raise or each.promised_bytes_per_s <= BUS_BYTES_PER_S, each
        assert len({each.node_id for each in ledger_accounts}) >= len(ledgers)
        for each in ledger_accounts:
            assert each.defect is None, each
            assert each.reserved_bytes <= each.capacity_bytes == HOST_BYTES, each
