"""One application on a Ray cluster of three nodes, in a process of its own (`Driver`), with everything that may die.

Node "left" has a bus that two replicas share, node "right" one with a single replica; the head has the HTTP server, the
ingress and Serve's controller. Each node has its shared memory in a directory of its own, as machines have. Where a
stand-in NVML is given, "right" has GPUs. Functions run in the driver's process; the cluster is a global there.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster.coordinator.actor import (
    COORDINATOR_NAME,
    MAX_WAITING_CALLS,
    NAMESPACE,
    CoordinatorSink,
)
from cluster.coordinator.coordinator import CoordinatorStatus
from cluster.node.agents import AGENT_PREFIX, MANAGER_NAME, agent_nodes, latest_reports
from cluster.protocol.messages import NodeState
from cluster.protocol.node_reports import NodeReport
from cluster.services import stop_services
from deployments.commands.local_cluster import LOOPBACK, end_processes, keep_ray_on_loopback
from deployments.commands.recovery import Loss, Surroundings, recovery_bounds_s
from deployments.config import IMPORT_PATH, REPLICA_NAME, AppArgs
from deployments.ray_private import start_serve
from deployments.routing.headroom_report import HeadroomReport
from tests.support.agent_cluster import IMPATIENT as IMPATIENT_RAY
from tests.support.audit import AUDIT, AuditedAgents, AuditedCoordinator

APP, MODEL, BUS = "tiny", "tiny", "bus"
NUM_REPLICAS = {"left": 2, "right": 1}
NUM_SHARING = 2
# A layer of 0.15 MB takes 18 ms; that of one token may take 100 ms: a unit costs 1.5 MB/s, and all eight of the left
# node's replicas more than its bus has.
LINK_GB_PER_S, TPOT_MS = 0.008, 100
# What replicas may reserve of a node: room for the store (0.9 MB) and the KV (4 MB) of a few.
HOST_GIB, KV_GIB = 0.05, 0.01
GRACE_S = 30
NODE = {"node_ip_address": LOOPBACK, "num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 << 20}
# Ray's own: a node is dead after so many checks without an answer, each of which it waits for.
RAY_HEALTH_CHECKS, RAY_HEALTH_CHECK_TIMEOUT_S = 5, 10.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How soon losses are noticed: keys of `args:`, Serve's health check, and Ray's own settings."""

    cluster: dict[str, float] = field(default_factory=dict)
    telemetry: dict[str, float] = field(default_factory=dict)
    health_check_period_s: float = 10.0
    ray: dict[str, int] = field(default_factory=dict)

    @property
    def lease_s(self) -> float:
        return AppArgs.model_validate({"cluster": self.cluster}).cluster.lease_s

    def bounds_s(self, *, replica_start_s: float, actor_start_s: float, answer_s: float) -> dict[Loss, float]:
        """What docs/operations.md says of this pace, on a machine that starts things in so many seconds."""
        node_period_s = self.ray.get("health_check_period_ms", 3000) / 1e3
        around = Surroundings(
            health_check_period_s=self.health_check_period_s,
            node_timeout_s=RAY_HEALTH_CHECKS * (node_period_s + RAY_HEALTH_CHECK_TIMEOUT_S),
            replica_start_s=replica_start_s,
            actor_start_s=actor_start_s,
            answer_s=answer_s,
        )
        args = AppArgs.model_validate({"cluster": self.cluster, "telemetry": self.telemetry})
        return recovery_bounds_s(args, around)


DEFAULT_PACE = Pace()
IMPATIENT = Pace(
    cluster={"lease_s": 2.0, "period_s": 0.5},
    telemetry={"period_s": 0.2, "deadline_s": 2.0},
    health_check_period_s=1.0,
    ray=IMPATIENT_RAY,
)


def application(pace: Pace, checkpoint: str) -> dict[str, Any]:
    """Replicas where there are devices for them, an ingress where nothing is killed."""
    buses = [{"name": BUS, "node": node, "gb_per_s": LINK_GB_PER_S} for node in NUM_REPLICAS]
    replica_options = {"num_cpus": 0.1, "resources": {"device": 1}}
    return {
        "name": APP,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {
            "model": {"source": checkpoint, "served_name": MODEL, "dtype": "float32"},
            "device": {"kind": "emulated", "link_gb_per_s": LINK_GB_PER_S, "bus": BUS, "compute_threads": 1},
            "batch": {"max_batch_tokens": 32, "max_requests": 4, "kv_tokens": 1024},
            "offload": {"num_sharing": NUM_SHARING},
            "host": {"kv_gib": KV_GIB},
            "slo": {"ttft_ms": 60_000, "tpot_ms": TPOT_MS},
            "telemetry": {**pace.telemetry, "buses": buses},
            "cluster": {**pace.cluster, "host_gib": HOST_GIB},
            "num_replicas": sum(NUM_REPLICAS.values()),
            "limits": {"admission_timeout_s": 60},
            "shutdown_grace_s": GRACE_S,
        },
        "deployments": [
            {
                "name": REPLICA_NAME,
                "ray_actor_options": replica_options,
                "health_check_period_s": pace.health_check_period_s,
            },
            {"name": "SelectNIngress", "ray_actor_options": {"num_cpus": 0.1, "resources": {"front": 0.1}}},
        ],
    }


def _greedy(pace: Pace, checkpoint: str) -> dict[str, Any]:
    """An application whose replica wants more host memory for KV than its node has to give."""
    greedy = copy.deepcopy(application(pace, checkpoint))
    greedy.update(name="greedy", route_prefix="/greedy")
    greedy["args"].update(host={"kv_gib": 1.0}, num_replicas=1)
    greedy["deployments"][0]["ray_actor_options"]["resources"] = {"spare": 1}
    return greedy


class State:
    cluster: Cluster
    directory: Path
    nodes: dict[str, Any]
    document: dict[str, Any]
    environments: dict[str, dict[str, str]]
    shared_memory: list[Path]


# -- the cluster ---------------------------------------------------------------------------------------------------


def start(pace: Pace, checkpoint: str, port: int, nvml: dict[str, str], with_greedy: bool) -> None:
    """The three nodes, what runs once per cluster, audited, and the applications, which are being deployed.

    `nvml`: what makes processes of node "right" use a stand-in NVML.
    """
    from ray.serve.schema import ServeDeploySchema

    State.directory = Path(tempfile.mkdtemp(prefix="sn"))
    State.shared_memory = []
    State.environments = {"head": {}, "left": {}, "right": nvml}
    os.environ["RAY_TMPDIR"] = os.environ[AUDIT] = str(State.directory)
    os.environ["SELECTN_CACHE_DIR"] = str(State.directory / "cache")
    keep_ray_on_loopback()
    _profile(pace, checkpoint)
    head = {**NODE, "node_name": "head", "include_dashboard": False, "_system_config": pace.ray}
    State.cluster = Cluster(
        initialize_head=True, head_node_args={**head, "resources": {"front": 1}, "env_vars": _environment("head")}
    )
    State.nodes = {}
    for name in NUM_REPLICAS:
        add_node(name)
    ray.init(address=State.cluster.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    args = AppArgs.model_validate(application(pace, checkpoint)["args"])
    _detached(AuditedCoordinator, COORDINATOR_NAME, args.cluster.protocol)
    manager = (args.telemetry, CoordinatorSink(num_sharing=NUM_SHARING), 1.0, int(HOST_GIB * 2**30))
    _detached(AuditedAgents, MANAGER_NAME, *manager)
    applications = [application(pace, checkpoint), *([_greedy(pace, checkpoint)] if with_greedy else [])]
    State.document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": LOOPBACK, "port": port},
        "applications": applications,
    }
    schema = ServeDeploySchema.model_validate(State.document)
    start_serve(schema).deploy_apps(schema)


def _detached(actor_class: type, name: str, *arguments: Any) -> None:
    """As the product starts it."""
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
    if actor_class is AuditedCoordinator:
        options["max_concurrency"] = MAX_WAITING_CALLS
    ray.remote(actor_class).options(**options, num_cpus=0).remote(*arguments)


def _profile(pace: Pace, checkpoint: str) -> None:
    """The performance record that the replicas will find: a short one is enough here."""
    from selectn_core.profiling.record_cache import performance_record
    from selectn_core.start import load_unsteered_engine

    args = application(pace, checkpoint)["args"]
    config = AppArgs.model_validate({**args, "device": {**args["device"], "bus": None}}).engine
    engine = load_unsteered_engine(config)
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
    for directory in (State.directory, *State.shared_memory):
        shutil.rmtree(directory, ignore_errors=True)
    return [" ".join(each.cmdline()) for each in processes if each.is_running()]


def add_node(name: str) -> None:
    """Joins a node that has just been switched on: nothing is in its shared memory."""
    resources = {"device": NUM_REPLICAS[name], **({"spare": 1} if name == "right" else {})}
    node = State.cluster.add_node(**NODE, node_name=name, resources=resources, env_vars=_environment(name))
    State.nodes[name] = node


def _environment(name: str) -> dict[str, str]:
    directory = Path(tempfile.mkdtemp(prefix=f"selectn-test-{name}-", dir="/dev/shm"))
    State.shared_memory.append(directory)
    return {**State.environments[name], "SELECTN_SHARED_MEMORY": str(directory)}


def freeze_node(name: str) -> None:
    """Every process of the node stops."""
    for each in _processes(name):
        each.suspend()


def thaw_node(name: str) -> None:
    for each in _processes(name):
        each.resume()


def kill_node(name: str) -> None:
    """Every process of the node is gone at once, as when a machine loses power."""
    freeze_node(name)  # nobody sees another go
    for each in _processes(name):
        each.kill()
    State.cluster.remove_node(State.nodes.pop(name), allow_graceful=False)


def _processes(name: str) -> list[psutil.Process]:
    raylet = psutil.Process(State.nodes[name].all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def living_nodes() -> set[str]:
    """Names of the nodes that Ray takes to be alive."""
    return {node["NodeName"] for node in ray.nodes() if node["Alive"]}


def metrics_ports() -> list[int]:
    """Where the living nodes' agents export metrics."""
    return [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]


# -- what there is to see ------------------------------------------------------------------------------------------


def application_states() -> dict[str, str]:
    """By name, with what Serve says about it."""
    return {
        name: " ".join([app.status.value, *(each.message for each in app.deployments.values())])
        for name, app in serve.status().applications.items()
    }


def delete_application(name: str) -> None:
    serve.delete(name)


def scale_to(num_replicas: int) -> None:
    """Deploys the application again with so many replicas, and nothing else changed; without any other one."""
    from ray.serve.schema import ServeDeploySchema

    document = {**State.document, "applications": copy.deepcopy(State.document["applications"][:1])}
    document["applications"][0]["deployments"][0]["num_replicas"] = num_replicas
    schema = ServeDeploySchema.model_validate(document)
    start_serve(schema).deploy_apps(schema)


def status() -> CoordinatorStatus | None:
    """The coordinator's; None while it cannot be asked."""
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
        return ray.get(actor.status.remote(), timeout=1.0)
    except (ValueError, ray.exceptions.RayError):
        return None


def node_states() -> dict[str, NodeState]:
    """What the coordinator was last told of nodes, by node name; of living ones."""
    actor, names = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE), node_names()
    states = ray.get(actor.states.remote(), timeout=30)
    return {names[node_id]: state for node_id, state in states.items() if node_id in names}


def reports() -> dict[str, NodeReport]:
    """By node name."""
    names = node_names()
    return {names[node_id]: report for node_id, report in latest_reports(timeout_s=5).items() if node_id in names}


def node_names() -> dict[str, str]:
    return {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}


def replicas_by_node() -> dict[str, list[str]]:
    """Ids of the replicas that the nodes' ledgers list, by node name."""
    return {
        name: [each.replica_id for each in report.ledger.replicas]
        for name, report in reports().items()
        if report.ledger is not None
    }


def snapshots() -> dict[str, dict[str, Any]]:
    """Of every replica that answers, by its id."""
    found = {}
    for actor in _replica_actors():
        try:
            state = ray.get(actor.__ray_call__.remote(_snapshot), timeout=20)
        except ray.exceptions.RayError:  # starting, or gone
            continue
        found[state["cluster"]["replica"]] = state
    return found


def _snapshot(_: Any) -> dict[str, Any]:
    """`SelectNReplica.snapshot`, in the replica's process: it cannot be awaited here."""
    replica = serve.get_replica_context().servable_object
    return {**replica._engine.snapshot(), "cluster": replica._member.snapshot()}


def prefixes() -> dict[str, tuple[int, ...]]:
    """Hashes of the prompts that each replica has let in lately, by its id."""
    found = {}
    for actor in _replica_actors():
        try:
            report = HeadroomReport.from_json(ray.get(actor.record_routing_stats.remote(), timeout=20))
        except (ray.exceptions.RayError, TypeError):  # starting, or gone
            continue
        assert report is not None
        found[f"{APP}/{report.replica_id}"] = report.prefixes
    return found


def _replica_actors() -> list[Any]:
    """One by one: calls through Serve's handle go to any of them."""
    actors = []
    for each in ray.util.list_named_actors(all_namespaces=True):
        if f"{APP}#{REPLICA_NAME}#" in each["name"]:
            try:
                actors.append(ray.get_actor(each["name"], namespace=each["namespace"]))
            except ValueError:  # just gone
                continue
    return actors


def check_ledgers() -> None:
    """Raises AssertionError if a ledger is not what the claims say."""
    for node_id in agent_nodes():
        ray.get(ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE).check_integrity.remote(), timeout=30)


# -- processes -----------------------------------------------------------------------------------------------------


def replica_pids() -> dict[str, int]:
    """By replica id."""
    return {
        f"{APP}/{name}": pid
        for actor in _replica_actors()
        for name, pid in [ray.get(actor.__ray_call__.remote(_name_and_pid), timeout=30)]
    }


def _name_and_pid(_: Any) -> tuple[str, int]:
    return serve.get_replica_context().replica_id.unique_id, os.getpid()


def agent_pid(name: str) -> int | None:
    """None while it does not answer."""
    (node_id,) = [node["NodeID"] for node in ray.nodes() if node["NodeName"] == name and node["Alive"]]
    try:
        actor = ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE)
        return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=5))
    except (ValueError, ray.exceptions.RayError):
        return None


def coordinator_pid() -> int | None:
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
        return int(ray.get(actor.pid.remote(), timeout=1.0))
    except (ValueError, ray.exceptions.RayError):
        return None


def coordinator_node() -> str | None:
    """Name of the node where it runs; None while it does not answer."""
    try:
        actor = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
        return node_names().get(ray.get(actor.node_id.remote(), timeout=1.0))
    except (ValueError, ray.exceptions.RayError):
        return None


def send_signal(pid: int, name: str) -> None:
    os.kill(pid, getattr(signal, name))
