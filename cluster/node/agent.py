"""A Ray actor per node: samples the node's hardware, keeps the latest report, sets metrics, and sends reports on."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray

from cluster.node.host_claims import HostClaims
from cluster.node.metrics import NodeGauges
from cluster.node.processes import is_running
from cluster.node.telemetry import Telemetry, TelemetryConfig, read_host
from cluster.protocol.node_reports import HostAnswer, HostClaim, HostReport, NodeReport
from selectn_core.device.host_memory import HostMemory

logger = logging.getLogger(__name__)

# Of a node's host memory, what replicas may reserve where the configuration does not say; the rest is for processes.
RESERVABLE_SHARE = 0.9
# What a ledger has where the limit cannot be read: it keeps account, and refuses nothing.
UNLIMITED_BYTES = 1 << 62

# Called with every new report, in a thread of its own: it may block, and then gets the newest report next.
ReportSink = Callable[[NodeReport], None]


class NodeAgent:
    """The actor's class. `node_agents` starts one on every node, pinned to it, and again when it dies.

    Sampling, and sending what was sampled, have a thread each, so that neither a driver nor a coordinator that does not
    answer keeps `latest` from answering.

    The node's host-memory ledger is here: this is the one process per node that outlives its replicas and can see
    theirs. After a restart it is made anew from the claims that they renew.
    """

    def __init__(
        self, config: TelemetryConfig, sink: ReportSink | None = None, reservable_bytes: int | None = None
    ) -> None:
        """`reservable_bytes` of host memory are for replicas; None: most of the node's limit."""
        self._node_id = ray.get_runtime_context().get_node_id()
        self._agent_id = uuid.uuid4().hex
        self._period_s = config.period_s
        self._telemetry = Telemetry(config, node_names=node_names(self._node_id))
        self._gauges = NodeGauges(self._node_id)
        self._reservable_bytes = reservable_bytes
        self._claims_lock = threading.Lock()
        self._claims = HostClaims(self._capacity_bytes(read_host()), is_alive=is_alive, now_s=time.monotonic())
        self._latest: NodeReport | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._sample, name="sample", daemon=True).start()
        if sink is not None:
            threading.Thread(target=self._send, args=(sink,), name="send-reports", daemon=True).start()

    def latest(self) -> NodeReport | None:
        """The newest report; None before the first, which takes a few deadlines at most."""
        return self._latest

    def claim_host(self, claim: HostClaim) -> HostAnswer:
        """Reserves host memory for a replica of this node, or renews what it has. See HostClaims."""
        with self._claims_lock:
            return self._claims.claim(claim, time.monotonic())

    def release_host(self, replica_id: str) -> None:
        """A replica of this node has ended."""
        with self._claims_lock:
            self._claims.release(replica_id)

    def check_integrity(self) -> None:
        """Raises AssertionError if the ledger is not what the claims say."""
        with self._claims_lock:
            self._claims.check_integrity()

    def _capacity_bytes(self, host: HostReport) -> int:
        if self._reservable_bytes is not None:
            return self._reservable_bytes
        memory = host.memory
        return int(RESERVABLE_SHARE * memory.limit_bytes) if isinstance(memory, HostMemory) else UNLIMITED_BYTES

    def _sample(self) -> None:
        next_s = time.monotonic()
        for sequence in range(1 << 62):
            try:
                self._publish(sequence)
            except Exception:  # nothing is known to raise; the agent must go on if something does
                logger.exception("sampling this node failed")
            next_s = max(next_s + self._period_s, time.monotonic())
            time.sleep(max(0.0, next_s - time.monotonic()))

    def _publish(self, sequence: int) -> None:
        telemetry = self._telemetry.sample()
        with self._claims_lock:
            self._claims.resize(self._capacity_bytes(telemetry.host))
            for replica_id in self._claims.sweep(time.monotonic()):
                logger.warning("replica %s has died; its host memory is free again", replica_id)
            ledger = self._claims.report(time.monotonic())
        report = NodeReport(
            node_id=self._node_id,
            agent_id=self._agent_id,
            sequence=sequence,
            telemetry=telemetry,
            ledger=ledger,
        )
        with self._changed:
            self._latest = report
            self._changed.notify_all()
        self._gauges.set(report)

    def _send(self, sink: ReportSink) -> None:
        sent: NodeReport | None = None
        failing = False
        while True:
            sent = self._other_than(sent)
            try:
                sink(sent)
                failing = False
            except Exception as error:  # whoever takes reports may be gone for a while
                if not failing:
                    logger.warning("reports are not taken: %s", error)
                failing = True

    def _other_than(self, known: NodeReport | None) -> NodeReport:
        """The latest report, as soon as it is not `known` any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._latest is not known)
            assert self._latest is not None
            return self._latest


class ActorSink:
    """Sends reports to a method of a named actor, which may be replaced by another of that name.

    One report is under way at a time; those made while it is are left out, as the next is newer.
    """

    def __init__(self, name: str, *, namespace: str, method: str, timeout_s: float = 5.0) -> None:
        self._name, self._namespace, self._method = name, namespace, method
        self._timeout_s = timeout_s
        self._actor: Any = None
        self._under_way: Any = None

    def __call__(self, report: object) -> Any:
        """Returns the answer when a report has been taken: this one, or an earlier one that still waited to be.

        Raises if it was not taken, or not in time.
        """
        if self._under_way is None:
            self._actor = self._actor or ray.get_actor(self._name, namespace=self._namespace)
            self._under_way = getattr(self._actor, self._method).remote(report)
        # One that is not taken in time is waited for again, not left behind: an actor that hangs collects no calls.
        done, _ = ray.wait([self._under_way], timeout=self._timeout_s)
        if not done:
            raise TimeoutError(f"{self._name} has not taken a report for {self._timeout_s} s")
        try:
            return ray.get(self._under_way)
        except Exception:
            self._actor = None  # it may have been created anew: look it up again
            raise
        finally:
            self._under_way = None


def node_names(node_id: str) -> set[str]:
    """Everything a configuration may call a Ray node: its id, name, host name and address."""
    names = {node_id}
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            names |= {str(node[key]) for key in ("NodeName", "NodeManagerHostname", "NodeManagerAddress")}
    return names


def is_alive(claim: HostClaim) -> bool:
    """Whether the process that made a claim is still there. False too for one that cannot be seen from here."""
    return is_running(claim.pid, claim.process_start_ticks)
