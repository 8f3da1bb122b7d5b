"""Keeps node agents in step with the nodes: what to start and stop is one pure decision, carried out in Ray."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.node.agent import NodeAgent, ReportSink
from cluster.node.telemetry import TelemetryConfig
from cluster.protocol.node_reports import NodeReport

logger = logging.getLogger(__name__)

NAMESPACE = "selectn"
MANAGER_NAME = "selectn-node-agents"
AGENT_PREFIX = "selectn-node-agent-"
# An agent that died is started again by Ray; one that cannot be started is tried again after this.
RETRY_START_S = 5.0


@dataclass(frozen=True, kw_only=True)
class AgentChanges:
    """Ids of nodes whose agents are to be started, and stopped."""

    start: tuple[str, ...]
    stop: tuple[str, ...]


def plan_changes(
    nodes: Collection[str],
    agents: Collection[str],
    *,
    started_s: Mapping[str, float],
    now_s: float,
    retry_s: float = RETRY_START_S,
) -> AgentChanges:
    """What brings agents in step: one per living node (`nodes`), none of another.

    `agents` are the nodes that have one, `started_s` when each was started last, on the clock of `now_s`.
    """
    tried_lately = {node for node, at_s in started_s.items() if now_s - at_s < retry_s}
    missing = set(nodes) - set(agents) - tried_lately
    return AgentChanges(start=tuple(sorted(missing)), stop=tuple(sorted(set(agents) - set(nodes))))


class NodeAgents:
    """The manager, an actor: looks at the nodes every `period_s` and brings their agents in step.

    It keeps nothing that matters: which agents there are is what Ray's list of named actors says, so that after a
    restart, or beside a second manager, no node gets two.
    """

    agent_class: type[NodeAgent] = NodeAgent

    def __init__(
        self, config: TelemetryConfig, sink: ReportSink | None, period_s: float, reservable_bytes: int | None = None
    ) -> None:
        self._arguments = (config, sink, reservable_bytes)
        self._started_s: dict[str, float] = {}
        threading.Thread(target=self._run, args=(period_s,), name="reconcile", daemon=True).start()

    def ping(self) -> None:
        """Returns when the manager runs."""

    def _run(self, period_s: float) -> None:
        failing = False
        while True:
            try:
                self._reconcile()
                failing = False
            except Exception as error:  # the head may be away for a while
                if not failing:
                    logger.warning("node agents cannot be kept in step: %s", error)
                failing = True
            time.sleep(period_s)

    def _reconcile(self) -> None:
        nodes, now_s = _living_nodes(), time.monotonic()
        changes = plan_changes(nodes, agent_nodes(), started_s=self._started_s, now_s=now_s)
        for node_id in changes.stop:
            _kill(AGENT_PREFIX + node_id)
        for node_id in changes.start:
            self._started_s[node_id] = now_s
            _start_agent(self.agent_class, node_id, *self._arguments)
        self._started_s = {node: at_s for node, at_s in self._started_s.items() if node in nodes}


def start_node_agents(
    config: TelemetryConfig,
    sink: ReportSink | None = None,
    *,
    reservable_bytes: int | None = None,
    period_s: float = 1.0,
    timeout_s: float = 30.0,
) -> None:
    """Has every node of this Ray cluster run an agent from now on, those too that join later.

    They outlive the caller: `stop_node_agents` ends them. Where they run already they stay as they are. `sink` gets the
    reports, in the agents' processes; it is pickled. `reservable_bytes`: see NodeAgent.

    Raises RayError if the manager does not start in time.
    """
    manager_class = ray.remote(NodeAgents).options(**_detached(MANAGER_NAME), max_task_retries=-1)
    manager = manager_class.remote(config, sink, period_s, reservable_bytes)
    ray.get(manager.ping.remote(), timeout=timeout_s)


def stop_node_agents() -> None:
    """Ends the manager and every agent. Harmless where there are none."""
    _kill(MANAGER_NAME)
    for node_id in agent_nodes():
        _kill(AGENT_PREFIX + node_id)


def latest_reports(timeout_s: float = 2.0) -> dict[str, NodeReport]:
    """The newest report of every node whose agent answers in time, by node id."""
    calls = {agent.latest.remote(): node_id for node_id, agent in _agents()}
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    for call in late:
        ray.cancel(call)
    reports = {}
    for call in done:
        with contextlib.suppress(ray.exceptions.RayError):  # its agent has died since
            report = ray.get(call)
            if report is not None:
                reports[calls[call]] = report
    return reports


def agent_nodes() -> list[str]:
    """Ids of the nodes that have an agent, one that is starting or being restarted included."""
    actors = [each for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
    names = [each["name"] for each in actors if each["name"].startswith(AGENT_PREFIX)]
    return [name.removeprefix(AGENT_PREFIX) for name in names]


def find_agent(node_id: str) -> Any:
    """The agent of a node. Raises ValueError if it has none."""
    return ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE)


def _agents() -> Iterator[tuple[str, Any]]:
    for node_id in agent_nodes():
        with contextlib.suppress(ValueError):  # gone since the list was made
            yield node_id, ray.get_actor(AGENT_PREFIX + node_id, namespace=NAMESPACE)


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _start_agent(
    agent_class: type[NodeAgent],
    node_id: str,
    config: TelemetryConfig,
    sink: ReportSink | None,
    reservable_bytes: int | None,
) -> None:
    pinned = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    options = _detached(AGENT_PREFIX + node_id)
    ray.remote(agent_class).options(**options, scheduling_strategy=pinned).remote(config, sink, reservable_bytes)


def _detached(name: str) -> dict[str, Any]:
    """An actor that outlives who made it, is there once, comes back when its process dies, and takes no CPU's place."""
    identity = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return {**identity, "max_restarts": -1, "num_cpus": 0}


def _kill(name: str) -> None:
    with contextlib.suppress(ValueError):  # there is none of that name
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
