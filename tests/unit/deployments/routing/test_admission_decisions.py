"""Refusals as they are logged: with the numbers they were made from, and nothing of what was asked."""

from __future__ import annotations

from typing import get_args

from deployments.routing.admission_facts import ADMISSION_REASONS, AdmissionReason
from selectn_core.decision_log import CAPACITY, LoggedDecision
from tests.support.admissions import FULL, Case, refusal, settle
from tests.support.routing import run


def latest(case: Case) -> LoggedDecision:
    return case.admission.decisions.latest("in")[0]


def test_what_has_room_leaves_no_trace() -> None:
    async def check() -> None:
        case = Case()
        case.report()
        await case.enter()
        assert not case.admission.decisions.latest("in")

    run(check)


def test_a_full_queue_and_one_that_is_displaced() -> None:
    async def check() -> None:
        case = Case(max_queued_requests=2)
        case.report(promises=FULL, drain_tokens_per_s=100.0)
        await case.enter()  # at the door
        waiting = [case.enter(), case.enter()]
        await settle()
        error = await refusal(case.enter())
        full = latest(case)
        assert (full.verdict, full.reason, full.request_id) == ("refused", "queue_full", "r4")
        assert (full.inputs["num_waiting"], full.inputs["tokens"]) == (2, 400)
        assert full.inputs["retry_after_s"] == error.retry_after_s
        another = case.enter(key="another")
        await refusal(waiting[1])
        assert (latest(case).reason, latest(case).request_id) == ("displaced", "r3")
        for each in (waiting[0], another):
            each.cancel()

    run(check)


def test_one_that_would_be_late_has_the_numbers_of_the_test() -> None:
    async def check() -> None:
        case = Case(ttft_s=2.0)
        case.report(promises=FULL, drain_tokens_per_s=1000.0)
        await case.enter()  # at the door
        first = case.enter(400)  # is next: nothing is before it
        await settle()
        await refusal(case.enter(400))
        late = latest(case)
        assert late.reason == "late"
        inputs = {name: value for name, value in late.inputs.items() if value is not None}
        before, spread, free = inputs["before_tokens"], inputs["spread_tokens"], inputs["free_tokens"]
        assert before >= 400
        assert before + spread + inputs["tokens"] - free > inputs["rate_tokens_per_s"] * inputs["left_s"]
        first.cancel()

    run(check)


def test_a_deadline_what_is_too_large_and_nobody() -> None:
    async def check() -> None:
        case = Case(timeout_s=0.02)
        await refusal(case.enter())
        assert latest(case).reason == "no_replica"
        case.report(promises=FULL)
        await refusal(case.enter(1501))
        assert (latest(case).reason, latest(case).inputs["longest_tokens"]) == ("too_large", 1500)
        door, waits = case.enter(), case.enter()
        await refusal(waits)
        assert latest(case).reason == "deadline"
        assert (latest(case).inputs["waited_s"] or 0.0) >= 0.02
        (await door).end()

    run(check)


def test_a_flood_is_kept_in_part() -> None:
    async def check() -> None:
        case = Case(max_queued_requests=0)
        case.report(promises=FULL)
        await case.enter()  # at the door
        for _ in range(CAPACITY + 10):
            await refusal(case.enter())
        kept = case.admission.decisions.latest("in")
        assert len(kept) == CAPACITY
        assert kept[0].id == f"a-in-{CAPACITY + 10}"

    run(check)


def test_reasons_are_those_that_are_declared() -> None:
    assert get_args(AdmissionReason) == ADMISSION_REASONS
