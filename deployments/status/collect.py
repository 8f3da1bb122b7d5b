"""Gathers the status of everything, at most once a second however many look, with a bounded wait for each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cluster.coordinator.coordinator import CoordinatorStatus
from cluster.protocol.node_reports import NodeReport
from deployments.status.asked import Answer, Asked
from deployments.status.parts import coordinator_part, node_facts
from deployments.status.schema import (
    VERSION,
    Explanation,
    IngressPart,
    NodePart,
    ReplicaFacts,
    ReplicaPart,
    ShownDecision,
    Status,
)
from deployments.status.words import explanation, shown
from selectn_core.decision_log import LoggedDecision, parts_of

PERIOD_S, WAIT_S = 1.0, 1.0
# What a replica and an ingress show at once; an id finds all that they keep.
MOST_DECISIONS = 32
MOST_SHOWN = 64
# So many look for a decision at a time; others wait for their turn.
MOST_SEARCHES = 8


@dataclass(frozen=True, kw_only=True)
class ReplicaAnswer:
    """What a replica says when it is asked for its status."""

    facts: ReplicaFacts
    decisions: tuple[LoggedDecision, ...]


@dataclass(frozen=True, kw_only=True)
class IngressAnswer:
    """What an ingress says."""

    part: IngressPart
    decisions: tuple[LoggedDecision, ...]


@dataclass(frozen=True, kw_only=True)
class NodesAnswer:
    """The nodes that live, by id, with their names; and the reports of those whose agent has answered."""

    names: Mapping[str, str]
    reports: Mapping[str, NodeReport]


class Sources(Protocol):
    """Whom to ask. Every question may fail, or have no answer for ever."""

    @property
    def ingress_id(self) -> str:
        """Of this ingress."""

    def own(self) -> IngressAnswer:
        """What this ingress says itself."""

    def replica_ids(self) -> Collection[str]:
        """Those that run."""

    async def replica(self, replica_id: str) -> ReplicaAnswer: ...

    async def ingresses(self) -> Sequence[IngressAnswer]:
        """All of them that answer, this one among them."""

    async def nodes(self) -> NodesAnswer: ...

    async def coordinator(self) -> CoordinatorStatus | None:
        """None: there is none."""

    async def find(self, decision_id: str, place: str) -> LoggedDecision | None:
        """A decision that was made in another place than this one; None: it is not kept there, or not there."""


class Collector:
    """For the event loop of one ingress."""

    def __init__(
        self,
        sources: Sources,
        *,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources, self._wait_s, self._clock, self._wall_clock = sources, wait_s, clock, wall_clock
        self._asked: dict[str, Asked] = {}
        self._last: dict[str, tuple[float, ReplicaAnswer]] = {}  # when replicas answered last, and what
        self._gathering: asyncio.Task[Status] | None = None
        self._began_s = -math.inf
        self._searches = asyncio.Semaphore(MOST_SEARCHES)

    async def status(self) -> Status:
        """What was gathered in the last second, else what is gathered now."""
        if self._gathering is None or (self._gathering.done() and self._clock() >= self._began_s + PERIOD_S):
            self._began_s, self._gathering = self._clock(), asyncio.create_task(self._gather())
        # Who looks may leave: others look at the same.
        return await asyncio.shield(self._gathering)

    async def explain(self, decision_id: str) -> Explanation | None:
        """The decision of that id in words; None where there is none such, or it is no longer kept.

        Raises TimeoutError where the place that made it does not answer.
        """
        parts = parts_of(decision_id)
        if parts is None:
            return None
        async with self._searches, asyncio.timeout(2 * self._wait_s):
            found = await self._sources.find(decision_id, parts[1])
        return explanation(found) if found is not None else None

    async def _gather(self) -> Status:
        began_s, sources = self._clock(), self._sources
        replica_ids = sorted(sources.replica_ids())
        questions: dict[str, Callable[[], Awaitable[Any]]] = {
            "ingresses": sources.ingresses,
            "nodes": sources.nodes,
            "coordinator": sources.coordinator,
            **{f"replica {each}": _question(sources, each) for each in replica_ids},
        }
        answers = await self._ask(questions)
        coordinator: Answer = answers["coordinator"]
        ingresses: Sequence[IngressAnswer] = answers["ingresses"].value or (sources.own(),)
        self._remember({each: answers[f"replica {each}"] for each in replica_ids})
        now_unix_s = self._wall_clock()
        logged = [each for ingress in ingresses for each in ingress.decisions]
        logged += [each for _, answer in self._last.values() for each in answer.decisions]
        return Status(
            version=VERSION,
            unix_s=now_unix_s,
            gathered_s=self._clock() - began_s,
            ingress_id=sources.ingress_id,
            ingresses=tuple(sorted((each.part for each in ingresses), key=lambda part: part.id)),
            replicas=tuple(self._replica_part(each, answers[f"replica {each}"].problem) for each in replica_ids),
            nodes=_node_parts(answers["nodes"].value, coordinator.value, now_unix_s),
            coordinator=coordinator_part(coordinator.value, coordinator.problem),
            decisions=_latest(logged),
            problems=tuple(
                f"{name}: {answers[name].problem}" for name in ("ingresses", "nodes") if answers[name].problem
            ),
        )

    def _remember(self, answers: Mapping[str, Answer]) -> None:
        """What replicas said last is shown while they are silent; who has gone is forgotten."""
        self._last = {each: last for each, last in self._last.items() if each in answers}
        now_s = self._clock()
        self._last |= {each: (now_s, answer.value) for each, answer in answers.items() if answer.value is not None}

    def _replica_part(self, replica_id: str, problem: str | None) -> ReplicaPart:
        last = self._last.get(replica_id)
        if last is None:
            return ReplicaPart(id=replica_id, problem=problem)
        age_s = self._clock() - last[0] if problem is not None else 0.0
        return ReplicaPart(id=replica_id, problem=problem, age_s=age_s, facts=last[1].facts)

    async def _ask(self, questions: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Answer]:
        """Everybody's answer; who is not asked any more is forgotten."""
        for name in self._asked.keys() - questions.keys():
            self._asked.pop(name).close()
        for name, question in questions.items():
            self._asked.setdefault(name, Asked(question, self._clock))
        answers = await asyncio.gather(*(self._asked[name].answer(self._wait_s) for name in questions))
        return dict(zip(questions, answers, strict=True))


def to_json(status: Any) -> Any:
    """A part of the status as JSON data; what is not finite is None there."""
    return _finite(asdict(status))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _question(sources: Sources, replica_id: str) -> Callable[[], Awaitable[ReplicaAnswer]]:
    return lambda: sources.replica(replica_id)


def _node_parts(
    nodes: NodesAnswer | None, coordinator: CoordinatorStatus | None, now_unix_s: float
) -> tuple[NodePart, ...]:
    if nodes is None:
        return ()
    parts = []
    for node_id, name in sorted(nodes.names.items(), key=lambda each: (each[1], each[0])):
        report = nodes.reports.get(node_id)
        facts = node_facts(report, now_unix_s=now_unix_s, coordinator=coordinator) if report is not None else None
        problem = None if report is not None else "its agent does not answer, or there is none"
        parts.append(NodePart(id=node_id, name=name, problem=problem, facts=facts))
    return tuple(parts)


def _latest(decisions: list[LoggedDecision]) -> tuple[ShownDecision, ...]:
    return tuple(shown(each) for each in sorted(decisions, key=lambda each: each.unix_s, reverse=True)[:MOST_SHOWN])
