"""The performance record that a start finds in the cache, or makes and keeps there."""

from __future__ import annotations

import logging
from pathlib import Path

from selectn_core.engine.engine import Engine
from selectn_core.errors import RecordRefused
from selectn_core.file_lock import file_lock
from selectn_core.planning.record import PerformanceRecord
from selectn_core.planning.record_table import derived_table
from selectn_core.profiling.profiler import DEFAULT_BUDGET_S, DEFAULT_MAX_LENGTH, OnProgress, profile
from selectn_core.profiling.record_files import cached_records, record_path
from selectn_core.weights.embedded_model import made_directory

__all__ = ["cached_records", "earlier_record", "measured_record", "performance_record", "record_path"]

logger = logging.getLogger(__name__)


def earlier_record(path: Path, engine: Engine, *, strict: bool = False) -> PerformanceRecord | None:
    """The record at `path` of what `engine` runs; None where there is none, or, logging why, where it cannot be used.

    `strict`: raises RecordRefused in the latter case.
    """
    if not path.exists():
        return None
    try:
        record = PerformanceRecord.load(path)
        record.require(engine.fingerprint, str(path))
        record.require_units([unit.num_bytes for unit in engine.units], str(path))
        return record
    except RecordRefused as error:
        if strict:
            raise
        logger.warning("measuring again: %s", error)
        return None


def measured_record(
    engine: Engine,
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    max_length: int = DEFAULT_MAX_LENGTH,
    earlier: PerformanceRecord | None = None,
    on_progress: OnProgress = lambda share, what: None,
) -> PerformanceRecord:
    """Measures (`profiler.profile`) and derives the record's table."""
    record = profile(engine, budget_s=budget_s, max_length=max_length, earlier=earlier, on_progress=on_progress)
    return record.with_table(derived_table(record, engine.device.capacity_bytes))


def performance_record(
    engine: Engine,
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_progress: OnProgress = lambda share, what: None,
) -> PerformanceRecord:
    """The cached record of what `engine` runs, or one that is measured now and cached.

    Replicas that start at once on one machine would disturb each other's measurements: one measures, the others wait
    for it. `engine` must not have been started.
    """
    path = record_path(engine.fingerprint)
    made_directory(path.parent)
    with file_lock(path.with_suffix(".lock")):
        known = earlier_record(path, engine)
        if known is not None:
            return known
        logger.info("no performance record of %s yet: measuring for about %.0f s", engine.model_name, budget_s)
        record = measured_record(engine, budget_s=budget_s, max_length=max_length, on_progress=on_progress)
        record.save(path)
    logger.info("performance record: %s", path)
    return record
