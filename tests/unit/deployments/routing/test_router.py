"""The request router inside Serve's own routing: what admission has placed goes there, or to the next best that can."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import pytest

from deployments.messages import GenerateRequest, Sampling
from deployments.routing import shared_board as boards
from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport, Promise
from deployments.routing.prefixes import prefix_hashes
from deployments.routing.router import HeadroomRouter
from deployments.routing.shared_board import SharedBoard
from tests.support.routing import others, run
from tests.support.serve_router import MAX_ONGOING_REQUESTS, ServeRouting

ASK = Ask(request_id="r", tokens=100, least_tokens=100, prompt_tokens=50)


class Case:
    """An application's router in Serve's routing, and the board that admission shares with it."""

    def __init__(self, shared: SharedBoard | None = None) -> None:
        app_name = f"app-{uuid.uuid4().hex}"
        if shared is not None:
            boards._boards[app_name] = shared
        self.serve = ServeRouting(HeadroomRouter, app_name)
        self.shared = boards.board_of(app_name)
        self.num_reports = 0

    def report(self, replica_id: str, capacity: int = 1000, **fields: Any) -> dict[str, Any]:
        """What the replica's `record_routing_stats` answers."""
        self.num_reports += 1
        values = {"longest_request_tokens": 2000, "max_requests": 8, "prefill_s_per_token": 0.001, **fields}
        report = HeadroomReport(
            replica_id=replica_id, reported_s=float(self.num_reports), kv_capacity_tokens=capacity, **values
        )
        return report.to_json()

    def place(self, request_id: str, tokens: int = 100, **fields: Any) -> str | None:
        """What admission does with a request."""
        ask = replace(ASK, request_id=request_id, tokens=tokens, least_tokens=tokens, **fields)
        with self.shared.locked() as board:
            return board.place(ask)

    async def send(self, request_id: str) -> str:
        """Where the request goes."""
        sampling = Sampling(max_tokens=1)
        return await self.serve.route(GenerateRequest(request_id=request_id, prompt="p", sampling=sampling))

    async def send_new(self, request_id: str, tokens: int = 100, **fields: Any) -> str:
        """As an ingress does it: a place first. It gets where it was placed, and nowhere else."""
        placed = self.place(request_id, tokens, **fields)
        assert placed is not None
        assert await self.send(request_id) == placed
        return placed


def test_it_goes_where_there_is_most_room_for_its_prompt_and_output() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a", promises=others(700)), "b": case.report("b", promises=others(200))})
        case.serve.actors["b"].num_requests = MAX_ONGOING_REQUESTS - 1  # which is what Serve would look at
        assert await case.send_new("short", 100) == "b"
        assert await case.send_new("long", 650) == "b"
        assert await case.send_new("next", 250) == "a"

    run(check)


def test_a_control_call_goes_to_the_replica_that_it_names() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({name: case.report(name) for name in "abc"})
        case.serve.actors["b"].num_requests = MAX_ONGOING_REQUESTS - 1
        assert [await case.serve.route(replica_id=name) for name in "bacb"] == list("bacb")
        assert await case.serve.route(replica_id="gone") in "abc", "which answers that it is another"
        assert {await case.serve.route() for _ in range(30)} <= {"a", "c"}, "whoever is least busy"

    run(check)


def test_what_would_be_late_goes_to_one_that_is_not() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a", waiting_prefill_tokens=3000), "b": case.report("b", 500)})
        assert await case.send_new("patient") == "a"
        assert await case.send_new("urgent", ttft_s=1.0) == "b"

    run(check)


def test_what_was_sent_counts_until_the_next_report_has_it() -> None:
    async def check() -> None:
        case = Case()
        reports = {"a": case.report("a"), "b": case.report("b", promises=others(300))}
        case.serve.running(reports)
        assert await case.send_new("1", 500) == "a"
        assert await case.send_new("2", 500) == "b"
        with case.shared.locked() as board:
            mine = Promise(origin=case.shared.origin, tokens=500, requests=1, sequence=board.sequence_of("1"))
        case.serve.running({**reports, "a": case.report("a", promises=(mine,))})
        assert await case.send_new("3", 500) == "a", "it is in the report, and counts once"

    run(check)


def test_prefixes_decide_where_room_is_equal() -> None:
    async def check() -> None:
        case = Case()
        prefixes = prefix_hashes(b"x" * 600)
        case.serve.running({"a": case.report("a"), "b": case.report("b", 950, prefixes=prefixes)})
        assert await case.send_new("1", prefixes=prefixes) == "b"
        case.serve.running({"a": case.report("a"), "b": case.report("b", 500, prefixes=prefixes)})
        assert await case.send_new("2", prefixes=prefixes) == "a"

    run(check)


@pytest.mark.parametrize("stats", [{}, {"reported_s": "?"}, {"queue": 3, "kv_capacity_tokens": -1}])
def test_without_a_report_that_makes_sense_it_goes_to_each_in_turn(stats: dict[str, Any]) -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": stats, "b": stats})
        assert {await case.send_new("1"), await case.send_new("2")} == {"a", "b"}
        assert case.place("3") is None, "one at each door until it is let in"

    run(check)


def test_a_stale_report_counts_as_none_but_for_what_can_never_fit() -> None:
    async def check() -> None:
        case = Case(SharedBoard("me", stale_after_s=0.0))
        case.serve.running({"a": case.report("a", longest_request_tokens=50), "b": case.report("b", 10)})
        await asyncio.sleep(0.01)
        assert await case.send_new("1", 100) == "b"
        assert case.place("2", 100) is None

    run(check)


def test_one_that_drains_is_sent_nothing() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a", 9000, is_draining=True), "b": case.report("b")})
        assert await case.send_new("1") == "b"

    run(check)


def test_where_the_place_is_gone_or_refuses_it_goes_to_the_next_best_and_counts_there() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a"), "b": case.report("b", 800), "c": case.report("c", 600)})
        assert case.place("1", 500) == "a"
        case.serve.died("a")
        case.serve.actors["b"].num_requests = MAX_ONGOING_REQUESTS
        assert await case.send("1") == "c"
        case.serve.running({"b": case.report("b", 800), "c": case.report("c", 600)})
        case.serve.actors["b"].num_requests = 0
        assert await case.send_new("2", 700) == "b"
        with case.shared.locked() as board:
            rooms = {each.replica_id: each.room_tokens for each in board.rank(replace(ASK, request_id="3"))}
        assert rooms == {"b": 800 - 700, "c": 600 - 500}

    run(check)


def test_a_request_waits_for_a_replica_and_for_one_that_can_take_it() -> None:
    async def check() -> None:
        case = Case()
        early = asyncio.ensure_future(case.send("nobody has placed it"))
        await asyncio.sleep(0.02)
        assert not early.done()
        case.serve.running({"a": case.report("a")})
        assert await early == "a"
        assert case.place("1") == "a"
        case.serve.actors["a"].num_requests = MAX_ONGOING_REQUESTS
        late = asyncio.ensure_future(case.send("1"))
        await asyncio.sleep(0.05)
        assert not late.done()
        case.serve.actors["a"].num_requests = 0
        assert await late == "a"

    run(check)


def test_other_calls_go_to_whoever_has_least_to_do() -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a", 9000), "b": case.report("b", 10)})
        case.serve.actors["a"].num_requests = 3
        assert await case.serve.route() == "b"
        assert await case.serve.route("not a request to generate") == "b"

    run(check)


def test_a_ranking_that_fails_does_not_hang_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        case = Case()
        case.serve.running({"a": case.report("a")})
        with case.shared.locked() as board:
            monkeypatch.setattr(board, "order", lambda request_id: 1 / 0)
        assert await case.send("1") == "a"

    run(check)


def test_reports_reach_whoever_waits_for_news() -> None:
    async def check() -> None:
        case = Case()
        heard: list[frozenset[str]] = []

        def listen() -> None:
            with case.shared.locked() as board:
                heard.append(board.replica_ids)

        case.shared.listen(listen)
        case.serve.running({"a": case.report("a"), "b": case.report("b")})
        case.serve.died("a")
        assert heard == [{"a", "b"}, {"b"}]

    run(check)
