"""When a decision goes for the next step too, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from selectn_core.control.standing import Standing
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import Chunk, StepRecord, StepShape
from selectn_core.offload.control import Decision

PLAN = OffloadPlan(offloaded=(1, 3), num_slots=1, num_units=4)
DECISION = Decision(plan=PLAN, urgent=False, predicted_s=0.1, limit_s=0.2)
HANDLES: dict[str, Any] = {"a": None, "b": None, "waits": None}  # only who they are is looked at
PROGRESS = {"a": Chunk(0, 40), "b": Chunk(30, 10)}
LEARNED = (4e9, 1.0, 1.0)


def standing(decision: Decision = DECISION) -> Standing:
    made = Standing(most_steps=2)
    made.decided(decision, HANDLES, PROGRESS, LEARNED)
    return made


def a_step(duration_s: float) -> StepRecord:
    return StepRecord(
        iteration=0,
        shape=StepShape.decode(1, 1),
        num_offloaded=2,
        num_slots=1,
        duration_s=duration_s,
        stall_s=0.0,
        offloaded_bytes=0,
        ended_s=0.0,
    )


def test_it_goes_for_a_few_steps_that_compute_more_of_the_same() -> None:
    made = standing()
    later = {"a": Chunk(0, 41), "b": Chunk(14, 26)}
    assert [made.next(PLAN, HANDLES, each, LEARNED) for each in (PROGRESS, later, later)] == [DECISION, DECISION, None]


def test_none_was_made() -> None:
    assert Standing(most_steps=2).next(PLAN, {}, {}, LEARNED) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"plan": OffloadPlan(offloaded=(1,), num_slots=1, num_units=4)},
        {"handles": {**HANDLES, "new": None}},
        {"handles": {"a": None, "b": None}},
        {"progress": {"a": Chunk(0, 41)}},
        {"progress": {**PROGRESS, "b": Chunk(0, 40)}},
        {"progress": {**PROGRESS, "waits": Chunk(9, 0)}},
        {"learned": (3.8e9, 1.0, 1.0)},
        {"learned": (4e9, 1.0, 1.1)},
    ],
)
def test_what_it_was_made_for_has_changed(changed: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"plan": PLAN, "handles": HANDLES, "progress": PROGRESS, "learned": LEARNED}
    assert standing().next(**asked) is DECISION
    assert standing().next(**{**asked, **changed}) is None


@pytest.mark.parametrize("ends", [lambda made: made.forget(), lambda made: made.ran(a_step(0.21))])
def test_a_step_that_took_too_long_and_new_orders_end_it(ends: Callable[[Standing], None]) -> None:
    made = standing()
    made.ran(a_step(0.19))
    assert made.next(PLAN, HANDLES, PROGRESS, LEARNED) is DECISION
    ends(made)
    assert made.next(PLAN, HANDLES, PROGRESS, LEARNED) is None


def test_what_is_urgent_is_asked_again() -> None:
    urgent = Decision(plan=PLAN, urgent=True, predicted_s=0.1, limit_s=0.2)
    assert standing(urgent).next(PLAN, HANDLES, PROGRESS, LEARNED) is None
