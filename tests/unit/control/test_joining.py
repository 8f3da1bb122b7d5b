"""Requests of several objectives at once: what may begin, and that those who only wait change nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.control.controller import Controller, Decision
from selectn_core.control.joining import StepAdmission
from selectn_core.control.load import PLANNED_SHARE, Decoding, Load, Waiting, prefill_pace_s
from selectn_core.control.policies import SelectN
from selectn_core.control.steering import load_of
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link
from selectn_core.latency.step_times import SamplingTimes, StepTimes
from selectn_core.latency.steps import Chunk, StepShape
from selectn_core.requests.handle import RequestHandle, TokenEvent
from selectn_core.requests.objectives import Objectives
from selectn_core.requests.sampling import SamplingParams
from tests.support.controlled import LENGTH, LINK, MAX_TOKENS, NUM_UNITS, Request, Server, frontier, step_times

TIMES, FRONTIER = step_times(), frontier()
# Rows that are sampled take long.
SAMPLED = step_times(sampling=SamplingTimes(call_s=2e-3, row_s=4e-3, truncated_row_s=4e-3))
FULL_S = TIMES.expected_s(StepShape.decode(8, LENGTH))
ALONE_S = TIMES.expected_s(StepShape.decode(1, 16))
FAR_S = 1e6


def decode_s(batch: int, length: int = LENGTH) -> float:
    return TIMES.expected_s(StepShape.decode(batch, length))


def loose(count: int, *, output: int = 30) -> list[Request]:
    return [Request(prompt=16, output=output, tpot_s=2 * FULL_S) for _ in range(count)]


def served(
    requests: Sequence[Request], *, tpot_s: float = 2 * FULL_S, ttft_s: float = math.inf, link: Link = LINK
) -> Server:
    return Server(TIMES, tpot_s=tpot_s, ttft_s=ttft_s, link=link).serve(requests)


def decoding(tpot_s: float) -> Decoding:
    return Decoding(num_tokens=1, first_token_s=0.0, num_left=100, tpot_s=tpot_s)


def waiting(
    tpot_s: float,
    tokens: int = 16,
    *,
    deadline_s: float = FAR_S,
    num_past: int = 0,
    kv_bytes: int = 0,
    is_sampled: bool = False,
) -> Waiting:
    return Waiting(
        prefill_tokens=tokens,
        deadline_s=deadline_s,
        tpot_s=tpot_s,
        num_past=num_past,
        kv_bytes=kv_bytes,
        is_sampled=is_sampled,
    )


def answers(load: Load, num_steps: int = 6, times: StepTimes = TIMES) -> tuple[StepAdmission, list[Decision]]:
    """What a new controller says of the same requests, step after step, until it has settled."""
    controller = Controller(times, LINK, SelectN(FRONTIER), max_tokens=MAX_TOKENS)
    plan, decisions = OffloadPlan(offloaded=(), num_slots=1, num_units=NUM_UNITS), []
    for _ in range(num_steps):
        controller.guaranteed_plan(load, min(controller.tightest_kept_tpot_s(load), 2 * FULL_S))
        admission = controller.admit(load, plan)
        shape = load.sampling_in(StepShape.of([(max(1, admission.prefill_tokens), 0)], [LENGTH] * len(load.decoding)))
        decisions.append(controller.decide(shape, plan))
        plan = decisions[-1].plan
    return admission, decisions


# -- those who only wait ------------------------------------------------------------------------------------------


tpots = st.floats(0.3 * ALONE_S, 8 * FULL_S)
waiters = st.builds(waiting, tpots, st.integers(1, 400), deadline_s=st.floats(1.0, 100.0), kv_bytes=st.just(0))


@settings(max_examples=60, deadline=None)
@given(
    running=st.lists(st.builds(decoding, tpots), min_size=1, max_size=10),
    begun=st.lists(st.builds(waiting, tpots, st.integers(1, 400)), max_size=2),
    queue=st.lists(waiters, max_size=8),
    has_memory=st.booleans(),
)
def test_who_only_waits_changes_neither_the_plan_nor_the_batch_of_those_who_run(
    running: list[Decoding], begun: list[Waiting], queue: list[Waiting], has_memory: bool
) -> None:
    """Those for whom there is memory are passed by for want of time only; the others make steps no longer."""
    load = Load(now_s=0.1, decoding=running, waiting=begun, mean_kv_tokens=LENGTH, num_begun=len(begun))
    expected, planned = answers(load)
    full = replace(load, waiting=[*begun, *queue], num_fitting=None if has_memory else len(begun))
    admission, decisions = answers(full)
    if admission.beginning:  # these do not only wait
        promised = [each.tpot_s for each in running if PLANNED_SHARE * each.tpot_s >= ALONE_S]
        batch = len(running) + len(begun) + len(admission.beginning)
        assert decode_s(batch, 16) <= PLANNED_SHARE * min(promised, default=FAR_S)
    elif has_memory or not queue:
        assert admission.prefill_tokens == expected.prefill_tokens
        assert decisions == planned
    else:
        assert admission.prefill_tokens == expected.prefill_tokens
        assert all(a.limit_s <= b.limit_s * (1 + 1e-9) for a, b in zip(decisions, planned, strict=True))


def a_handle(num_tokens: int, params: SamplingParams, tpot_s: float) -> RequestHandle:
    handle = RequestHandle("r", 16, cancel=lambda ticket: None)
    handle.max_total_tokens += 200
    handle.params, handle.objectives = params, Objectives(ttft_s=FAR_S, tpot_s=tpot_s)
    if num_tokens:
        handle.push(TokenEvent(token_ids=(1,) * num_tokens))
    return handle


ways = st.sampled_from([SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9)])


@settings(max_examples=30, deadline=None)
@given(
    running=st.lists(ways, min_size=1, max_size=8),
    begun=st.lists(ways, max_size=2),
    queue=st.lists(ways, min_size=1, max_size=50),
    stretch=st.floats(1.1, 2.0),
)
def test_how_those_who_only_wait_choose_tokens_changes_no_plan_of_those_who_run(
    running: list[SamplingParams], begun: list[SamplingParams], queue: list[SamplingParams], stretch: float
) -> None:
    """A row that is sampled takes as long as four that are not; there is no memory for those who wait."""
    tpot_s = stretch * SAMPLED.expected_s(StepShape.decode(len(running), LENGTH).sampling())
    holding = {f"r{i}": a_handle(1, params, tpot_s) for i, params in enumerate(running)}
    holding |= {f"b{i}": a_handle(0, params, tpot_s) for i, params in enumerate(begun)}
    progress = {ticket: Chunk(0, 17) if handle.num_tokens else Chunk(9, 7) for ticket, handle in holding.items()}
    queued = {f"q{i}": a_handle(0, params, tpot_s) for i, params in enumerate(queue)}
    loads = []
    for waiters in ({}, {"q0": queued["q0"]}, queued):  # the last two differ in how those who wait choose tokens
        load = load_of({**waiters, **holding}, progress, {}, Objectives(ttft_s=FAR_S, tpot_s=tpot_s))
        loads.append(replace(load, now_s=holding["r0"].first_token_s, num_fitting=len(begun), is_full=True))
    (expected, planned), *others = [answers(load, times=SAMPLED) for load in loads]
    for admission, decisions in others:
        assert decisions == planned
        assert admission == expected


def test_one_that_samples_begins_where_its_rows_leave_time() -> None:
    """Beside greedy ones whose steps have room for one more of theirs, and none for its row."""
    greedy_s, sampled_s = (SAMPLED.expected_s(StepShape.decode(5, LENGTH).sampling(num)) for num in (0, 1))
    tpot_s = (greedy_s + sampled_s) / 2 / PLANNED_SHARE
    for is_sampled in (False, True):
        one = waiting(2 * tpot_s, tokens=LENGTH, is_sampled=is_sampled)
        load = Load(now_s=0.0, decoding=[decoding(tpot_s)] * 4, waiting=[one], mean_kv_tokens=LENGTH)
        admission, _ = answers(load, num_steps=1, times=SAMPLED)
        assert bool(admission.beginning) is not is_sampled


@pytest.mark.parametrize("place", range(8))
def test_a_tight_one_in_the_queue_leaves_the_others_their_batch(place: int) -> None:
    """It is feasible beside three others, not beside seven: those seven run together all the same."""
    tpot_s = decode_s(4, 48) / PLANNED_SHARE
    alone = loose(7)
    num_steps = len(served(alone).durations_s)
    others, tight = loose(7), Request(prompt=16, output=30, tpot_s=tpot_s)
    server = served([*others[:place], tight, *others[place:]])
    if place >= 4:  # before that it begins among the first, and they share its steps
        assert max(each.measured_ttft_s for each in others) == max(each.measured_ttft_s for each in alone)
        assert all(shape.num_decodes == 7 for shape in server.shapes[1:num_steps])
    assert all(each.measured_tpot_s <= each.tpot_s for each in (*others, tight))


def test_a_feasible_tight_one_behind_a_hundred_others_changes_no_plan() -> None:
    plans = []
    for queue in ([], [Request(prompt=64, output=60, tpot_s=1.2 * FULL_S)]):
        requests = [Request(prompt=64, output=60, tpot_s=2 * FULL_S) for _ in range(100)]
        server = Server(TIMES, tpot_s=2 * FULL_S, max_requests=8).serve([*requests, *queue], num_steps=120)
        plans.append([plan.num_offloaded for plan in server.plans])
    assert plans[0] == plans[1]
    assert max(plans[0]) > 4


def test_one_that_was_passed_by_for_half_of_its_ttft_has_its_turn() -> None:
    """Loose ones come without an end; each that ends would be replaced by the next."""
    tight = Request(prompt=16, output=30, tpot_s=decode_s(3, 48) / PLANNED_SHARE, ttft_s=4.0)
    crowd = [replace(each, arrives_s=0.3 * i) for i, each in enumerate(loose(60, output=60))]
    tight.arrives_s = 2.0
    served([*crowd, tight])
    behind = [each for each in crowd if each.arrives_s > tight.arrives_s]
    passed = [each for each in behind if each.tokens_s[0] < tight.tokens_s[0]]
    assert passed
    assert max(each.tokens_s[0] for each in passed) <= tight.arrives_s + 0.6 * tight.ttft_s
    assert tight.measured_tpot_s <= tight.tpot_s


def test_an_objective_that_cannot_be_kept_holds_back_nobody() -> None:
    """Waiting or running: it is missed whatever is done."""
    hopeless = 0.9 * ALONE_S
    requests = loose(6)
    with_it = [*loose(3), Request(prompt=16, output=30, tpot_s=hopeless), *loose(3)]
    server = served(with_it)
    assert len(server.durations_s) == len(served(requests).durations_s)
    assert max(plan.num_offloaded for plan in server.plans) > 4
    crowd = Load(now_s=0.0, decoding=[decoding(hopeless)] * 4, waiting=[waiting(2 * FULL_S)], mean_kv_tokens=LENGTH)
    admission, _ = answers(crowd, num_steps=1)
    assert len(admission.beginning) == 1
    assert admission.prefill_tokens == 16


def test_a_tight_one_waits_while_the_memory_of_the_others_needs_longer_steps() -> None:
    """With nothing offloaded it would be in time; what they hold is only there with most of it offloaded."""
    controller = Controller(TIMES, LINK, SelectN(FRONTIER), max_tokens=MAX_TOKENS)
    plan = OffloadPlan(offloaded=(), num_slots=1, num_units=NUM_UNITS)
    tight = waiting(1.3 * FULL_S, kv_bytes=1)
    load = Load(now_s=0.0, decoding=[decoding(3 * FULL_S)] * 4, waiting=[tight], mean_kv_tokens=LENGTH)
    for lacking_bytes, may_begin in ((0, True), (100_000_000, False)):
        controller.lacking_bytes = lacking_bytes
        controller.guaranteed_plan(load, 3 * FULL_S)
        assert bool(controller.admit(load, plan).beginning) == may_begin


@pytest.mark.parametrize("tight_share", [0.2, 0.5])
def test_a_mix_keeps_both_objectives_and_is_as_fast_as_if_all_were_tight(tight_share: float) -> None:
    def arriving(share: float) -> list[Request]:
        return [
            Request(
                prompt=32,
                output=40,
                tpot_s=(1.3 if i % 10 < 10 * share else 3.0) * FULL_S,
                ttft_s=20.0,
                arrives_s=0.35 * i,
            )
            for i in range(60)
        ]

    mix, tight = arriving(tight_share), arriving(1.0)
    served(mix, tpot_s=3 * FULL_S)
    served(tight, tpot_s=1.3 * FULL_S)
    tokens = [
        sum(at_s <= mix[-1].arrives_s for each in requests for at_s in each.tokens_s) for requests in (mix, tight)
    ]
    assert all(each.measured_tpot_s <= each.tpot_s and each.measured_ttft_s <= each.ttft_s for each in mix)
    assert tokens[0] >= 0.95 * tokens[1]


# -- prompts ------------------------------------------------------------------------------------------------------


def test_chunks_count_the_keys_that_came_before_them() -> None:
    """A prompt goes on beside eight that decode, and their steps stay within the objective though it grows long."""
    crowd = [Request(prompt=100, output=500, tpot_s=1.5 * FULL_S) for _ in range(8)]
    long = Request(prompt=4096, output=4, tpot_s=1.5 * FULL_S, arrives_s=1.0)
    server = served([*crowd, long], tpot_s=1.5 * FULL_S)
    steps = zip(server.durations_s[1:], server.shapes[1:], server.plans[1:], server.plans, strict=False)
    late = [
        duration_s
        for duration_s, shape, plan, before in steps
        if shape.num_decodes == 8 and not shape.is_decode_only and duration_s > 1.5 * FULL_S and plan == before
    ]
    assert late == []
    assert all(each.measured_tpot_s <= each.tpot_s for each in crowd)


def test_the_pace_of_a_long_prompt_leaves_time_for_its_slower_end() -> None:
    """Chunks of 100 tokens take a second more after every hundred keys. At its pace each is in proportion."""

    def chunk_s(num_past: int) -> float:
        return 1 + num_past / 100

    total_s = sum(chunk_s(past) for past in range(0, 1000, 100))
    for past in (0, 500):
        left_s = sum(chunk_s(each) for each in range(past, 1000, 100))
        request = waiting(1.0, 1000 - past, num_past=past, deadline_s=2 * left_s)
        assert prefill_pace_s([request], 0.0, 100, chunk_s) == pytest.approx(1.6 * chunk_s(past) / 100, rel=0.02)
    alike = [waiting(1.0, 100, deadline_s=2 * total_s) for _ in range(10)]
    assert prefill_pace_s(alike, 0.0, 100, chunk_s) == pytest.approx(1.6 * total_s / 1000)


@pytest.mark.parametrize("gb_per_s", [0.5, 2.0])
@pytest.mark.parametrize("prompt", [64, 128, 512, 8192])
@pytest.mark.parametrize("multiple", [2.0, 4.0])
def test_lone_prompts_are_in_time(gb_per_s: float, prompt: int, multiple: float) -> None:
    """TTFT is 1.3 times the unloaded prefill, one prompt after the other, whatever the decode steps before allowed."""
    starts = range(0, prompt, MAX_TOKENS)
    unloaded_s = sum(TIMES.expected_s(StepShape.prefill(min(MAX_TOKENS, prompt - at), at)) for at in starts)
    requests = [
        Request(prompt=prompt, output=40, tpot_s=multiple * FULL_S, ttft_s=1.3 * unloaded_s, arrives_s=1e3 * i)
        for i in range(3)
    ]
    server = served(requests, tpot_s=multiple * FULL_S, ttft_s=1.3 * unloaded_s, link=Link(bytes_per_s=gb_per_s * 1e9))
    assert all(each.measured_ttft_s <= each.ttft_s for each in requests)
    decodes = [
        duration_s for duration_s, shape in zip(server.durations_s, server.shapes, strict=True) if shape.num_decodes
    ]
    assert max(decodes) <= multiple * FULL_S
    assert max(plan.num_offloaded for plan in server.plans) >= 3


def test_weights_do_not_come_home_for_a_prompt_that_would_be_later_for_it() -> None:
    """One step of prefill is over before they are there; of many steps the others gain what the first one loses."""
    for prompt, moves in ((100, False), (8000, True)):
        requests = [Request(prompt=prompt, output=40, tpot_s=8 * FULL_S, arrives_s=1e3 * i) for i in range(2)]
        server = served(requests[:1], tpot_s=8 * FULL_S, link=Link(bytes_per_s=4e8))
        deep, before = server.plan, len(server.plans)
        requests[1].ttft_s = 1.5 * TIMES.expected_s(StepShape.prefill(100)) * prompt / 100
        server.serve(requests[1:])
        assert (server.plans[before].num_offloaded < deep.num_offloaded) == moves
