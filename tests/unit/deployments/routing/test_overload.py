"""Far more requests than can be served: who gets in, what they get, and when the others hear. In modelled time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import pytest

from deployments.messages import Priority
from tests.support.overloaded import STEP_S, Answer, Load, answers_to

PLACES = 8
KEYS = {"most": 0.6, "some": 0.3, "few": 0.1}
PRIORITIES: dict[Priority, float] = {"high": 0.02, "normal": 0.88, "low": 0.1}
MEAN_TOKENS, TTFT_S = 20, 4.0
SERVED_PER_S = PLACES / ((MEAN_TOKENS + 1) * STEP_S)
LOAD = Load(requests_per_s=10 * SERVED_PER_S, seconds=240, keys=KEYS, priorities=PRIORITIES, ttft_s=TTFT_S)
ROOM_FOR_ALL = 2000


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    return answers_to(LOAD, seed=0, capacity=ROOM_FOR_ALL, places=PLACES)


def served(answers: Sequence[Answer]) -> list[Answer]:
    return [each for each in answers if each.error is None]


def tokens_by_key(answers: Sequence[Answer]) -> list[int]:
    return [
        sum(each.tokens for each in served(answers) if (each.key, each.priority) == (key, "normal")) for key in KEYS
    ]


def test_who_gets_in_is_in_time_and_no_place_stays_empty(answers):
    ttfts_s = [each.ttft_s for each in served(answers)]
    assert mean(ttft_s <= TTFT_S for ttft_s in ttfts_s) >= 0.99
    assert len(ttfts_s) >= 0.95 * SERVED_PER_S * LOAD.seconds


def test_nearly_all_others_hear_at_once(answers):
    refused = [each for each in answers if each.error is not None]
    assert {each.error for each in refused} <= {"objective_unreachable", "rate_limit_exceeded"}
    assert mean(each.ended_s == each.sent_s for each in refused) >= 0.95


@pytest.mark.parametrize("seed", range(4))
def test_every_key_gets_as_much_as_the_others_however_often_it_asks(seed):
    tokens = tokens_by_key(answers_to(LOAD, seed=seed, capacity=ROOM_FOR_ALL, places=PLACES))
    assert min(tokens) >= 0.85 * max(tokens), tokens


def test_what_is_important_gets_in_where_it_asks_for_less_than_its_share(answers):
    important = [each for each in answers if each.priority == "high"]
    assert len(served(important)) >= 0.9 * len(important)


def test_with_room_for_all_that_come_nobody_is_refused():
    load = Load(requests_per_s=0.5 * SERVED_PER_S, seconds=240, keys=KEYS, priorities=PRIORITIES, ttft_s=TTFT_S)
    answers = answers_to(load, seed=0, capacity=ROOM_FOR_ALL, places=PLACES)
    assert len(served(answers)) == len(answers)
