"""Admission: at once, in turn, or refused with the reason and when to return."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.routing.admission import Admission, AdmissionConfig, Turn
from deployments.routing.board import Board
from deployments.routing.headroom_report import HeadroomReport, Promise
from deployments.routing.shared_board import SharedBoard
from tests.support.admissions import FULL, Case, refusal, settle
from tests.support.routing import run


def test_with_room_it_is_immediate_and_the_end_of_one_lets_in_the_next():
    async def check():
        case = Case()
        case.report()
        first, second = await case.enter(), await case.enter()
        at_door = await case.enter()
        waiting = case.enter()
        await settle()
        assert not waiting.done()
        first.end()
        await settle()
        assert not waiting.done()  # that room is for the one at the door
        at_door.begun()
        await settle()
        assert waiting.done()
        assert second.replica_id == "a"

    run(check)


def test_a_smaller_one_passes_those_that_cannot_be_placed():
    async def check():
        case = Case()
        case.report(promises=FULL)
        await case.enter(400)  # at the door
        large, same, small = case.enter(500), case.enter(400), case.enter(100)
        await settle()
        assert [each.done() for each in (large, same, small)] == [False, False, True]
        another = case.enter(50)
        await settle()
        assert not another.done(), "one beside the first"
        small.result().begun()
        await settle()
        assert [each.done() for each in (large, same, another)] == [False, False, True]
        case.report(kv_capacity_tokens=2000)
        await settle()
        assert large.done(), "whoever was passed is still the first"

    run(check)


def test_a_report_lets_in_who_waits():
    async def check():
        case = Case()
        case.report(promises=FULL)
        await case.enter()
        waiting = case.enter()
        await settle()
        assert not waiting.done()
        case.report()
        await settle()
        assert waiting.done()

    run(check)


def test_what_no_replica_can_ever_hold_is_a_503_that_says_the_limit():
    async def check():
        case = Case()
        case.report()
        error = await refusal(case.enter(1501))
        assert (error.status, error.code, error.retry_after_s) == (400, "context_length_exceeded", None)
        assert "1500" in str(error)

    run(check)


def test_one_whose_model_is_gone_does_not_wait_for_it_and_others_do_not_wait_for_that():
    async def check():
        case = Case()
        case.report("a", promises=FULL, model="old")
        await case.enter(model="old")  # at the door
        old, new = case.enter(model="old"), case.enter(model="new", tokens=10)
        assert (await refusal(new)).status == 503
        case.report("b", model="new")
        error = await refusal(old)
        assert (error.status, error.code) == (503, "unavailable")
        assert error.retry_after_s is not None
        assert (await case.enter(model="new")).replica_id == "b"

    run(check)


def test_a_request_that_has_become_too_large_while_it_waits_does_not_block_the_others():
    async def check():
        case = Case()
        case.report(promises=FULL)
        await case.enter()
        large, small = case.enter(1400), case.enter(10)
        await settle()
        case.report(longest_request_tokens=1000)
        assert (await refusal(large)).status == 400
        assert (await small).replica_id == "a"

    run(check)


def test_a_full_queue_is_a_429_with_the_measured_time():
    async def check():
        case = Case(max_queued_requests=2)
        case.report(promises=FULL, drain_tokens_per_s=100.0)
        await case.enter()  # at the door
        waiting = [case.enter(), case.enter()]
        await settle()
        error = await refusal(case.enter())
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        # 800 tokens wait, and 400 at the door, at a share of 100 tokens/s: 400 of ours are among 1400 that are
        # promised, or 1 of 2 callers.
        assert error.retry_after_s == (800 + 400) / 50
        for each in waiting:
            each.cancel()
        await settle()
        assert case.admission.num_waiting == 0

    run(check)


def test_none_may_wait_where_the_queue_is_zero():
    async def check():
        case = Case(max_queued_requests=0)
        case.report()
        for _ in range(3):
            await case.enter()
        assert (await refusal(case.enter())).status == 429

    run(check)


def test_one_that_will_be_late_is_refused_at_once_unless_that_is_off():
    async def check():
        for refuse_late in (True, False):
            case = Case(ttft_s=2.0, refuse_late=refuse_late)
            case.report(promises=FULL, drain_tokens_per_s=100.0)
            await case.enter()
            waiting = case.enter()
            await settle()
            assert waiting.done() == refuse_late
            if refuse_late:
                error = await refusal(waiting)
                assert (error.status, error.code) == (429, "objective_unreachable")
                assert error.retry_after_s in (14, 15)  # 16 s to wait, 2 s that it may
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    run(check)


def test_room_for_tokens_does_not_help_where_all_places_are_taken():
    """Requests are few and the KV cache is large: what is free of it is nothing that one who waits could use."""

    async def check():
        case = Case(ttft_s=2.0)
        case.report(promises=(Promise(origin="other", tokens=100, requests=8),), drain_tokens_per_s=200.0)
        await case.enter(50)  # at the door
        waiting = case.enter(50)  # at this caller's half of the rate a second, give or take 0.7
        await settle()
        assert not waiting.done()
        assert (await refusal(case.enter(60))).code == "objective_unreachable"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(check)


def test_those_who_come_more_often_do_not_have_others_wait_in_vain():
    """Important requests come all the time: an unimportant one is told at once that it would be late."""

    async def check():
        for is_busy in (False, True):
            case = Case(ttft_s=2.0, max_queued_requests=100)
            case.report(promises=FULL, drain_tokens_per_s=200.0)
            await case.enter(20)
            waiting = [case.enter(20)]
            await settle()
            if is_busy:
                waiting += [case.enter(10, key="busy", priority="high") for _ in range(30)]
                await settle()
            unimportant = case.enter(40)
            await settle()
            assert unimportant.done() == is_busy
            for each in (*waiting, unimportant):
                each.cancel()
            await asyncio.gather(*waiting, unimportant, return_exceptions=True)

    run(check)


def test_what_a_start_takes_is_kept_for_it():
    """Of an objective of 2 s what requests lately took from their place to the first text is not for waiting."""

    async def check():
        case = Case(ttft_s=2.0)
        case.report()
        before = (await case.enter(10)).deadline_s - case.admission.now_s
        case.admission.has_started(case.request(), 1.2)
        after = (await case.enter(10)).deadline_s - case.admission.now_s
        assert before == pytest.approx(2.0, abs=0.1)
        assert after == pytest.approx(0.8, abs=0.1)
        case.admission.has_started(case.request(), 20.0)
        assert (await case.enter(10)).deadline_s - case.admission.now_s == pytest.approx(0.5, abs=0.1)

    run(check)


def test_one_that_becomes_late_while_it_waits_is_refused_then():
    async def check():
        case = Case(ttft_s=0.05)
        case.report(promises=FULL)  # no drain rate: nothing is known of how long it will be
        await case.enter()
        assert (await refusal(case.enter())).code == "objective_unreachable"
        assert case.admission.num_waiting == 0

    run(check)


def test_the_timeout_is_a_429_and_without_replicas_a_503():
    async def check():
        case = Case(timeout_s=0.02)
        assert (await refusal(case.enter())).status == 503
        case.report(promises=FULL)
        await case.enter()
        assert (await refusal(case.enter())).status == 429

    run(check)


def test_a_caller_that_goes_away_gives_back_what_it_was_given():
    async def check():
        case = Case()
        case.report()
        for _ in range(20):
            for waiting in [case.enter() for _ in range(4)]:
                await asyncio.sleep(0)
                waiting.cancel()
                (turn,) = await asyncio.gather(waiting, return_exceptions=True)
                if isinstance(turn, Turn):  # it was placed before it could be cancelled
                    turn.end()
        with case.shared.locked() as board:
            assert board.free_tokens() == 1000
        assert case.admission.num_waiting == 0

    run(check)


def test_whatever_no_engine_takes_is_counted_once_as_refused_or_given_up():
    async def check():
        case = Case(timeout_s=0.02, max_queued_requests=2)
        assert (await refusal(case.enter())).status == 503  # nobody there
        case.report(longest_request_tokens=1500, promises=FULL)
        assert (await refusal(case.enter(tokens=5000))).code == "context_length_exceeded"  # could never be served
        await case.enter()  # an engine's from here on
        waiting = [case.enter() for _ in range(2)]
        await settle()
        assert [(await refusal(each)).status for each in waiting] == [429, 429]
        snapshot = case.admission.offered.snapshot()
        assert snapshot["outcomes"] == {"completed": 0, "cancelled": 0, "failed": 0, "refused": 3}
        assert (snapshot["num_requests"], snapshot["attained"]) == (3, 0.0)

    run(check)


@pytest.mark.parametrize(("ttft_s", "attained"), [(30.0, 1.0), (1e-9, 0.0)])
def test_whoever_leaves_the_queue_was_late_by_what_was_waited_until_then(ttft_s, attained):
    async def check():
        case = Case(ttft_s=ttft_s, refuse_late=False)
        case.report(promises=FULL)
        placed = await case.enter()
        waiting = case.enter()
        await settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        placed.begun()
        placed.end()  # this one an engine has taken, and counts
        snapshot = case.admission.offered.snapshot()
        assert snapshot["outcomes"] == {"completed": 0, "cancelled": 1, "failed": 0, "refused": 0}
        assert snapshot["attained"] == attained

    run(check)


def test_priorities_and_keys_go_in_turn():
    async def check():
        case = Case(max_queued_requests=10)
        case.report(promises=FULL)
        await case.enter()
        order: list[str] = []

        async def come(name: str, **who: Any) -> None:
            turn = await case.admission.enter(case.request(**who))
            order.append(name)
            turn.begun()
            turn.end()

        tasks = [
            asyncio.ensure_future(come(name, key=key, priority=priority))
            for name, key, priority in [
                ("first", "a", "normal"),
                ("second", "a", "normal"),
                ("other", "b", "normal"),
                ("urgent", "a", "high"),
                ("whenever", "b", "low"),
            ]
        ]
        await settle()
        case.report()
        await asyncio.gather(*tasks)
        assert order.index("urgent") == 0
        assert order.index("other") < order.index("second")
        assert order.index("first") < order.index("second")

    run(check)


OTHERS = [
    ({"key": "a"}, {"key": "b"}, 1),
    ({"key": "a", "priority": "normal"}, {"key": "a", "priority": "low"}, 4),
]


@pytest.mark.parametrize(("first", "second", "ratio"), OTHERS)
@pytest.mark.parametrize("fate", ["refused", "refused again", "gone", "begun"])
def test_a_place_that_nothing_came_of_costs_nothing(first, second, ratio, fate):
    """The one with the large request has the share of the next ones that it would have had without it."""

    async def come(case: Case, order: list[str], name: str, **who: Any) -> None:
        turn = await case.admission.enter(case.request(10, **who))
        order.append(name)
        turn.begun()
        turn.end()

    async def check():
        case = Case(max_queued_requests=100)
        case.report()
        if fate == "gone":
            case.report(promises=FULL)
            blocker = await case.enter(key="other", priority="high")
            large = case.enter(900, **first)
            await settle()
            case.report(kv_capacity_tokens=2000)
            await asyncio.sleep(0)  # it has its place, and has not heard of it
            large.cancel()
            (outcome,) = await asyncio.gather(large, return_exceptions=True)
            assert isinstance(outcome, asyncio.CancelledError)
            blocker.end()
        else:
            ask = case.request(900, **first)
            for _ in range(2 if fate == "refused again" else 1):
                turn = await case.admission.enter(ask)
                if fate == "begun":
                    turn.begun()
                turn.end()
                turn.end()
                ask = ask.again()
        case.report(promises=FULL)
        at_door = await case.enter(10, key="other", priority="high")
        order: list[str] = []
        names = [("first", first), ("second", second)] * 20
        tasks = [asyncio.ensure_future(come(case, order, name, **who)) for name, who in names]
        await settle()
        at_door.begun()
        await asyncio.gather(*tasks)
        expected = 0 if fate == "begun" else 10 * ratio / (ratio + 1)
        assert abs(order[:10].count("first") - expected) <= 1

    run(check)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_replica_that_takes_a_new_user_config_is_expected_back(is_back):
    """Serve lists it no more for a moment: nobody is told that there is no model, and its account is as it was."""

    async def check():
        now_s = [0.0]
        case = Case(timeout_s=0.02)
        case.shared = SharedBoard("me", clock=lambda: now_s[0])
        config = AdmissionConfig(max_queued_requests=4, timeout_s=0.02, refuse_late=True)
        case.admission = Admission(case.shared, config)
        case.report(model="m")
        turn = await case.enter(400, model="m")
        with case.shared.locked() as board:
            before = board.free_tokens()
            board.observe({})
            report, models = board.models()["m"], board.has_model("m")
            assert (models, board.replica_ids, board.free_tokens()) == (True, {"a"}, 0)
        case.shared.changed()
        assert (await refusal(case.enter(model="m"))).status == 429, "nothing is sent there, and it is no 503"
        now_s[0] += 1.9 if is_back else 2.0
        if is_back:
            with case.shared.locked() as board:
                board.observe({"a": report})
                assert board.free_tokens() == before
            assert (await case.enter(model="m")).replica_id == turn.replica_id
        else:
            assert (await refusal(case.enter(model="m"))).status == 503

    run(check)


def test_a_replica_that_has_died_or_was_stopping_is_not_expected_back():
    now_s = [0.0]
    for is_draining in (True, False):
        board = Board("me", stale_after_s=5.0, clock=lambda: now_s[0])
        report = HeadroomReport(
            replica_id="a",
            reported_s=1.0,
            kv_capacity_tokens=1000,
            longest_request_tokens=1500,
            max_requests=8,
            is_draining=is_draining,
        )
        board.observe({"a": report})
        board.observe({})
        if not is_draining:
            assert board.replica_ids
            board.forget("a")
        assert not board.replica_ids
