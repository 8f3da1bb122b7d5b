"""Workloads as step shapes, and the inverse questions against a scan of every value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.errors import Infeasible, NotMeasured
from selectn_core.latency.recurrence import Link, StepCosts
from selectn_core.latency.steps import StepShape
from selectn_core.memory.memory_model import MemoryModel, kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.planner import TPOT, TTFT, Planner, UnitSource, Workload

NUM_UNITS = 6


@dataclass(frozen=True, kw_only=True)
class LinearTimes:
    """Times that grow with tokens and keys, known up to a size: what a record's are, without measuring."""

    token_s: float = 0.01
    key_s: float = 0.001
    most_tokens: int = 24

    def conservative(self, shape: StepShape) -> StepCosts:
        if shape.num_tokens > self.most_tokens:
            raise NotMeasured(f"no step of {shape.num_tokens} tokens was measured")
        unit_s = 0.1 + self.token_s * shape.num_tokens + self.key_s * shape.kv_tokens
        return StepCosts(compute_s=(unit_s,) * NUM_UNITS, unit_bytes=(1024,) * NUM_UNITS, rest_s=0.05)


def planner(*, device_bytes=None, bytes_per_s=20_000.0, **times) -> Planner:
    memory = MemoryModel(
        resident_bytes=512, kv=kv_of_tokens(16, page_size=16), workspace=Workspace(), device_bytes=device_bytes
    )
    source = UnitSource(times=LinearTimes(**times), memory=memory, sets={"every layer": None})
    return Planner(sources=[source], link=Link(bytes_per_s=bytes_per_s))


def test_a_workload_is_decode_steps_and_chunks() -> None:
    workload = Workload(batch=3, length=50, prompt=40, chunk_tokens=16)
    assert workload.tpot_shape() == StepShape.decode(3, 50).sampling()
    assert workload.ttft_shapes() == [StepShape.prefill(16), StepShape.prefill(16, 16), StepShape.prefill(8, 32)]
    assert Workload(batch=1, length=20).ttft_shapes() == [StepShape.prefill(20)]


def test_prefill_that_is_let_in_counts_for_both() -> None:
    """In the decoding requests' step, as the last chunk; in the prompt's, the others' decoding."""
    workload = Workload(batch=3, length=50, prompt=40, admitted_tokens=30)
    assert workload.tpot_shape() == StepShape.of([(30, 10)], [50] * 3).sampling()
    chunks = [StepShape.of([chunk], [50] * 2).sampling() for chunk in ((30, 0), (10, 30))]
    assert workload.ttft_shapes() == chunks


def test_both_objectives_hold() -> None:
    found = planner().plan(Workload(batch=2, length=64, tpot_s=3.0, ttft_s=9.0, chunk_tokens=16))
    predictions = {prediction.name: prediction for prediction in found.predictions}
    assert set(predictions) == {TPOT, TTFT}
    assert all(prediction.spare_s >= 0 for prediction in found.predictions)
    tight = planner().plan(
        Workload(batch=2, length=64, tpot_s=3.0, ttft_s=predictions[TTFT].predicted_s - 0.01, chunk_tokens=16)
    )
    assert tight.freed_bytes < found.freed_bytes


def test_a_step_without_a_limit_is_predicted_all_the_same() -> None:
    (prediction,) = planner().plan(Workload(batch=1, length=16)).predictions
    assert prediction.predicted_s > 0
    assert math.isinf(prediction.spare_s)


questions = st.builds(
    Workload,
    batch=st.integers(1, 6),
    length=st.integers(1, 60),
    tpot_s=st.sampled_from([0.9, 1.2, 2.0, 5.0]),
    ttft_s=st.sampled_from([None, 3.0, 8.0]),
    chunk_tokens=st.just(16),
)
planners = st.builds(
    planner,
    device_bytes=st.one_of(st.none(), st.integers(3500, 12_000)),
    bytes_per_s=st.sampled_from([2000.0, 8000.0]),
    most_tokens=st.sampled_from([20, 24]),
)


def scan(ask, values):
    """Up to the first value that is not feasible, one by one."""
    last = None
    for value in values:
        try:
            ask(value)
        except (Infeasible, NotMeasured):
            return last
        last = value
    return last


@given(planners, questions)
def test_the_largest_batch_is_where_a_scan_ends(asked, workload) -> None:
    expected = scan(lambda batch: asked.plan(replace(workload, batch=batch)), range(1, 100))
    if expected is None:
        with pytest.raises((Infeasible, NotMeasured)):
            asked.largest_batch(workload)
        return
    found = asked.largest_batch(workload)
    assert found.value == expected
    assert found.plan == asked.plan(replace(workload, batch=expected))
    assert found.stopped_by


@given(planners, questions)
def test_the_longest_input_is_where_a_scan_ends(asked, workload) -> None:
    expected = scan(lambda length: asked.plan(replace(workload, length=length)), range(1, 900))
    if expected is None:
        with pytest.raises((Infeasible, NotMeasured)):
            asked.longest_input(workload)
        return
    assert asked.longest_input(workload).value == expected


@given(planners, questions, st.sampled_from([TPOT, TTFT]))
def test_nothing_tighter_than_the_tightest_is_feasible(asked, workload, name) -> None:
    try:
        limit_s, found = asked.tightest(workload, name)
    except Infeasible:
        with pytest.raises(Infeasible):
            asked.plan(workload.with_limit(name, 1e6))
        return
    assert all(prediction.spare_s >= -1e-9 for prediction in found.predictions)
    with pytest.raises(Infeasible):
        asked.plan(workload.with_limit(name, limit_s * 0.999))


def test_what_was_not_measured_is_not_promised() -> None:
    with pytest.raises(NotMeasured, match="no step of 25 tokens"):
        planner().plan(Workload(batch=25, length=1))
    found = planner().largest_batch(Workload(batch=1, length=1))
    assert (found.value, found.stopped_by) == (24, "no step of 25 tokens was measured")
