"""Attainment counts everything that was offered, by how it ended, and keeps a bounded number of requests."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks.http_load import Outcome as Seen
from selectn_core.config import SloConfig
from selectn_core.errors import EngineOverloaded, EngineUnavailable, RequestError
from selectn_core.requests.attainment import OUTCOMES, Attainment, Outcome, at_percentile, is_met
from selectn_core.requests.handle import Gaps, RequestHandle, RequestTiming, TokenEvent
from selectn_core.requests.objectives import Objectives
from selectn_core.requests.sampling import SamplingParams
from tests.support.engines import CheckedEngine, engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)
IN_TIME = RequestTiming(ttft_s=0.5, tpot_s=0.05)
NO_TOKEN = RequestTiming(ttft_s=None, tpot_s=None)


@pytest.mark.parametrize(
    ("timing", "outcome", "met"),
    [
        (IN_TIME, "completed", True),
        (RequestTiming(ttft_s=1.5, tpot_s=0.05), "completed", False),
        (RequestTiming(ttft_s=0.5, tpot_s=0.15), "completed", False),
        (RequestTiming(ttft_s=1.0, tpot_s=None), "completed", True),
        # Whoever left is late by what was seen until then, and by nothing else.
        (IN_TIME, "cancelled", True),
        (RequestTiming(ttft_s=1.5, tpot_s=None), "cancelled", False),
        (RequestTiming(ttft_s=None, tpot_s=None, waited_s=0.9), "cancelled", True),
        (RequestTiming(ttft_s=None, tpot_s=None, waited_s=1.1), "cancelled", False),
        (RequestTiming(ttft_s=0.5, tpot_s=None, next_tpot_s=3.0), "cancelled", False),
        (RequestTiming(ttft_s=0.5, tpot_s=0.05, next_tpot_s=0.3), "cancelled", False),
        # After the last token nothing is waited for.
        (RequestTiming(ttft_s=0.5, tpot_s=0.05, next_tpot_s=0.3), "completed", True),
        (IN_TIME, "failed", False),
        (NO_TOKEN, "failed", False),
        (NO_TOKEN, "refused", False),
    ],
)
def test_every_end_is_judged(timing: RequestTiming, outcome: Outcome, met: bool) -> None:
    assert is_met(timing, OBJECTIVES, outcome) is met


def test_nothing_that_was_offered_is_left_out() -> None:
    attainment = Attainment(50.0)
    for outcome in OUTCOMES:
        attainment.add(IN_TIME, OBJECTIVES, outcome)
        attainment.add(NO_TOKEN, OBJECTIVES, outcome)
    snapshot = attainment.snapshot()
    assert snapshot["outcomes"] == dict.fromkeys(OUTCOMES, 2)
    assert snapshot["num_requests"] == attainment.num_requests == 8
    assert snapshot["attained"] == 3 / 8  # in time: a completed one and two that were cancelled
    assert snapshot["ttft_s"] == 0.5
    attainment.add(NO_TOKEN, OBJECTIVES, "refused")
    attainment.add(NO_TOKEN, OBJECTIVES, "refused")
    assert attainment.snapshot()["ttft_s"] is None, "half of them had no first token, ever"


def test_the_percentile_is_the_value_that_so_many_do_not_exceed() -> None:
    attainment = Attainment(90.0)
    assert attainment.snapshot()["ttft_s"] is None
    for i in range(1, 11):
        timing = RequestTiming(ttft_s=float(i), tpot_s=i / 100, itl_p99_s=i / 10)
        attainment.add(timing, OBJECTIVES, "completed")
    snapshot = attainment.snapshot()
    assert snapshot["ttft_s"] == 9.0
    assert snapshot["tpot_s"] == pytest.approx(0.09)
    assert snapshot["itl_p99_s"] == pytest.approx(0.9)


def test_only_the_last_ones_are_kept() -> None:
    attainment = Attainment(50.0)
    for i in range(5000):
        timing = RequestTiming(ttft_s=9.0 if i < 3000 else 0.1, tpot_s=None)
        attainment.add(timing, OBJECTIVES, "completed")
    assert attainment.snapshot()["attained"] == 1.0
    assert attainment.num_requests == 5000


def test_without_objectives_latencies_are_known_and_nothing_is_met() -> None:
    attainment = Attainment(50.0)
    attainment.add(IN_TIME, None, "completed")
    attainment.add(NO_TOKEN, None, "refused")
    snapshot = attainment.snapshot()
    assert (snapshot["num_requests"], snapshot["attained"], snapshot["ttft_s"]) == (2, None, 0.5)


@pytest.mark.parametrize(
    ("status", "is_whole", "first_s", "outcome", "met"),
    [
        (200, True, 0.5, "completed", True),
        (200, True, 1.5, "completed", False),
        (200, False, 0.5, "failed", False),
        (200, False, None, "failed", False),
        (429, True, None, "refused", False),
        (503, True, None, "refused", False),
        (500, True, None, "failed", False),
        (0, False, None, "failed", False),  # a broken connection, or no answer in time
        (400, True, None, None, False),  # wrong in itself: it was never offered
        (401, True, None, None, False),
    ],
)
def test_what_a_client_saw_is_judged_by_the_same_definition(status, is_whole, first_s, outcome, met) -> None:
    seen = Seen(
        owner="o",
        priority="normal",
        status=status,
        is_whole=is_whole,
        sent_s=0.0,
        first_s=first_s,
        ended_s=2.0,
        num_tokens=41 if first_s else 0,
    )
    assert seen.outcome == outcome
    assert seen.met(OBJECTIVES) is met
    if outcome is not None:
        attainment = Attainment(99.0)
        attainment.add(seen.timing, OBJECTIVES, outcome)
        assert attainment.snapshot()["attained"] == float(met)


# -- the time between tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 99, 100, 101, 5000, 12_799])
def test_the_99th_percentile_of_gaps_is_exact_for_thousands_of_tokens(number: int) -> None:
    rng, gaps = random.Random(number), Gaps()
    seconds = [rng.expovariate(1.0) for _ in range(number)]
    for each in seconds:
        gaps.add(each, 1)
    assert gaps.p99_s == at_percentile(seconds, 99)


def test_gaps_of_any_length_take_bounded_memory_and_never_look_better_than_they_are() -> None:
    rng, gaps = random.Random(0), Gaps()
    seconds = [rng.random() for _ in range(50_000)]
    for each in seconds:
        gaps.add(each, 1)
    exact = at_percentile(seconds, 99)
    assert (exact or 1.0) <= (gaps.p99_s or 0.0) <= 1.0
    assert len(gaps._largest) == Gaps._NUM_KEPT


def test_tokens_that_come_together_have_one_gap_before_them() -> None:
    gaps = Gaps()
    assert gaps.p99_s is None
    gaps.add(0.3, 400)
    assert gaps.p99_s == 0.0
    gaps.add(0.2, 1)
    gaps.add(0.2, 1)
    gaps.add(0.1, 1)
    gaps.add(0.1, 1)
    assert gaps.p99_s == 0.1  # the fifth largest of 404


def test_one_long_step_shows_between_tokens_and_hardly_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    handle = RequestHandle("r", 5, lambda ticket: None)
    for i in range(51):
        now_s[0] += 0.245 if i == 25 else 0.1
        handle.push(TokenEvent(token_ids=(1,)))
    assert handle.timing.tpot_s == pytest.approx(0.1029)
    assert handle.timing.itl_p99_s == pytest.approx(0.245)
    now_s[0] += 10.0
    assert handle.timing.next_tpot_s == pytest.approx((50 * 0.1029 + 10) / 51)
    handle.push(TokenEvent(token_ids=(), finish_reason="cancelled"))
    now_s[0] += 99.0
    assert handle.timing.waited_s == pytest.approx(15.245), "it ends with the request"


# -- of an engine ---------------------------------------------------------------------------------------------------


def test_an_engine_counts_whatever_it_was_offered_by_how_it_ended() -> None:
    slo = SloConfig(ttft_ms=60_000.0, tpot_ms=60_000.0)
    config = engine_config(2, 1, max_requests=2, max_waiting=2)
    engine = CheckedEngine(tiny_model(), config)
    engine.set_objectives(slo)
    prompt, endless = make_prompts()[0], greedy(200)
    queued = [engine.submit(prompt, endless) for _ in range(4)]
    with pytest.raises(EngineOverloaded):
        engine.submit(prompt, endless)
    with pytest.raises(EngineOverloaded):
        engine.submit(prompt, endless, returns=True)  # and is offered again: not the end of it
    with pytest.raises(RequestError):
        engine.submit([], endless)  # never was a request
    late = queued.pop()
    late.arrived_s -= 100.0
    late.cancel()
    with engine:
        first, second, third = queued
        next(iter(first))
        first.stop()  # a stop string was met
        next(iter(second))
        second.cancel()
        assert engine.submit(prompt, SamplingParams(max_tokens=3, ignore_eos=True)).result()
        next(iter(third))
    with pytest.raises(EngineUnavailable):
        engine.submit(prompt, endless)
    snapshot = engine.snapshot()["attainment"]
    assert snapshot["outcomes"] == {"completed": 2, "cancelled": 2, "failed": 1, "refused": 2}
    assert snapshot["attained"] == pytest.approx(3 / 7)


def test_five_that_were_late_and_gave_up_are_five_misses() -> None:
    engine = CheckedEngine(tiny_model(), engine_config(0))
    engine.set_objectives(SloConfig(ttft_ms=100.0, tpot_ms=50.0))
    with engine:
        handles = [engine.submit(make_prompts()[0], greedy(100), waited_s=3.0) for _ in range(5)]
        for handle in handles:
            next(iter(handle))
            handle.cancel()
    snapshot = engine.snapshot()["attainment"]
    assert (snapshot["num_requests"], snapshot["attained"]) == (5, 0.0)


def test_what_an_engine_reports_is_what_its_reader_saw() -> None:
    """A reader takes its own time of every event: it sees a token no sooner than the engine says, and hardly later."""
    engine = CheckedEngine(tiny_model(), engine_config(2, 1))
    with engine:
        sent_s = time.perf_counter()
        handle = engine.submit(make_prompts()[0], greedy(40))
        seen_s = [time.perf_counter() for event in handle if event.token_ids]
    timing = handle.timing
    assert len(seen_s) == 40
    assert 0 < (timing.ttft_s or 0) <= seen_s[0] - sent_s
    assert (timing.ttft_s or 0) + 39 * (timing.tpot_s or 0) <= seen_s[-1] - sent_s
    assert timing.waited_s == pytest.approx((timing.ttft_s or 0) + 39 * (timing.tpot_s or 0))
    for share, attained in ((0.99, 0.0), (1.01, 1.0)):
        attainment = Attainment(99.0)
        attainment.add(timing, Objectives(ttft_s=60.0, tpot_s=share * (timing.tpot_s or 0)), "completed")
        assert attainment.snapshot()["attained"] == attained
