"""The table in a performance record: by objective, batch and length, how much may be offloaded and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from selectn_core.errors import Infeasible, NotMeasured
from selectn_core.latency.steps import StepShape
from selectn_core.planning.planner import Workload, planner_of
from selectn_core.planning.record import PerformanceRecord

# Of the unloaded decode step of the same batch and length.
TPOT_MULTIPLES = (1.25, 1.5, 2.0, 3.0)
_LENGTHS = (128, 512, 2048)


def derived_table(record: PerformanceRecord, device_bytes: int | None) -> tuple[dict[str, Any], ...]:
    """Rows for every batch that is a power of 4 up to the largest, and lengths that were measured."""
    return tuple(_rows(record, device_bytes))


def _rows(record: PerformanceRecord, device_bytes: int | None) -> Iterator[dict[str, Any]]:
    planner, times = planner_of([record], device_bytes=device_bytes), record.step_times()
    most = record.fingerprint.max_requests
    for batch in sorted({*(4**i for i in range(8) if 4**i < most), most}):
        for length in _LENGTHS:
            try:
                unloaded_s = times.conservative(StepShape.decode(batch, length).sampling()).unloaded_s
            except NotMeasured:
                continue
            for multiple in TPOT_MULTIPLES:
                tpot_s = multiple * unloaded_s
                row = {"batch": batch, "length": length, "tpot_ms": round(tpot_s * 1e3, 2)}
                try:
                    found = planner.plan(Workload(batch=batch, length=length, tpot_s=tpot_s))
                except Infeasible as error:
                    yield {**row, "infeasible": error.limiting}
                    continue
                interval = found.plan.interval
                yield {
                    **row,
                    "k_max": found.k_max,
                    "num_offloaded": found.plan.num_offloaded,
                    "num_slots": found.plan.num_slots,
                    "interval": round(interval, 2),
                    "offloaded_bytes": found.offloaded_bytes,
                    "step_ms": round(found.predictions[0].predicted_s * 1e3, 2),
                }
