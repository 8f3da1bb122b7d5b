"""The table that a performance record carries: for objective, batch and length what may be offloaded, and its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from selectn_core.plan_question import TPOT, Planner, Workload, planner_of

if TYPE_CHECKING:
    from selectn_core.record import PerformanceRecord

# Of the unloaded step: from an objective that barely allows a copy to one that allows nearly all.
TPOT_MULTIPLES = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0)


def derived_table(record: PerformanceRecord) -> tuple[Mapping[str, Any], ...]:
    """A row per measured decode step and TPOT objective, a multiple of that step with nothing offloaded.

    `k_max` is the most units that meet it; `num_offloaded`, `num_slots` and `interval` are the choice that frees most
    device memory, `host_bytes` what that keeps on the host only. Memory is taken to be enough.
    """
    return tuple(_rows(record))


def _rows(record: PerformanceRecord) -> Iterator[dict[str, Any]]:
    planner = planner_of([record])
    for batch, length in _measured_decodes(record):
        workload = Workload(batch=batch, length=length)
        unloaded_s, _ = planner.tightest(workload, TPOT)
        for multiple in TPOT_MULTIPLES:
            yield _row(planner, replace(workload, tpot_s=multiple * unloaded_s))


def _row(planner: Planner, workload: Workload) -> dict[str, Any]:
    assert workload.tpot_s is not None
    found = planner.plan(workload)
    return {
        "tpot_ms": round(workload.tpot_s * 1e3, 3),
        "batch": workload.batch,
        "length": workload.length,
        "units": found.unit_set,
        "k_max": found.k_max,
        "num_offloaded": found.plan.num_offloaded,
        "num_slots": found.plan.num_slots,
        "interval": round(found.plan.interval, 3) if found.plan.offloaded else None,
        "host_bytes": found.offloaded_bytes,
        "freed_bytes": found.freed_bytes,
        "step_ms": round(found.predictions[0].predicted_s * 1e3, 3),
    }


def _measured_decodes(record: PerformanceRecord) -> list[tuple[int, int]]:
    """(batch, length) of the steps that only decode; where lengths differed, the mean rounded down: it is covered."""
    shapes = [step.shape for step in record.steps if step.shape.is_decode_only]
    return sorted({(shape.num_decodes, shape.decode_kv_tokens // shape.num_decodes) for shape in shapes})
