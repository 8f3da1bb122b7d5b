"""The offline stage's measurements: what steps of many shapes, and copies of many sizes, take on this machine.

The profiler runs real steps of the real engine before it starts, shape by shape. It begins with the corners of the
grid and a coarse inside, sampled in rounds so that a slow minute of the machine falls on every shape alike. Then it
refines, shape by shape, until what it has predicts the next ones, or its time is up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

import numpy as np

from selectn_core.decision_log import DecisionLog
from selectn_core.engine.engine import Engine
from selectn_core.engine.fingerprint import kinds_of
from selectn_core.latency.step_times import MeasuredStep, StepTimes
from selectn_core.latency.steps import StepLog, StepShape
from selectn_core.memory.plan_memory import fewest_offloaded
from selectn_core.planning.record import LinkRecord, MeasuredCopy, MemoryRecord, PerformanceRecord
from selectn_core.profiling.sampling_times import measure_sampling
from selectn_core.profiling.step_grid import (
    Extent,
    Requests,
    coarse_grid,
    described,
    extent_of,
    fine_grid,
    longest_beside,
    shape_of,
)
from selectn_core.profiling.unit_timer import UnitTimer

logger = logging.getLogger(__name__)

OnProgress = Callable[[float, str], None]  # share of the time that is used, what is being measured

DEFAULT_BUDGET_S = 45.0
DEFAULT_MAX_LENGTH = 2048
_COARSE_ROUNDS = 3
_REFINED_SAMPLES = 3
# Refining ends when this many shapes in a row were predicted to within the error, or within their own spread.
_PREDICTED_IN_A_ROW = 6
_GOOD_ERROR = 0.05
_COPY_SIZES = (1 << 16, 1 << 20, 1 << 22)
_COPIES_PER_SAMPLE = 4


def profile(
    engine: Engine,
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    max_length: int = DEFAULT_MAX_LENGTH,
    earlier: PerformanceRecord | None = None,
    on_progress: OnProgress = lambda share, what: None,
) -> PerformanceRecord:
    """Measures a loaded engine that was not started. Takes about `budget_s` seconds, and less where less will do.

    Steps have requests of at most `max_length` tokens. `earlier` is an incomplete record of the same fingerprint; what
    it has is not measured again. The engine is left as it was.
    """
    session = _Session(engine, budget_s, max_length, earlier, on_progress)
    plan = engine.target.plan
    try:
        return session.run()
    finally:
        engine.steps, engine.offloading.decisions = StepLog(), DecisionLog("interval")
        engine.set_plan(plan)


def is_long_enough(record: PerformanceRecord, engine: Engine, max_length: int) -> bool:
    """Whether `record` has requests as long as `profile` would measure on this engine."""
    extent = _extent(engine, max_length)
    lengths = (step.shape.decode_kv_tokens for step in record.steps if step.shape.num_decodes == 1)
    return max(lengths, default=0) >= longest_beside(extent, 1)


class _Session:
    """One run of the profiler."""

    def __init__(
        self,
        engine: Engine,
        budget_s: float,
        max_length: int,
        earlier: PerformanceRecord | None,
        on_progress: OnProgress,
    ) -> None:
        self.engine, self.on_progress = engine, on_progress
        self.started_s, self.budget_s = time.perf_counter(), budget_s
        self.kinds, self.unit_kinds = kinds_of(engine.units)
        self.unit_bytes = tuple(unit.num_bytes for unit in engine.units)
        self.earlier = earlier
        self.measured: dict[StepShape, MeasuredStep] = {step.shape: step for step in (earlier.steps if earlier else ())}
        self.num_sectors = engine.target.most_kv_sectors
        self.extent = _extent(engine, max_length)
        self.slowdown = earlier.link.slowdown if earlier else 0.0

    def run(self) -> PerformanceRecord:
        link = self.earlier.link if self.earlier else self._link()
        self._coarse()
        is_complete = self._refine()
        engine = self.engine
        vocab_size = engine.model.config.get_text_config().vocab_size
        return PerformanceRecord(
            fingerprint=engine.fingerprint,
            provenance=engine.device.provenance,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            kinds=self.kinds,
            unit_kinds=self.unit_kinds,
            memory=MemoryRecord(
                resident_bytes=engine.resident.num_bytes,
                num_reserved_sectors=engine.batching.pages.num_reserved,
                geometry=engine.batching.geometry,
                workspace=engine.workspace,
            ),
            link=link,
            steps=tuple(self.measured.values()),
            is_complete=is_complete,
            sampling=measure_sampling(engine.device, vocab_size, engine.config.batch.max_requests),
        )

    # -- steps --------------------------------------------------------------------------------------------------

    def _coarse(self) -> None:
        shapes = [each for each in self._possible(coarse_grid(self.extent)) if shape_of(each) not in self.measured]
        samples: dict[Requests, list[_Sample]] = {requests: [] for requests in shapes}
        for round_number in range(_COARSE_ROUNDS):
            for requests in shapes:
                self._report(f"round {round_number + 1} of {_COARSE_ROUNDS}: {described(requests)}")
                # A late round is skipped where time is short, never the first: every corner must be known.
                if round_number and self._used() > 0.8:
                    break
                samples[requests].append(self._sample(requests, warm_up=round_number == 0))
        for requests, mine in samples.items():
            self._add(requests, mine)

    def _refine(self) -> bool:
        """Adds shapes between those that are known; True when the rest is predicted well, False when time is up."""
        good = 0
        for requests in self._possible(fine_grid(self.extent)):
            if shape_of(requests) in self.measured:
                continue
            if self._used() >= 1:
                return False
            self._report(f"refining: {described(requests)}")
            samples = [self._sample(requests, warm_up=i == 0) for i in range(_REFINED_SAMPLES)]
            times = StepTimes(tuple(self.measured.values()), self.unit_kinds, self.unit_bytes)
            step = self._add(requests, samples)
            spread = (step.high_s - step.low_s) / step.low_s
            good = good + 1 if times.error(step) <= max(_GOOD_ERROR, spread / 2) else 0
            if good >= _PREDICTED_IN_A_ROW:
                break
        return True

    def _add(self, requests: Requests, samples: Sequence[_Sample]) -> MeasuredStep:
        step = MeasuredStep(
            shape=shape_of(requests),
            kind_s=tuple(median(each.kind_s[kind] for each in samples) for kind in range(len(self.kinds))),
            rest_s=median(each.rest_s for each in samples),
            low_s=min(each.total_s for each in samples),
            high_s=max(each.total_s for each in samples),
            num_samples=len(samples),
        )
        self.measured[step.shape] = step
        return step

    def _sample(self, requests: Requests, *, warm_up: bool) -> _Sample:
        """One step, with as few units offloaded as its keys allow, and what a busy link slowed it by taken out."""
        self._make_room(requests)
        engine = self.engine
        if warm_up:
            engine.batching.run_step(requests)
        before = engine.device.link_usage()
        with UnitTimer(engine.units, engine.device) as timer:
            engine.batching.run_step(requests)
            compute_s = timer.median_compute_s()
        record = engine.steps.records[-1]
        usage = engine.device.link_usage().since(before)
        slowed = 1 + self.slowdown * min(1.0, usage.busy_s / record.duration_s)
        kind_s = tuple(
            sum(t for t, kind in zip(compute_s, self.unit_kinds, strict=True) if kind == i) / self.unit_kinds.count(i)
            for i in range(len(self.kinds))
        )
        total_s = record.duration_s - record.stall_s
        return _Sample(
            kind_s=tuple(t / slowed for t in kind_s),
            rest_s=max(0.0, total_s - sum(compute_s)) / slowed,
            total_s=total_s / slowed,
        )

    def _make_room(self, requests: Requests) -> None:
        engine, geometry = self.engine, self.engine.batching.geometry
        sectors = sum(geometry.sectors_for_request(sum(request)) for request in requests)
        plan = engine.target.fewest_beside(sectors)
        assert plan is not None, "a shape that does not fit"
        if plan != engine.target.plan:
            engine.set_plan(plan)
            # One small step, so that what comes home with the new plan is not on its way during the next.
            engine.batching.run_step(((1, 0),))
            engine.device.synchronize()

    def _possible(self, grid: Iterable[Requests]) -> list[Requests]:
        geometry = self.engine.batching.geometry
        return [each for each in grid if self.extent.fits(each, geometry, self.num_sectors)]

    # -- the link -----------------------------------------------------------------------------------------------

    def _link(self) -> LinkRecord:
        self._report("the link alone")
        copies = self._copies_alone()
        sizes = np.array([copy.num_bytes for copy in copies], dtype=float)
        seconds = np.array([copy.median_s for copy in copies])
        # Relative errors count: the small copies tell the fixed cost, the large ones the bandwidth.
        per_byte, fixed_s = np.linalg.lstsq(
            np.stack([sizes, np.ones_like(sizes)], axis=1) / seconds[:, None], np.ones_like(seconds), rcond=None
        )[0]
        self._report("the link while the model computes")
        busy_bytes_per_s, self.slowdown = self._busy_link()
        return LinkRecord(
            bytes_per_s=float(1 / per_byte),
            copy_s=max(0.0, float(fixed_s)),
            busy_bytes_per_s=busy_bytes_per_s,
            slowdown=self.slowdown,
            copies=copies,
        )

    def _copies_alone(self) -> tuple[MeasuredCopy, ...]:
        engine = self.engine
        self._make_room(((1, 0),))
        engine.device.synchronize()
        unit = max(engine.units, key=lambda each: each.num_bytes)
        source = engine.store.buffer(unit)
        self._make_room_for_copy(unit.num_bytes)
        target = engine.arena.allocate(unit.num_bytes, "copies that are measured")
        try:
            sizes = sorted({*(size for size in _COPY_SIZES if size < unit.num_bytes), unit.num_bytes})
            return tuple(self._copies(source[:size], target[:size]) for size in sizes)
        finally:
            engine.device.synchronize()
            engine.arena.free(target)

    def _make_room_for_copy(self, num_bytes: int) -> None:
        """Offloads one unit more if the KV cache cannot spare the memory."""
        engine = self.engine
        if engine.arena.available_bytes(0) >= engine.arena.round_up(num_bytes):
            return
        size, room = engine.arena.round_up(num_bytes), engine.arena.reachable_bytes(0)
        # Twice its size where that is possible: it must be in one piece.
        plans = (fewest_offloaded(engine.units, 1, room - n * size, round_up=engine.arena.round_up) for n in (2, 1))
        plan = next((each for each in plans if each is not None), None)
        if plan is not None:
            engine.set_plan(plan)
            engine.batching.run_step(((1, 0),))

    def _copies(self, source: object, target: object) -> MeasuredCopy:
        device, samples = self.engine.device, []
        for _ in range(_COARSE_ROUNDS):
            before = device.link_usage()
            for _ in range(_COPIES_PER_SAMPLE):
                device.copy_async(source, target)  # type: ignore[arg-type]
            device.synchronize()
            usage = device.link_usage().since(before)
            samples.append((usage.busy_s + usage.waited_s) / _COPIES_PER_SAMPLE)
        return MeasuredCopy(
            num_bytes=source.nbytes,  # type: ignore[attr-defined]
            low_s=min(samples),
            median_s=median(samples),
            high_s=max(samples),
            num_samples=len(samples),
        )

    def _busy_link(self) -> tuple[float, float]:
        """Bandwidth while the model computes, and how much slower it computes then."""
        engine, requests = self.engine, ((min(16, self.extent.max_tokens), 0),)
        rates, quiet_s, busy_s, duties = [], [], [], []
        num_units = len(engine.units)
        for _ in range(_COARSE_ROUNDS + 1):  # the first of each is a warm-up
            self._make_room(requests)
            quiet_s.append(self._timed(requests))
            engine.set_num_offloaded(num_units, min(2, num_units))
            engine.batching.run_step(((1, 0),))
            before = engine.device.link_usage()
            busy_s.append(self._timed(requests))
            usage, record = engine.device.link_usage().since(before), engine.steps.records[-1]
            if usage.num_copies:
                rates.append(usage.share_bytes_per_s)
                duties.append(min(1.0, usage.busy_s / record.duration_s))
        if not rates:
            return float("inf"), 0.0
        ratio = median(busy_s[1:]) / median(quiet_s[1:])
        return median(rates), max(0.0, (ratio - 1) / max(0.25, median(duties)))

    def _timed(self, requests: Requests) -> float:
        """Seconds that the units computed in one step."""
        with UnitTimer(self.engine.units, self.engine.device) as timer:
            self.engine.batching.run_step(requests)
            return sum(timer.median_compute_s())

    # -- time ---------------------------------------------------------------------------------------------------

    def _used(self) -> float:
        return (time.perf_counter() - self.started_s) / self.budget_s

    def _report(self, what: str) -> None:
        self.on_progress(min(1.0, self._used()), what)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    kind_s: tuple[float, ...]
    rest_s: float
    total_s: float


def _extent(engine: Engine, max_length: int) -> Extent:
    geometry = engine.batching.geometry
    kv_tokens = geometry.tokens_in(engine.target.most_kv_sectors)
    windows = tuple(window for window in geometry.windows if window is not None)
    return extent_of(engine.config.batch, min(max_length, engine.max_model_len), kv_tokens, windows)
