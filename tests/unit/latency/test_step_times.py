"""Step times of any shape: near what was measured, and never promised below it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.errors import NotMeasured
from selectn_core.latency.recurrence import Link, StepCosts
from selectn_core.latency.step_times import MeasuredStep, SamplingTimes, StepTimes, while_copying
from selectn_core.latency.steps import StepShape
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry
from selectn_core.planning.record import PerformanceRecord, UnitKind
from tests.support.controlled import NUM_UNITS, UNIT_BYTES, grid, measured, rest_s, step_times, unit_s
from tests.support.paths import DATA
from tests.support.records import layer_record

SHAPES = st.one_of(
    st.builds(StepShape.decode, st.integers(1, 8), st.integers(1, 512)),
    st.builds(StepShape.prefill, st.integers(1, 128), st.integers(0, 256)),
)


def true_s(shape: StepShape) -> float:
    return rest_s(shape) + NUM_UNITS * unit_s(shape)


@given(shape=SHAPES)
def test_expected_times_are_near_those_of_the_machine(shape: StepShape) -> None:
    assert step_times().expected_s(shape) == pytest.approx(true_s(shape), rel=0.1)


@given(shape=SHAPES)
def test_nothing_is_promised_below_what_the_machine_takes(shape: StepShape) -> None:
    assert step_times().conservative(shape).unloaded_s >= true_s(shape)


@settings(max_examples=40)
@given(shape=SHAPES, other=SHAPES)
def test_a_larger_step_is_never_promised_to_be_faster(shape: StepShape, other: StepShape) -> None:
    times = step_times()
    if shape.covers(other):
        assert times.conservative(shape).unloaded_s >= times.conservative(other).unloaded_s


@given(held_out=st.sampled_from(grid()))
def test_a_measured_step_that_is_held_out_is_not_promised_below_its_own_measurement(held_out: StepShape) -> None:
    others = tuple(measured(shape) for shape in grid() if shape != held_out)
    times = StepTimes(others, [0] * NUM_UNITS, [UNIT_BYTES] * NUM_UNITS)
    step = measured(held_out)
    try:
        promised_s = times.conservative(held_out).unloaded_s
    except NotMeasured:
        return  # a corner of the grid: nothing covers it
    assert promised_s >= step.low_s


def test_outside_of_the_grid_nothing_is_promised() -> None:
    with pytest.raises(NotMeasured, match="selectn profile"):
        step_times().conservative(StepShape.decode(9, 1))


def test_the_parts_add_up() -> None:
    times, shape = step_times(), StepShape.decode(3, 77)
    assert times.expected(shape).unloaded_s == pytest.approx(times.expected_s(shape))


def test_a_busy_link_slows_compute_by_its_share_of_the_time() -> None:
    costs = StepCosts(compute_s=(1.0, 1.0), unit_bytes=(10, 10))
    assert while_copying(costs, 10, Link(bytes_per_s=10.0), 0.4).unloaded_s == pytest.approx(2 * 1.2)
    assert while_copying(costs, 1000, Link(bytes_per_s=10.0), 0.4).unloaded_s == pytest.approx(2 * 1.4)
    assert while_copying(costs, 0, Link(bytes_per_s=10.0), 0.4) is costs


def test_sampled_rows_add_to_the_rest_of_the_step_and_to_nothing_else() -> None:
    sampling = SamplingTimes(call_s=1e-4, row_s=7e-4, truncated_row_s=3e-4)
    times = StepTimes([measured(s) for s in grid()], [0] * NUM_UNITS, [UNIT_BYTES] * NUM_UNITS, sampling=sampling)
    greedy = StepShape.decode(8, 128)
    sampled, truncated = greedy.sampling(), greedy.sampling(6, 4)
    for shape, added_s in ((greedy, 0.0), (sampled, 1e-4 + 8 * 7e-4), (truncated, 1e-4 + 6 * 7e-4 + 4 * 3e-4)):
        for asked in (times.expected, times.conservative):
            assert asked(shape).compute_s == asked(greedy).compute_s
            assert asked(shape).rest_s - asked(greedy).rest_s == pytest.approx(added_s)
        assert times.expected_s(shape) - times.expected_s(greedy) == pytest.approx(added_s)


# A record of SmolLM2-135M as `selectn profile` wrote it on two shared CPU cores.
REAL = PerformanceRecord.load(DATA / "smollm2-135m.yaml")
SPREAD = max((step.high_s - step.low_s) / step.low_s for step in REAL.steps)


@pytest.mark.parametrize("held_out", REAL.steps, ids=lambda step: str(step.shape))
def test_no_step_of_a_real_record_is_promised_too_short_by_the_others(held_out: MeasuredStep) -> None:
    """By no more than the record's own spread."""
    others = tuple(step for step in REAL.steps if step is not held_out)
    times = StepTimes(others, REAL.unit_kinds, REAL.unit_bytes)
    try:
        promised_s = times.conservative(held_out.shape).unloaded_s
    except NotMeasured:
        return  # a corner of the grid: nothing covers it
    measured_s = held_out.rest_s + sum(held_out.kind_s[kind] for kind in REAL.unit_kinds)
    assert promised_s >= measured_s * (1 - SPREAD)


def test_a_real_record_is_met_by_the_fit() -> None:
    times = REAL.step_times()
    assert times.median_error() < 0.1


# -- sliding windows ------------------------------------------------------------------------------------------------

WINDOW = 512
SLIDING, FULL = "Layer/sliding_attention", "Layer/full_attention"
TYPES: dict[str, tuple[dict[str, int | None], tuple[int | None, ...]]] = {
    "every layer slides": ({"Layer": WINDOW}, (WINDOW,)),
    "layers alternate": ({FULL: None, SLIDING: WINDOW}, (None, WINDOW)),
}


def windowed_s(shape: StepShape, window: int | None) -> float:
    """A layer whose attention reads `window` keys of each request at most."""
    read = shape.attended(window)
    return 2e-3 + 2e-5 * shape.num_tokens + 2e-7 * read.kv_tokens + 1e-9 * read.prefill_pairs


def windowed_record(layers: dict[str, int | None], windows: tuple[int | None, ...]) -> PerformanceRecord:
    """Measured up to 2,048 keys and exact."""
    shapes = [StepShape.decode(batch, length) for batch in (1, 4, 8) for length in (32, 128, WINDOW, 2048)]
    shapes += [StepShape.prefill(tokens, past) for tokens in (64, 256) for past in (0, 256, WINDOW, 1792)]
    shapes += [StepShape.of([(tokens, past)], [256] * 7) for tokens in (64, 256) for past in (0, WINDOW)]
    steps = []
    for shape in shapes:
        kind_s = tuple(windowed_s(shape, window) for window in layers.values())
        total_s = 5e-3 + 6 * sum(kind_s)
        steps.append(
            MeasuredStep(shape=shape, kind_s=kind_s, rest_s=5e-3, low_s=total_s, high_s=total_s, num_samples=3)
        )
    blocks = tuple(BlockGeometry(page_size=16, blocks_per_sector=1, sliding_window=window) for window in windows)
    return replace(
        layer_record(),
        kinds=tuple(UnitKind(name=name, num_bytes=1000) for name in layers),
        unit_kinds=tuple(range(len(layers))) * 6,
        memory=replace(layer_record().memory, geometry=KvGeometry(sector_bytes=1024, types=blocks)),
        steps=tuple(steps),
    )


@pytest.mark.parametrize(("layers", "windows"), TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("length", [512, 4096, 32_768])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_keys_beyond_a_sliding_window_cost_nothing(layers, windows, length: int, batch: int) -> None:
    times = windowed_record(layers, windows).step_times()
    lengths = [length] * batch if batch != 3 else [length, length // 2, 100]
    for shape in (StepShape.of(decodes=lengths), StepShape.prefill(256, length)):
        true_s = 5e-3 + 6 * sum(windowed_s(shape, window) for window in layers.values())
        assert times.expected_s(shape) == pytest.approx(true_s, rel=0.03)


def test_where_every_layer_slides_a_promise_holds_for_requests_of_any_length() -> None:
    slides, alternates = (windowed_record(*each).step_times() for each in TYPES.values())
    longest = StepShape.decode(8, 32_768)
    assert slides.conservative(longest) == slides.conservative(StepShape.decode(8, 2048))
    with pytest.raises(NotMeasured):
        alternates.conservative(longest)
    # As many keys in all, but of one request: the windows of eight have more in them.
    assert not StepShape.decode(8, 64).covers(StepShape.decode(8, 128), [WINDOW])
    assert not StepShape.of(decodes=[8 * 2048 - 7, *[1] * 7]).covers(StepShape.decode(8, 2048), [WINDOW])
    assert StepShape.of(decodes=[8 * 2048 - 7, *[1] * 7]).covers(StepShape.decode(8, 2048))


def test_a_record_says_how_many_keys_each_request_had(tmp_path: Path) -> None:
    record = windowed_record(*TYPES["layers alternate"])
    uneven = replace(record.steps[0], shape=StepShape.of([(64, 700)], [3, 900, 900, 17]))
    record = replace(record, steps=(uneven, *record.steps[1:]))
    record.save(tmp_path / "record.yaml")
    loaded = PerformanceRecord.load(tmp_path / "record.yaml")
    assert [step.shape for step in loaded.steps] == [step.shape for step in record.steps]
