"""A Ray cluster of several nodes in a process of its own: pytest's process may be connected to another.

The functions run there (`Driver`); the cluster is a global of that process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import ray
from ray.cluster_utils import Cluster

from cluster.node.agent import ActorSink
from cluster.node.agents import (
    AGENT_PREFIX,
    MANAGER_NAME,
    NAMESPACE,
    agent_nodes,
    latest_reports,
    start_node_agents,
    stop_node_agents,
)
from cluster.node.bus_topology import BusConfig
from cluster.node.telemetry import TelemetryConfig
from cluster.protocol.node_reports import NodeReport
from deployments.commands.local_cluster import LOOPBACK, end_processes, keep_ray_on_loopback
from tests.support.processes import listening_addresses

T = TypeVar("T")

# A tenth of Ray's own times: how soon a node that is gone counts as dead, and how often metrics are exported.
IMPATIENT = {"health_check_period_ms": 300, "health_check_initial_delay_ms": 500, "metrics_report_interval_ms": 1000}

RECEIVER = "receiver"
NODE = {"node_ip_address": LOOPBACK, "num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}


class Driver:
    """The process: `run` calls a function of this module in it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        return self._pool.submit(function, *args).result(timeout=120)

    def close(self) -> None:
        self._pool.shutdown()


@ray.remote(num_cpus=0)
class Receiver:
    """Where a coordinator will be: takes what agents send."""

    def __init__(self) -> None:
        self._latest: dict[str, NodeReport] = {}
        self._taken: dict[str, list[int]] = defaultdict(list)

    def take(self, report: NodeReport) -> None:
        self._latest[report.node_id] = report
        self._taken[report.node_id].append(report.sequence)

    def taken(self) -> dict[str, list[int]]:
        """The sequence numbers of each node's reports, in the order in which they came."""
        return dict(self._taken)

    def latest(self) -> dict[str, NodeReport]:
        return self._latest


class State:
    cluster: Cluster
    nodes: dict[str, Any]
    directory: Path
    receiver: Any = None


def start_cluster() -> None:
    """The head node "head", its dashboard off, in a directory of its own: a path short enough for sockets."""
    State.directory = Path(tempfile.mkdtemp(prefix="sn"))
    os.environ["RAY_TMPDIR"] = str(State.directory)
    keep_ray_on_loopback()
    head = {**NODE, "node_name": "head", "include_dashboard": False, "_system_config": IMPATIENT}
    State.cluster = Cluster(initialize_head=True, head_node_args=head)
    State.nodes = {"head": State.cluster.head_node}
    ray.init(address=State.cluster.address, namespace="test", log_to_driver=False, logging_level="ERROR")


def stop_cluster() -> list[str]:
    """Ends everything; the command lines of processes that had to be killed."""
    processes = psutil.Process().children(recursive=True)
    stop_node_agents()
    ray.shutdown()
    State.cluster.shutdown()
    end_processes(processes)
    shutil.rmtree(State.directory, ignore_errors=True)
    return [" ".join(each.cmdline()) for each in processes if each.is_running()]


def add_node(name: str, environment: dict[str, str] | None = None) -> str:
    """Joins a node, whose processes get `environment` as well; its id."""
    State.nodes[name] = State.cluster.add_node(**NODE, node_name=name, env_vars=environment)
    return str(State.nodes[name].node_id)


def remove_node(name: str) -> None:
    """The node is gone without a word, as a machine that loses power."""
    State.cluster.remove_node(State.nodes.pop(name), allow_graceful=False)


def _start_receiver() -> None:
    actor_class: Any = Receiver  # what the decorator has made of it, which mypy does not see
    State.receiver = actor_class.options(name=RECEIVER, namespace=NAMESPACE).remote()


def start_agents(buses: tuple[BusConfig, ...]) -> None:
    _start_receiver()
    sink = ActorSink(RECEIVER, namespace=NAMESPACE, method="take", timeout_s=0.3)
    start_node_agents(TelemetryConfig(period_s=0.2, deadline_s=2, buses=buses), sink, period_s=0.2)


def replace_receiver() -> None:
    """Ends the receiver and starts another of its name, which knows nothing."""
    ray.kill(State.receiver)
    _start_receiver()


def received() -> dict[str, NodeReport]:
    return ray.get(State.receiver.latest.remote(), timeout=30)


def taken() -> dict[str, list[int]]:
    return ray.get(State.receiver.taken.remote(), timeout=30)


def reports() -> dict[str, NodeReport]:
    return latest_reports(timeout_s=10)


def living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes_with_agents() -> set[str]:
    return set(agent_nodes())


def processes_of_agents() -> dict[str, int]:
    """Process ids, by node."""
    return {node_id: _pid(AGENT_PREFIX + node_id) for node_id in agent_nodes()}


def process_of_manager() -> int:
    return _pid(MANAGER_NAME)


def process_of_receiver() -> int:
    return _pid(RECEIVER)


def send_signal(pid: int, number: int) -> None:
    os.kill(pid, number)


def kill_agent_for_good(node_id: str) -> None:
    """Ray itself will not restart it."""
    ray.kill(ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE), no_restart=True)


def metrics_of(node_id: str) -> str:
    """What Prometheus would scrape from the node."""
    (port,) = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == node_id]
    return httpx.get(f"http://{LOOPBACK}:{port}/metrics", trust_env=False).text


def listeners() -> dict[str, str]:
    """Every TCP address that the cluster's processes listen on."""
    return listening_addresses(psutil.Process().children(recursive=True))


def _pid(actor_name: str) -> int:
    actor = ray.get_actor(actor_name, namespace=NAMESPACE)
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=30))
