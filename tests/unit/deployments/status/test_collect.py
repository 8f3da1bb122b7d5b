"""Gathering: once a second for all who look, and without what does not answer."""

from __future__ import annotations

import asyncio
import contextvars
import json
import math
from collections.abc import Sequence

import pytest

from cluster.coordinator.coordinator import CoordinatorStatus
from deployments.status.asked import Asked
from deployments.status.collect import MOST_SHOWN, Collector, IngressAnswer, NodesAnswer, ReplicaAnswer, to_json
from deployments.status.schema import IngressPart
from selectn_core.decision_log import LoggedDecision
from tests.support.routing import run
from tests.support.statuses import (
    a_status,
    admission_decision,
    attainment_part,
    interval_decision,
    replica_facts,
)

WAIT_S = 0.05
NEVER = "never"


class World:
    """Those who are asked. Who is in `silent` never answers, who is in `broken` fails."""

    ingress_id = "in1"

    def __init__(self, *replica_ids: str) -> None:
        self.ids, self.silent, self.broken = list(replica_ids), set[str](), set[str]()
        self.asked: dict[str, int] = {}
        self.now_s = 100.0
        self.decisions: tuple[LoggedDecision, ...] = (interval_decision(),)
        self.collector = Collector(self, wait_s=WAIT_S, clock=lambda: self.now_s, wall_clock=lambda: 5.0)

    async def _hear(self, name: str) -> None:
        self.asked[name] = self.asked.get(name, 0) + 1
        if name in self.silent:
            await asyncio.Event().wait()
        if name in self.broken:
            raise RuntimeError("a secret of somebody else's")

    def own(self) -> IngressAnswer:
        part = IngressPart(id="in1", num_waiting=0, attainment=attainment_part())
        return IngressAnswer(part=part, decisions=(admission_decision(),))

    def replica_ids(self) -> list[str]:
        return self.ids

    async def replica(self, replica_id: str) -> ReplicaAnswer:
        await self._hear(replica_id)
        return ReplicaAnswer(facts=replica_facts(), decisions=self.decisions)

    async def ingresses(self) -> Sequence[IngressAnswer]:
        await self._hear("ingresses")
        return [self.own()]

    async def nodes(self) -> NodesAnswer:
        await self._hear("nodes")
        return NodesAnswer(names={"n1": "one"}, reports={})

    async def coordinator(self) -> CoordinatorStatus | None:
        await self._hear("coordinator")
        return CoordinatorStatus(life=1, is_settling=False, num_nodes=1, replicas=())

    async def find(self, decision_id: str, place: str) -> LoggedDecision | None:
        await self._hear("find")
        return interval_decision() if decision_id == "i-r1-7" else None


def test_however_many_look_it_is_gathered_once_a_second() -> None:
    async def check() -> None:
        world = World("a")
        looks = await asyncio.gather(*(world.collector.status() for _ in range(50)))
        assert world.asked["a"] == 1
        assert all(each is looks[0] for each in looks)
        world.now_s += 0.99
        assert await world.collector.status() is looks[0]
        world.now_s += 0.02
        assert await world.collector.status() is not looks[0]
        assert world.asked == {"a": 2, "ingresses": 2, "nodes": 2, "coordinator": 2}

    run(check)


def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    async def check() -> None:
        world = World("a")
        first, second = (asyncio.create_task(world.collector.status()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).replicas[0].facts is not None

    run(check)


def test_who_is_silent_is_shown_as_such_and_is_asked_no_more_while_the_call_lasts() -> None:
    async def check() -> None:
        world = World("a", "b")
        world.silent = {"b", "nodes", "coordinator", "ingresses"}
        for _ in range(3):
            status = await world.collector.status()
            world.now_s += 2.0
        assert world.asked["b"] == world.asked["nodes"] == 1
        assert world.asked["a"] == 3
        a, b = status.replicas
        assert a.facts is not None
        assert (b.facts, b.problem) == (None, "no answer for 4 s")
        assert status.coordinator.problem == "no answer for 4 s"
        assert status.nodes == ()
        assert status.problems == ("ingresses: no answer for 4 s", "nodes: no answer for 4 s")
        assert [each.id for each in status.ingresses] == ["in1"], "this one needs nobody's answer"

    run(check)


def test_who_falls_silent_is_shown_as_it_was_and_how_old_that_is() -> None:
    async def check() -> None:
        world = World("a")
        await world.collector.status()
        world.silent = {"a"}
        world.now_s += 3.0
        status = await world.collector.status()
        (a,) = status.replicas
        assert (a.facts, a.age_s, a.problem) == (replica_facts(), 3.0, "no answer for 0 s")
        assert interval_decision().id in {each.id for each in status.decisions}

    run(check)


def test_whoever_is_asked_is_asked_outside_the_request_that_looks() -> None:
    """Serve gives all calls of one request its id, and of several at once with one id it forgets all but one."""
    current: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    async def check() -> None:
        async def ask() -> str:
            return current.get()

        current.set("of a client")
        assert (await Asked(ask).answer(WAIT_S)).value == "none"

    run(check)


def test_who_fails_is_shown_by_the_kind_of_failure_alone() -> None:
    async def check() -> None:
        world = World("a")
        world.broken = {"a"}
        status = await world.collector.status()
        assert status.replicas[0].problem == "the call failed: RuntimeError"
        assert "secret" not in json.dumps(to_json(status))

    run(check)


def test_who_has_gone_is_forgotten() -> None:
    async def check() -> None:
        world = World("a", "b")
        world.silent = {"b"}
        await world.collector.status()
        world.ids = ["a"]
        world.now_s += 2.0
        assert [each.id for each in (await world.collector.status()).replicas] == ["a"]
        assert "replica b" not in world.collector._asked

    run(check)


def test_an_answer_that_came_too_late_is_not_shown_as_news() -> None:
    async def check() -> None:
        answers, gates = iter(("old", "new")), [asyncio.Event(), asyncio.Event()]
        waits = iter(gates)

        async def ask() -> str:
            await next(waits).wait()
            return next(answers)

        asked = Asked(ask)
        assert (await asked.answer(WAIT_S)).problem is not None
        gates[0].set()
        await asyncio.sleep(0)
        gates[1].set()
        assert (await asked.answer(WAIT_S)).value == "new"

    run(check)


def test_decisions_of_all_places_come_newest_first_and_no_more_than_can_be_read() -> None:
    async def check() -> None:
        world = World("a")
        status = await world.collector.status()
        assert [each.kind for each in status.decisions] == ["admission", "interval"]
        world.decisions *= MOST_SHOWN
        world.now_s += 2.0
        assert len((await world.collector.status()).decisions) == MOST_SHOWN

    run(check)


def test_a_decision_is_looked_for_where_it_was_made_and_for_so_long() -> None:
    async def check() -> None:
        world = World("a")
        found = await world.collector.explain("i-r1-7")
        assert found is not None
        assert found.decision.id == "i-r1-7"
        assert await world.collector.explain("i-r1-8") is None
        assert await world.collector.explain("what is this") is None
        assert world.asked["find"] == 2, "what is no id is nobody's"
        world.silent = {"find"}
        with pytest.raises(TimeoutError):
            await world.collector.explain("i-r1-7")

    run(check)


def test_json_has_no_endless_numbers() -> None:
    assert to_json(attainment_part(math.nan))["attained"] is None
    json.dumps(to_json(a_status()), allow_nan=False)
