"""The controller in a closed loop: it keeps the objective, offloads as far as that allows, and follows the machine."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.control.estimates import ComputeScale, LinkEstimate
from selectn_core.control.load import PLANNED_SHARE, Decoding, Load, Waiting
from selectn_core.control.policies import Paper, Situation
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link
from selectn_core.latency.step_times import SamplingTimes
from selectn_core.latency.steps import StepShape
from tests.support.controlled import (
    BATCH,
    LENGTH,
    LINK,
    MAX_TOKENS,
    NUM_UNITS,
    UNIT_BYTES,
    Machine,
    Request,
    Server,
    frontier,
    step_times,
)

UNLOADED_S = step_times().expected_s(StepShape.decode(BATCH, LENGTH))


def quarter(link: Link) -> Link:
    return replace(link, bytes_per_s=link.bytes_per_s / 4)


@pytest.mark.parametrize("multiple", [1.1, 1.5, 2.0, 3.0])
def test_steady_steps_meet_the_objective_and_use_most_of_it(multiple: float) -> None:
    machine = Machine(step_times(), tpot_s=multiple * UNLOADED_S).run(60)
    settled = machine.durations_s[20:]
    assert max(settled) <= machine.tpot_s
    # One unit more would not have fitted: its copy alone would exceed what is left.
    left_s = machine.tpot_s - mean(settled)
    k = machine.plan.num_offloaded
    assert k == NUM_UNITS or left_s < 2 * UNIT_BYTES / LINK.bytes_per_s + 0.08 * machine.tpot_s
    assert k > 0


@pytest.mark.parametrize("slowdown", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("multiple", [1.2, 1.35, 1.5, 2.0])
def test_plans_do_not_go_to_and_fro_where_copies_slow_compute(multiple: float, slowdown: float) -> None:
    """What fits beside the few copies of now need not fit beside its own."""
    machine = Machine(step_times(), tpot_s=multiple * UNLOADED_S, slowdown=slowdown).run(80)
    settled = machine.plans[30:]
    assert len(set(settled)) <= 2
    assert sum(a != b for a, b in pairwise(settled)) <= 2


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_record_that_is_wrong_by_two_is_found_out(factor: float) -> None:
    machine = Machine(step_times(factor=factor), tpot_s=1.6 * UNLOADED_S).run(60)
    assert max(machine.durations_s[30:]) <= machine.tpot_s
    right = Machine(step_times(), tpot_s=1.6 * UNLOADED_S).run(60)
    assert abs(machine.plan.num_offloaded - right.plan.num_offloaded) <= 1


def test_sampling_is_not_taken_for_slow_compute() -> None:
    """A third of the unloaded step: in the record it is rest of the step, and what is learned of compute stays 1."""
    sampling = SamplingTimes(row_s=UNLOADED_S / 3 / BATCH)
    tpot_s = 2 * UNLOADED_S
    machine = Machine(step_times(sampling=sampling), tpot_s=tpot_s, sampling=sampling).run(60)
    assert machine.controller.compute_scale == pytest.approx(1.0, abs=0.01)
    assert max(machine.durations_s[20:]) <= tpot_s
    # With the same requests greedy there is more time to hide copies in, at once.
    machine.shape = StepShape.decode(BATCH, LENGTH)
    greedy = Machine(step_times(), tpot_s=tpot_s).run(60)
    assert machine.run(10).plan.num_offloaded >= greedy.plan.num_offloaded - 1
    assert machine.controller.compute_scale == pytest.approx(1.0, abs=0.01)
    # A record that says nothing of sampling leaves it to be learned as slow compute.
    blind = Machine(step_times(), tpot_s=tpot_s, sampling=sampling).run(60)
    assert blind.controller.compute_scale > 1.2


def test_a_link_that_drops_to_a_quarter_costs_three_steps_at_most_and_comes_back() -> None:
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S).run(40)
    before = machine.plan.num_offloaded
    machine.forget()
    machine.link = quarter(LINK)
    machine.run(40)
    late = [duration_s > machine.tpot_s for duration_s in machine.durations_s[40:]]
    assert sum(late) <= 3
    assert not any(late[3:])
    assert 0 < machine.plan.num_offloaded < before
    machine.link = LINK
    machine.run(60)
    assert machine.plan.num_offloaded == before


def test_memory_is_taken_from_requests_only_where_the_link_is_below_its_guarantee() -> None:
    for share, is_urgent in ((1.0, True), (0.25, False)):
        machine = Machine(step_times(), tpot_s=2 * UNLOADED_S)
        machine.controller.link.guaranteed_bytes_per_s = share * LINK.bytes_per_s
        machine.run(30)
        machine.link = quarter(LINK)
        machine.run(4)
        assert any(machine.urgent[30:]) == is_urgent


def test_a_record_whose_link_is_too_fast_is_corrected_by_what_is_seen() -> None:
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S, link=replace(LINK, bytes_per_s=4 * LINK.bytes_per_s))
    machine.run(60)
    assert max(machine.durations_s[20:]) <= machine.tpot_s


def test_a_shape_outside_of_the_grid_is_planned_all_the_same() -> None:
    machine = Machine(step_times(), tpot_s=3 * UNLOADED_S)
    machine.shape = StepShape.decode(40, 3000)
    machine.run(30)
    true_s = machine.true.expected_s(machine.shape)
    assert machine.durations_s[-1] >= true_s * (1 - 1e-9)
    if true_s > machine.tpot_s:  # nothing helps: then as fast as it goes
        assert machine.plan.num_offloaded == 0


def test_an_objective_below_the_unloaded_step_is_reported_and_everything_stays_resident() -> None:
    machine = Machine(step_times(), tpot_s=0.9 * UNLOADED_S).run(20)
    assert machine.plan.num_offloaded == 0
    assert machine.durations_s[-1] == pytest.approx(UNLOADED_S, rel=0.02)


def test_requests_that_are_behind_get_shorter_steps_until_they_have_caught_up() -> None:
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S).run(30)
    steady = machine.durations_s[-1]
    machine.forget()
    machine.now_s = 1.5 * machine.tpot_s  # their second token is late already
    machine.run(10)
    assert min(machine.durations_s[30:]) < steady
    assert machine.now_s / (machine.num_tokens - 1) <= machine.tpot_s


def test_the_plan_does_not_swing_when_nothing_changes() -> None:
    machine = Machine(step_times(), tpot_s=1.7 * UNLOADED_S).run(100)
    changes = sum(a != b for a, b in zip(machine.plans[30:], machine.plans[31:], strict=False))
    assert changes <= 2


def test_ours_offloads_at_least_as_much_as_the_papers_integer_interval() -> None:
    for multiple in (1.2, 1.5, 2.0, 2.5, 3.0):
        ours = Machine(step_times(), tpot_s=multiple * UNLOADED_S).run(50)
        paper = Machine(step_times(), policy=Paper(frontier()), tpot_s=multiple * UNLOADED_S).run(50)
        assert ours.plan.num_offloaded >= paper.plan.num_offloaded
        assert max(paper.durations_s[20:]) <= paper.tpot_s


# -- what may join a step ------------------------------------------------------------------------------------------


def waiting(tokens: int, deadline_s: float) -> Waiting:
    return Waiting(prefill_tokens=tokens, deadline_s=deadline_s, tpot_s=1.0)


def test_prefill_beside_decoding_is_cut_to_what_their_tpot_allows() -> None:
    machine = Machine(step_times(), tpot_s=1.3 * UNLOADED_S)
    machine.waiting = [waiting(1000, 1000.0)]
    admission = machine.controller.admit(machine.load(), machine.plan)
    shape = StepShape.of([(admission.prefill_tokens, 0)], [LENGTH] * BATCH)
    assert 0 < admission.prefill_tokens < MAX_TOKENS - BATCH
    assert machine.true.expected_s(shape) <= machine.tpot_s


def test_prefill_is_not_held_for_ever_by_what_it_took_while_the_machine_was_disturbed() -> None:
    """Steps with prefill took five times as long for a while; those that decode would go on for hours."""
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S).run(20)
    shape = StepShape.of([(16, 0)], [LENGTH] * BATCH)
    for _ in range(24):
        record = replace(machine._record(5 * step_times().expected_s(shape)), shape=shape, stall_s=0.0)
        machine.controller.learn(record, machine.usage)
    machine.waiting = [waiting(100, 1000.0)]
    assert machine.controller.admit(machine.load(), machine.plan).prefill_tokens == 0
    machine.run(30)
    assert machine.controller.admit(machine.load(), machine.plan).prefill_tokens > 0


def test_prefill_alone_is_not_cut() -> None:
    machine = Machine(step_times(), tpot_s=1.3 * UNLOADED_S)
    load = Load(now_s=0.0, decoding=(), waiting=[waiting(1000, 10.0)], mean_kv_tokens=1)
    assert machine.controller.admit(load, machine.plan).prefill_tokens == MAX_TOKENS


def test_a_prompt_in_a_hurry_brings_weights_home() -> None:
    calm, hurried = (Machine(step_times(), tpot_s=4 * UNLOADED_S) for _ in range(2))
    for machine, deadline_s in ((calm, 1e6), (hurried, 0.12)):
        machine.waiting = [waiting(MAX_TOKENS, deadline_s)]
        load = Load(now_s=0.0, decoding=(), waiting=machine.waiting, mean_kv_tokens=1)
        for _ in range(8):
            machine.controller.admit(load, machine.plan)
            machine.plan = machine.controller.decide(StepShape.prefill(MAX_TOKENS), machine.plan).plan
    assert hurried.plan.num_offloaded < calm.plan.num_offloaded


def test_while_requests_wait_for_memory_steps_are_not_stretched_to_the_objective() -> None:
    calm, busy = (Machine(step_times(), tpot_s=3 * UNLOADED_S) for _ in range(2))
    for machine in (calm, busy):
        machine.controller.link.guaranteed_bytes_per_s = LINK.bytes_per_s / 4
    busy.waiting, busy.num_fitting = [waiting(100, 1000.0)], 0
    assert max(busy.run(40).durations_s[20:]) <= 1.3 * UNLOADED_S < min(calm.run(40).durations_s[20:])
    guaranteed = busy.controller.guaranteed_plan(busy.load(), busy.tpot_s)
    assert guaranteed.num_offloaded <= busy.plan.num_offloaded < calm.plan.num_offloaded


def test_what_is_guaranteed_holds_when_the_link_falls_to_it() -> None:
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S)
    machine.controller.link.guaranteed_bytes_per_s = LINK.bytes_per_s / 4
    guaranteed = machine.controller.guaranteed_plan(machine.load(), machine.tpot_s)
    machine.run(30)
    assert machine.plan.num_offloaded > guaranteed.num_offloaded
    machine.forget()
    machine.link = quarter(LINK)
    machine.run(30)
    assert machine.plan.num_offloaded >= guaranteed.num_offloaded


def test_a_request_that_is_late_already_hurries_nobody() -> None:
    machine = Machine(step_times(), tpot_s=2 * UNLOADED_S)
    load = Load(now_s=5.0, decoding=(), waiting=[waiting(64, 4.0)], mean_kv_tokens=1)
    machine.controller.admit(load, machine.plan)
    decision = machine.controller.decide(StepShape.prefill(64), machine.plan)
    assert decision.limit_s == pytest.approx(PLANNED_SHARE * 1.0)


def test_no_request_begins_that_would_make_the_batch_too_slow() -> None:
    machine = Machine(step_times(), tpot_s=1.02 * UNLOADED_S / 0.92)
    crowd = [Decoding(num_tokens=1, first_token_s=0.0, num_left=100, tpot_s=machine.tpot_s)] * (4 * BATCH)
    load = Load(now_s=0.0, decoding=crowd, waiting=[waiting(16, 100.0)], mean_kv_tokens=LENGTH)
    assert machine.controller.admit(load, machine.plan).beginning == []


def test_a_burst_begins_as_far_as_everybody_will_decode_in_time() -> None:
    """Nobody runs yet: all could compute their prompts in one step, and would be too slow ever after."""
    machine = Machine(step_times(), tpot_s=1.1 * UNLOADED_S)
    burst = [waiting(4, 100.0) for _ in range(4 * BATCH)]
    load = Load(
        now_s=0.0, decoding=(), waiting=[replace(each, tpot_s=machine.tpot_s) for each in burst], mean_kv_tokens=1
    )
    admission = machine.controller.admit(load, machine.plan)
    num_beginning = len(admission.beginning)
    limit_s, times = PLANNED_SHARE * machine.tpot_s, machine.true
    assert times.expected_s(StepShape.decode(num_beginning, 16)) <= limit_s
    assert times.expected_s(StepShape.decode(num_beginning + 1, 16)) > limit_s
    assert admission.prefill_tokens == 4 * num_beginning
    begun = replace(load, num_begun=num_beginning)
    assert machine.controller.admit(begun, machine.plan).beginning == []
    hopeless = replace(load, waiting=[replace(each, tpot_s=1e-9) for each in burst])
    assert len(machine.controller.admit(hopeless, machine.plan).beginning) == len(burst)


@settings(max_examples=60, deadline=None)
@given(
    decoding=st.lists(
        st.builds(
            Decoding,
            num_tokens=st.integers(1, 500),
            first_token_s=st.floats(0, 10),
            num_left=st.integers(0, 500),
            tpot_s=st.floats(1e-3, 1),
        ),
        max_size=40,
    ),
    queue=st.lists(st.builds(waiting, st.integers(0, 5000), st.floats(0, 30)), max_size=40),
)
def test_whatever_the_requests_are_the_controller_answers_within_its_limits(
    decoding: list[Decoding], queue: list[Waiting]
) -> None:
    machine = Machine(step_times(), tpot_s=1.0)
    load = Load(now_s=10.0, decoding=decoding, waiting=queue, mean_kv_tokens=100)
    admission = machine.controller.admit(load, machine.plan)
    assert 0 <= admission.prefill_tokens <= MAX_TOKENS
    shape = StepShape.of([(max(1, admission.prefill_tokens), 0)], [100] * len(decoding))
    plan = machine.controller.decide(shape, machine.plan).plan
    assert 0 <= plan.num_offloaded <= NUM_UNITS


# -- what is learned -----------------------------------------------------------------------------------------------


def test_more_run_at_once_where_fewer_requests_must_keep_their_objective() -> None:
    """Steps take up to half as long again, by chance."""
    batches, kept = {}, {}
    for percentile in (50.0, 99.0, 100.0):
        requests = [Request(prompt=16, output=17, tpot_s=1.5 * UNLOADED_S) for _ in range(96)]
        server = Server(step_times(), tpot_s=1.5 * UNLOADED_S, spread=0.5)
        server.controller.aim_at(server.controller.policy, math.inf, percentile)
        server.serve(requests)
        batches[percentile] = mean(shape.num_requests for shape in server.shapes)
        kept[percentile] = mean(each.measured_tpot_s <= each.tpot_s for each in requests[16:])
    assert batches[50.0] > batches[99.0] > batches[100.0]
    assert all(kept[percentile] >= percentile / 100 for percentile in kept)


def test_the_percentile_of_steps_is_that_of_means_over_a_request() -> None:
    scale = ComputeScale()
    for ratio in range(24):
        scale.add(float(ratio))
    highs = {}
    for percentile in (1.0, 50.0, 90.0, 99.0, 100.0):
        scale.percentile = percentile
        highs[percentile] = scale.high
    assert highs == {1.0: 4.0, 50.0: 12.0, 90.0: 16.0, 99.0: 19.0, 100.0: 23.0}


def copies(count: int, bytes_per_s: float) -> LinkUsage:
    return LinkUsage(copied_bytes=count * UNIT_BYTES, num_copies=count, busy_s=count * UNIT_BYTES / bytes_per_s)


def test_one_slow_copy_is_not_believed_and_two_are() -> None:
    estimate = LinkEstimate(LINK)
    estimate.add(copies(1, LINK.bytes_per_s))
    estimate.add(copies(1, LINK.bytes_per_s / 10))
    assert estimate.link.bytes_per_s == LINK.bytes_per_s
    estimate.add(copies(1, LINK.bytes_per_s / 5))
    assert estimate.link.bytes_per_s == pytest.approx(LINK.bytes_per_s / 5)


def test_a_share_from_the_coordinator_is_never_exceeded() -> None:
    estimate = LinkEstimate(LINK)
    estimate.share_bytes_per_s = LINK.bytes_per_s / 3
    estimate.add(copies(10, LINK.bytes_per_s))
    assert estimate.link.bytes_per_s == pytest.approx(LINK.bytes_per_s / 3)


def test_an_estimate_without_traffic_drifts_back() -> None:
    estimate = LinkEstimate(LINK)
    estimate.add(copies(10, LINK.bytes_per_s / 10))
    for _ in range(400):
        estimate.add(copies(0, 1.0))
    assert estimate.link.bytes_per_s == pytest.approx(LINK.bytes_per_s, rel=0.01)


def test_one_odd_step_does_not_change_the_scale_of_compute() -> None:
    scale = ComputeScale()
    for _ in range(20):
        scale.add(1.0)
    scale.add(10.0)
    assert scale.middle == scale.high == 1.0


def test_no_decided_step_waits_for_a_look() -> None:
    """What more could be offloaded is found beside the steps, and followed: no choice is made in `decide`."""
    machine = Machine(step_times(), tpot_s=4 * UNLOADED_S)
    controller, choose = machine.controller, machine.controller.policy.choose
    chosen_in: list[str] = []
    now = ["outside"]

    def noted(asked: Situation) -> OffloadPlan:
        chosen_in.append(now[-1])
        return choose(asked)

    with patch.object(controller.policy, "choose", noted):
        controller.guaranteed_plan(machine.load(), machine.tpot_s)
        for _ in range(30):
            controller.admit(machine.load(), machine.plan)
            now.append("decide")
            machine.plan = controller.decide(machine.shape, machine.plan).plan
            now.append("look")
            controller.look()
            now.append("outside")
    assert machine.plan.num_offloaded > 0
    assert set(chosen_in) == {"outside", "look"}


def test_what_a_look_has_found_is_not_followed_when_it_is_no_longer_good() -> None:
    def plan_after(max_offloaded_bytes: int | None) -> OffloadPlan:
        machine = Machine(step_times(), tpot_s=4 * UNLOADED_S)
        while not machine.controller.knows_better:
            machine.controller.admit(machine.load(), machine.plan)
            machine.plan = machine.controller.decide(machine.shape, machine.plan).plan
            machine.controller.look()
        machine.controller.max_offloaded_bytes = max_offloaded_bytes
        return machine.controller.decide(machine.shape, machine.plan).plan

    assert plan_after(None).num_offloaded > 0
    assert plan_after(0).num_offloaded == 0
