"""Applications on a Ray cluster of three nodes, in a process of its own (`Driver`), with everything that may die.

Node "left" has a bus that two replicas share, node "right" one with a single replica; the head has the HTTP server.
Functions run in the driver's process; the cluster is a global of that process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster.coordinator import Coordinator, CoordinatorConfig, CoordinatorStatus
from cluster.coordinator_actor import COORDINATOR_NAME, MAX_WAITING_CALLS, NAMESPACE, CoordinatorActor
from cluster.messages import RangeUpdate, ReplicaReport
from cluster.node_agents import AGENT_PREFIX, agent_nodes, latest_reports
from cluster.node_messages import NodeReport
from cluster.services import stop_services
from deployments.config import IMPORT_PATH, REPLICA_NAME, AppArgs
from deployments.local_cluster import LOOPBACK, end_processes, keep_ray_on_loopback
from deployments.ray_private import start_serve
from selectn_core.device.bus import Bus
from tests.integration.agent_cluster import IMPATIENT

# A layer of 0.15 MB takes 18 ms; that of one token may take 100 ms: a unit costs 1.5 MB/s, and all eight of the left
# node's replicas more than its bus has.
LINK_GB_PER_S, TPOT_MS = 0.008, 100
LEASE_S = 2.0
# What replicas may reserve of a node: room for the store (0.9 MB) and the KV (4 MB) of a few.
HOST_GIB = 0.05
NODE = {"node_ip_address": LOOPBACK, "num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 << 20}


def bus_name(side: str) -> str:
    return f"test-{os.getppid()}-{side}"


def application(side: str, num_replicas: int, checkpoint: str) -> dict[str, Any]:
    """Replicas that only the node of this side can have."""
    buses = [{"name": bus_name(each), "node": each, "gb_per_s": LINK_GB_PER_S} for each in ("left", "right")]
    return {
        "name": side,
        "route_prefix": f"/{side}",
        "import_path": IMPORT_PATH,
        "args": {
            "model": {"source": checkpoint, "served_name": "tiny", "dtype": "float32"},
            "device": {
                "kind": "emulated",
                "link_gb_per_s": LINK_GB_PER_S,
                "bus": bus_name(side),
                "compute_threads": 1,
            },
            "batch": {"max_batch_tokens": 32, "max_requests": 4, "kv_tokens": 1024},
            "offload": {"num_sharing": 2},
            "host": {"kv_gib": 0.01},
            "slo": {"ttft_ms": 20_000, "tpot_ms": TPOT_MS},
            "telemetry": {"period_s": 0.2, "deadline_s": 2, "buses": buses},
            "cluster": {"lease_s": LEASE_S, "period_s": LEASE_S / 4, "host_gib": HOST_GIB},
            "num_replicas": num_replicas,
            "shutdown_grace_s": 1,
        },
        "deployments": [
            {
                "name": REPLICA_NAME,
                "ray_actor_options": {"num_cpus": 0.1, "resources": {side: 0.1}},
                "health_check_period_s": 1,
            }
        ],
    }


def _greedy(checkpoint: str) -> dict[str, Any]:
    """An application whose replica wants more host memory for KV than its node has to give."""
    greedy = application("right", 1, checkpoint)
    args = {**greedy["args"], "host": {"kv_gib": 1.0}}
    return {**greedy, "name": "greedy", "route_prefix": "/greedy", "args": args}


class State:
    cluster: Cluster
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """What the coordinator counted when it had just told a replica something.

    `used`, by bus: what replicas last said that they do, or their fallback once their lease was over. `promised`: what
    this replica was told and the most that others on its bus may be doing, which a young life overestimates; it must
    fit whenever the replica is given more (`is_raise`).
    """

    life: int
    is_raise: bool
    used_bytes_per_s: dict[str, int]
    promised_bytes_per_s: int


class AuditedCoordinator(CoordinatorActor):
    """The coordinator, which writes its accounts down at every change it makes, in a file that outlives it."""

    def __init__(self, config: CoordinatorConfig, path: str) -> None:
        super().__init__(config)
        self._core = _Audited(config, path)

    async def pid(self) -> int:
        return os.getpid()


class _Audited(Coordinator):
    def __init__(self, config: CoordinatorConfig, path: str) -> None:
        super().__init__(config, life=time.time_ns(), now_s=time.monotonic())
        self._path = path

    def update_for(self, report: ReplicaReport, now_s: float) -> RangeUpdate | None:
        update = super().update_for(report, now_s)
        if update is not None:
            used: dict[str, int] = defaultdict(int)
            replicas = self.status(now_s).replicas
            for each in replicas:
                used[each.bus_id] += min(each.allowed.link_bytes_per_s, each.committed_bytes_per_s)
            entry = Accounts(
                life=self.life,
                is_raise=update.allowed.link_bytes_per_s > report.allowed.link_bytes_per_s,
                used_bytes_per_s=used,
                promised_bytes_per_s=update.allowed.link_bytes_per_s
                + sum(
                    each.committed_bytes_per_s
                    for each in replicas
                    if each.bus_id == report.bus_id and each.replica_id != report.replica_id
                ),
            )
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(entry)) + "\n")
        return update


def start(checkpoint: str, port: int) -> None:
    """The three nodes, the audited coordinator, and the applications, which are being deployed."""
    from ray.serve.schema import ServeDeploySchema

    State.directory = Path(tempfile.mkdtemp(prefix="sn"))
    os.environ["RAY_TMPDIR"] = str(State.directory)
    os.environ["SELECTN_CACHE_DIR"] = str(State.directory / "cache")
    keep_ray_on_loopback()
    _profile(checkpoint)
    head = {**NODE, "node_name": "head", "include_dashboard": False, "_system_config": IMPATIENT}
    State.cluster = Cluster(initialize_head=True, head_node_args=head)
    for side in ("left", "right"):
        State.cluster.add_node(**NODE, node_name=side, resources={side: 1})
    ray.init(address=State.cluster.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    options = {"name": COORDINATOR_NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
    coordinator_class = ray.remote(AuditedCoordinator).options(**options, num_cpus=0, max_concurrency=MAX_WAITING_CALLS)
    coordinator_class.remote(CoordinatorConfig(lease_s=LEASE_S), str(State.directory / "accounts"))
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": LOOPBACK, "port": port},
        "applications": [application("left", 2, checkpoint), application("right", 1, checkpoint), _greedy(checkpoint)],
    }
    schema = ServeDeploySchema.model_validate(document)
    start_serve(schema).deploy_apps(schema)


def _profile(checkpoint: str) -> None:
    """The performance record that the replicas will find: a short one is enough here."""
    from selectn_core.engine import Engine
    from selectn_core.record_cache import performance_record

    args = application("right", 1, checkpoint)["args"]
    config = AppArgs.model_validate({**args, "device": {**args["device"], "bus": None}}).engine
    engine = Engine.unsteered(config)
    try:
        performance_record(engine, budget_s=4)
    finally:
        engine.close()


def stop() -> list[str]:
    """Ends everything; the command lines of processes that had to be killed."""
    processes = psutil.Process().children(recursive=True)
    serve.shutdown()
    stop_services()
    ray.shutdown()
    State.cluster.shutdown()
    end_processes(processes)
    shutil.rmtree(State.directory, ignore_errors=True)
    for side in ("left", "right"):
        Bus.unlink(bus_name(side))
    return [" ".join(each.cmdline()) for each in processes if each.is_running()]


def application_states() -> dict[str, str]:
    """By name, with what Serve says about it."""
    return {
        name: " ".join([app.status.value, *(each.message for each in app.deployments.values())])
        for name, app in serve.status().applications.items()
    }


def delete_applications() -> None:
    for name in serve.status().applications:
        serve.delete(name)


def status() -> CoordinatorStatus | None:
    """The coordinator's; None while it cannot be asked."""
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
        return ray.get(actor.status.remote(), timeout=1.0)
    except (ValueError, ray.exceptions.RayError):
        return None


def snapshot(side: str) -> dict[str, Any]:
    """One replica's."""
    return serve.get_deployment_handle(REPLICA_NAME, side).snapshot.remote().result(timeout_s=30)


def reports() -> dict[str, NodeReport]:
    """By node name."""
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    return {names[node_id]: report for node_id, report in latest_reports(timeout_s=5).items() if node_id in names}


def check_ledgers() -> None:
    """Raises AssertionError if a ledger is not what the claims say."""
    for node_id in agent_nodes():
        ray.get(ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE).check_integrity.remote(), timeout=30)


def accounts() -> list[Accounts]:
    """At every change that any life of the coordinator has made."""
    lines = (State.directory / "accounts").read_text(encoding="utf-8").splitlines()
    return [Accounts(**json.loads(line)) for line in lines]


def processes_of(title: str) -> list[int]:
    """Ids of the processes with this in their title, Ray's name for what runs in them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def agent_pid(side: str) -> int:
    (node_id,) = [node["NodeID"] for node in ray.nodes() if node["NodeName"] == side]
    actor = ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE)
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=30))


def coordinator_pid() -> int | None:
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
        return int(ray.get(actor.pid.remote(), timeout=1.0))
    except (ValueError, ray.exceptions.RayError):
        return None


def send_signal(pid: int, name: str) -> None:
    os.kill(pid, getattr(signal, name))
