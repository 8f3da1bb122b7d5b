"""Profiling a real engine on a tiny model, the record it gives, and the first start that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import yaml

from selectn_core.engine.engine import Engine
from selectn_core.errors import NotMeasured, RecordRefused
from selectn_core.latency.steps import StepShape
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry
from selectn_core.planning.record import PerformanceRecord
from selectn_core.planning.record_table import derived_table
from selectn_core.profiling.profiler import is_long_enough, profile
from selectn_core.profiling.record_cache import performance_record, record_path
from selectn_core.profiling.step_grid import Extent, coarse_grid, fine_grid
from tests.support.engines import Batch, engine_config, generate, greedy, make_prompts, memory_gib_for
from tests.support.records import layer_record
from tests.support.tiny_models import tiny_model

BUDGET_S = 3.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def engine(cache: Path) -> Iterator[Engine]:
    engine = Engine(tiny_model(), engine_config("auto"))
    yield engine
    engine.close()


def test_a_profile_covers_what_the_engine_can_meet_and_leaves_it_as_it_was(engine: Engine) -> None:
    plan, seen = engine.target.plan, []
    record = profile(engine, budget_s=BUDGET_S, max_length=128, on_progress=lambda share, what: seen.append(share))
    assert seen == sorted(seen)
    assert engine.target.plan == plan
    assert engine.steps.num_steps == 0
    engine.batching.check_integrity()
    times, batch = record.step_times(), engine.config.batch
    for shape in (StepShape.decode(batch.max_requests, 16), StepShape.prefill(batch.max_batch_tokens)):
        assert times.conservative(shape).unloaded_s >= max(s.low_s for s in record.steps if shape.covers(s.shape))
    with pytest.raises(NotMeasured):
        times.conservative(StepShape.decode(batch.max_requests + 1, 16))
    assert all(step.low_s <= step.high_s and step.num_samples >= 1 for step in record.steps)
    assert record.link.bytes_per_s > 0
    full = StepShape.decode(batch.max_requests, 16)
    assert times.expected(full.sampling()).rest_s > times.expected(full).rest_s
    assert [copy.num_bytes for copy in record.link.copies] == sorted(copy.num_bytes for copy in record.link.copies)


def test_a_record_survives_its_file(engine: Engine, tmp_path: Path) -> None:
    record = profile(engine, budget_s=BUDGET_S, max_length=64)
    record = record.with_table(derived_table(record, engine.device.capacity_bytes))
    record.save(tmp_path / "record.yaml")
    loaded = PerformanceRecord.load(tmp_path / "record.yaml")
    assert loaded.fingerprint == record.fingerprint
    assert loaded.unit_bytes == record.unit_bytes
    assert loaded.memory == record.memory
    assert loaded.table == record.table
    assert astuple(loaded.sampling) == pytest.approx(astuple(record.sampling), abs=1e-7)
    assert len(record.table) > 0
    shape = StepShape.decode(2, 20)
    assert loaded.step_times().expected_s(shape) == pytest.approx(record.step_times().expected_s(shape), rel=0.02)
    assert list(tmp_path.glob(".record*")) == []


def test_an_incomplete_record_is_gone_on_with(engine: Engine) -> None:
    first = profile(engine, budget_s=0.01, max_length=64)
    assert not first.is_complete
    again = profile(engine, budget_s=BUDGET_S, max_length=64, earlier=first)
    assert again.steps[: len(first.steps)] == first.steps
    assert len(again.steps) > len(first.steps)
    assert again.link == first.link


def test_a_record_is_long_enough_for_what_it_has_and_no_more(engine: Engine) -> None:
    record = profile(engine, budget_s=0.01, max_length=64)
    assert [is_long_enough(record, engine, length) for length in (32, 64, 128)] == [True, True, False]


@pytest.mark.parametrize(
    ("num_slots", "batch"), [(1, {"max_requests": 16, "max_batch_tokens": 16}), (1, {"max_requests": 1}), (2, {})]
)
def test_whatever_may_be_configured_can_be_measured(cache: Path, num_slots: int, batch: Batch) -> None:
    """On a device with room for the slots, a layer and the least KV cache."""
    memory_gib = memory_gib_for(num_slots + 1, **batch)
    engine = Engine(tiny_model(), engine_config("auto", num_slots, memory_gib=memory_gib, **batch))
    try:
        assert 0 < engine.target.fewest(num_slots).num_offloaded < len(engine.units)
        assert profile(engine, budget_s=0.5, max_length=64).steps
    finally:
        engine.close()


def test_the_first_start_measures_and_the_second_finds_the_record(engine: Engine) -> None:
    record = performance_record(engine, budget_s=BUDGET_S)
    assert record_path(engine.fingerprint).exists()
    assert performance_record(engine, budget_s=0.0).created == record.created


def test_a_record_of_something_else_is_refused_with_what_differs(engine: Engine) -> None:
    record = profile(engine, budget_s=0.01, max_length=64)
    other = replace(record, fingerprint=replace(record.fingerprint, dtype="bfloat16", max_requests=99))
    with pytest.raises(
        RecordRefused, match=r"(?s)dtype: the record has 'bfloat16', running is 'float32'.*max_requests"
    ):
        engine.steer(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "selectn profile"),
        ("version: 1\n", "version=1 is not allowed: expected 2; run `selectn profile`"),
        ("- a list\n", "version=None is not allowed"),
        ("version: 2\nfingerprint: {}\n", "is damaged"),
        ("version: [1\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "record.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordRefused, match=message):
        PerformanceRecord.load(path)


def _decodes(value: object) -> Callable[[dict], None]:
    return lambda plain: plain["steps"][0]["shape"].update(decodes=value)


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda plain: plain["kinds"][0].update(num_bytes=0), "kinds.0.num_bytes=0"),
        (lambda plain: plain["kinds"][0].update(name=5), "kinds.0.name=5: expected text"),
        (lambda plain: plain["steps"][1].update(kind_s=[0.0]), "steps.1.kind_s.0=0.0"),
        (lambda plain: plain["steps"][1].update(low_s=0.0), "steps.1.low_s=0.0"),
        (lambda plain: plain["steps"][1].update(rest_s=1e300), "steps.1.rest_s=1e+300"),
        (_decodes([[5, 10**12]]), "steps.0.shape.decodes.0=[5, 1000000000000]"),
        (_decodes([[5, 1 << 30]]), "expected 1 to 8 requests (fingerprint.max_requests)"),
        (_decodes([[5, -3]]), "steps.0.shape.decodes.0=[5, -3]"),
        (_decodes([["5", 3]]), "steps.0.shape.decodes.0=['5', 3]"),
        (_decodes([]), "expected 1 to 8 requests (fingerprint.max_requests)"),
        (_decodes(None), "steps.0.shape.decodes=None: expected a list"),
        (lambda plain: plain["steps"][0]["shape"].update(prefills=[[0, 4]]), "steps.0.shape.prefills.0=[0, 4]"),
        (lambda plain: plain["steps"][0].update(shape=3), "steps.0.shape=3: expected the fields"),
        (lambda plain: plain["link"].update(slowdown=1e300), "link.slowdown=1e+300"),
        (lambda plain: plain["link"].update(copy_s=1e300), "link.copy_s=1e+300"),
        (lambda plain: plain["sampling"].update(row_s=1e300), "sampling.row_s=1e+300"),
        (lambda plain: plain["memory"]["geometry"].update(types=[]), "memory.geometry.types"),
        (lambda plain: plain["memory"]["geometry"]["types"][0].update(page_size=0), "types.0.page_size=0"),
        (lambda plain: plain["fingerprint"].update(torch=[1]), "fingerprint.torch=[1]: expected text"),
        (lambda plain: plain.update(is_complete="no"), "is_complete='no': expected true or false"),
        (lambda plain: plain.update(table="abc"), "table='abc': expected a list"),
        (lambda plain: plain.update(table=["abc"]), "table.0='abc': expected a mapping"),
        (lambda plain: plain.update(zzz=1), "zzz: there is no such field"),
        (lambda plain: plain["memory"].update(zzz=1), "memory.zzz: there is no such field"),
        (lambda plain: plain.pop("sampling"), "sampling is missing"),
        (lambda plain: plain.update(version=2.0), "version=2.0 is not allowed"),
        (lambda plain: plain.update(version=True), "version=True is not allowed"),
    ],
)
def test_a_damaged_record_is_refused_in_a_line_that_names_the_field(
    tmp_path: Path, change: Callable[[dict], None], flaw: str
) -> None:
    path = tmp_path / "record.yaml"
    layer_record().save(path)
    plain = yaml.safe_load(path.read_text())
    change(plain)
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(RecordRefused) as error:
        PerformanceRecord.load(path)
    assert flaw in str(error.value)
    assert "\n" not in str(error.value)


def test_a_record_of_other_units_is_refused_and_measured_again(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The same fingerprint, and units that differ in number or bytes from those that run."""
    record, num_units = performance_record(engine, budget_s=0.01), len(engine.units)
    kind = record.kinds[0]
    others = {
        f"the record has {num_units - 1} units, running are {num_units}": replace(
            record, unit_kinds=record.unit_kinds[:-1]
        ),
        f"the record has {num_units + 1} units, running are {num_units}": replace(
            record, unit_kinds=(*record.unit_kinds, 0)
        ),
        f"kinds.0.num_bytes: in the record unit 0 has 1 bytes, running it has {kind.num_bytes}": replace(
            record, kinds=(replace(kind, num_bytes=1), *record.kinds[1:])
        ),
    }
    path = record_path(engine.fingerprint)
    for flaw, other in others.items():
        with pytest.raises(RecordRefused, match=flaw):
            engine.steer(other)
        other.save(path)
        assert performance_record(engine, budget_s=0.01).unit_bytes == record.unit_bytes
        assert f"measuring again: {path} is of other units: " in caplog.text
        assert flaw in caplog.text


def test_a_damaged_record_in_the_cache_is_measured_again(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    path = record_path(engine.fingerprint)
    path.parent.mkdir(parents=True)
    path.write_text("version: 7\n")
    record = performance_record(engine, budget_s=0.01)
    assert PerformanceRecord.load(path).steps
    assert record.steps
    assert "measuring again" in caplog.text


@pytest.mark.parametrize("policy", ["select-n", "paper", "static", "all", "none"])
def test_tokens_do_not_depend_on_the_policy(cache: Path, policy: str) -> None:
    prompts = make_prompts()
    config = engine_config("auto")
    config = replace(config, offload=replace(config.offload, policy=policy))
    engine = Engine(tiny_model(), config)
    engine.steer(performance_record(engine, budget_s=BUDGET_S))
    with engine:
        # One after the other: what joins a step depends on measured times, and batches must be equal.
        tokens = [engine.submit(prompt, greedy()).result() for prompt in prompts]
    alone = [generate("llama", engine_config(0), prompts=[prompt])[0] for prompt in prompts]
    assert tokens == alone


def test_the_grid_has_its_corners_and_nothing_beyond() -> None:
    extent = Extent(max_tokens=64, max_requests=8, max_length=256, kv_tokens=1024)
    geometry = KvGeometry(
        sector_bytes=1024, types=(BlockGeometry(page_size=16, blocks_per_sector=1, sliding_window=None),)
    )
    shapes = [each for each in [*coarse_grid(extent), *fine_grid(extent)] if extent.fits(each, geometry, 64)]
    assert len(set(coarse_grid(extent))) == len(coarse_grid(extent))
    assert max(len(each) for each in shapes) == 8
    assert max(sum(tokens for tokens, _ in each) for each in shapes) == 64
    assert all(sum(request) <= 256 for each in shapes for request in each)


def test_a_model_with_sliding_windows_is_measured_at_them_and_beyond(cache: Path, tmp_path: Path) -> None:
    """Of its layers three read every key and two the last 12 of each request."""
    engine = Engine(tiny_model("qwen2_mixed"), engine_config("auto"))
    try:
        record = profile(engine, budget_s=0.5, max_length=64)
    finally:
        engine.close()
    assert sorted({max(step.shape.decodes) for step in record.steps if step.shape.num_decodes == 1}) == [12, 32, 64]
    assert record.memory.geometry.windows == (None, 12)
    record.save(tmp_path / "record.yaml")
    times = PerformanceRecord.load(tmp_path / "record.yaml").step_times()
    sliding = [i for i, kind in enumerate(record.unit_kinds) if record.kinds[kind].name.endswith("sliding_attention")]
    assert len(sliding) == 2
    near, far = (times.expected(StepShape.decode(1, length)).compute_s for length in (12, 60_000))
    assert [near[unit] for unit in sliding] == [far[unit] for unit in sliding]


@pytest.mark.parametrize(("max_tokens", "max_requests"), [(1, 1), (8, 8), (16, 1)])
def test_no_request_of_the_grid_is_without_a_token(max_tokens: int, max_requests: int) -> None:
    extent = Extent(max_tokens=max_tokens, max_requests=max_requests, max_length=256, kv_tokens=1024)
    assert all(tokens > 0 for each in [*coarse_grid(extent), *fine_grid(extent)] for tokens, _ in each)
