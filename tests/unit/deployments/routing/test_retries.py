"""A request that comes again, having lost its place or its replica: before all others, and at nobody's cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from deployments.routing.admission import Turn
from deployments.routing.board import Board
from deployments.routing.headroom_report import Promise
from tests.support.admissions import FULL, Case, refusal, settle
from tests.support.routing import run


def test_a_request_that_lost_its_place_is_before_those_that_came_later():
    async def check():
        case = Case()
        case.report(promises=FULL)
        await case.enter()
        later = case.enter()
        await settle()
        earlier = asyncio.ensure_future(case.admission.enter(case.request().again()))
        await settle()
        case.report(promises=(Promise(origin="other", tokens=200, requests=1),))
        await settle()
        assert earlier.done()
        assert not later.done() or earlier.result().replica_id == "a"
        later.cancel()
        await asyncio.gather(later, return_exceptions=True)

    run(check)


def test_one_that_lost_its_place_when_it_was_due_is_refused_though_there_is_room():
    async def check():
        case = Case(timeout_s=0.02)
        case.report()
        turn = await case.enter()
        turn.end()
        await asyncio.sleep(0.03)
        error = await refusal(asyncio.ensure_future(case.admission.enter(turn.ask.again())))
        assert (error.status, error.code) == (429, "rate_limit_exceeded")

    run(check)


def test_a_request_whose_replica_died_waits_for_another_however_late_it_is():
    async def check():
        case = Case(ttft_s=0.01, timeout_s=5.0)
        case.report()
        ask = case.request()
        await asyncio.sleep(0.02)
        dead = asyncio.ensure_future(case.admission.enter(ask.after_death("a", case.admission.now_s)))
        await settle()
        assert not dead.done()  # "a" is the one it must not go to
        with case.shared.locked() as board:
            board.observe({"b": None})
        case.shared.changed()
        assert (await dead).replica_id == "b"

    run(check)


def test_those_that_wait_for_another_replica_do_not_hold_up_others_on_this_one():
    async def check():
        case = Case(max_queued_requests=1)
        case.report(drain_tokens_per_s=100.0)
        dead = [case.retry(200), case.retry(100)]
        await settle()
        assert case.admission.num_waiting == 2
        turns = [await case.enter(500), await case.enter(500)]  # the one queue has place for one, all the same
        at_door, waiting = await case.enter(500), case.enter(500)
        await settle()
        assert (await refusal(case.enter(500))).retry_after_s == (500 + 300 + 500) / 100
        assert not any(each.done() for each in dead)
        case.report("a", "b")
        await settle()
        assert [each.result().replica_id for each in dead] == ["b", "b"]
        assert case.admission.num_waiting == 0
        assert {turn.replica_id for turn in (*turns, at_door)} == {"a"}
        await waiting

    run(check)


def test_one_that_is_retried_may_wait_where_nobody_else_may():
    async def check():
        case = Case(max_queued_requests=0)
        case.report()
        dead = case.retry()
        await settle()
        assert not dead.done()
        case.report("a", "b")
        assert (await dead).replica_id == "b"

    run(check)


def test_whoever_is_retried_goes_first_and_in_the_order_of_the_deaths():
    async def check():
        case = Case()
        case.report(promises=FULL)
        at_door = await case.enter(10)
        queued = case.enter(10)
        await settle()
        later = case.retry(10, died_on="x")
        await settle()
        overdue = asyncio.ensure_future(case.admission.enter(case.request(10).after_death("x", 0.0).again()))
        await settle()
        assert (await refusal(overdue)).status == 429, "it was due long ago"
        earlier = case.request(10).after_death("x", case.admission.now_s - 1.0)
        first = asyncio.ensure_future(case.admission.enter(earlier.again()))
        await settle()
        order = []
        tasks = (first, later, queued)
        begin: list[Callable[[], Turn]] = [lambda: at_door, *(task.result for task in tasks)]
        for turn in begin:
            order.append([each.done() for each in tasks])
            turn().begun()
            await settle()
        assert order == [[False, False, False], [True, False, False], [True, True, False], [True, True, True]]

    run(check)


def test_one_that_is_retried_leaves_nothing_behind_when_it_gives_up():
    async def check():
        case = Case(timeout_s=0.02)
        case.report()
        overdue, gone, large = case.retry(), case.retry(), case.retry(1400)
        await settle()
        gone.cancel()
        case.report(longest_request_tokens=1000)
        assert (await refusal(large)).code == "context_length_exceeded"
        assert (await refusal(overdue)).code == "rate_limit_exceeded"
        await asyncio.gather(gone, return_exceptions=True)
        assert case.admission.num_waiting == 0

    run(check)


def test_one_that_is_retried_is_not_charged_again():
    async def check():
        case = Case(max_queued_requests=100)
        case.report(max_requests=100)
        for key in "ab":
            turn = await case.enter(100, key=key)
            turn.begun()
            turn.end()
        for is_begun in (True, False):
            turn = await case.retry(900, key="a", died_on="x")
            if is_begun:
                turn.begun()
            turn.end()
        case.report(promises=FULL)
        at_door = await case.enter(10, key="other", priority="high")
        tasks = [(key, case.enter(10, key=key)) for key in "ab" * 10]
        await settle()
        at_door.begun()
        order = list[asyncio.Task[Turn]]()
        while len(order) < 10:
            await settle()
            for _, task in tasks:
                if task.done() and task not in order:
                    order.append(task)
                    task.result().begun()
        keys = [key for task in order for key, each in tasks if each is task]
        assert keys.count("a") == keys.count("b")
        for _, task in tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)

    run(check)


def test_many_that_are_retried_at_once_do_not_each_look_at_every_replica(monkeypatch: pytest.MonkeyPatch):
    async def check():
        case = Case(timeout_s=60.0)
        case.report("a", "b", promises=FULL)
        at_doors = [await case.enter(400), await case.enter(400)]
        tokens = [420 - 10 * (number % 3) for number in range(30)]
        retried = [case.retry(each) for each in tokens]
        await settle()
        assert not any(each.done() for each in retried)
        num_looks, place = 0, Board.place

        def counted(board: Board, *args: Any) -> Any:
            nonlocal num_looks
            num_looks += 1
            return place(board, *args)

        monkeypatch.setattr(Board, "place", counted)
        case.report("a", "b", promises=FULL, kv_capacity_tokens=1001)
        await settle()
        assert num_looks <= 3, "the smallest of them has looked"
        case.report("a", "b", kv_capacity_tokens=20_000, max_requests=100)
        await settle()
        assert all(each.done() and each.result().replica_id == "b" for each in retried)
        assert all(turn.replica_id in "ab" for turn in at_doors)

    run(check)
