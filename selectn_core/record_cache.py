"""Where performance records are kept, by fingerprint, and the first start that makes one."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from selectn_core.embedded import cache_directory
from selectn_core.errors import RecordRefused
from selectn_core.fingerprint import fingerprint_of
from selectn_core.profiler import DEFAULT_BUDGET_S, DEFAULT_MAX_LENGTH, OnProgress, profile
from selectn_core.record import Fingerprint, PerformanceRecord

if TYPE_CHECKING:
    from selectn_core.engine import Engine

logger = logging.getLogger(__name__)


def record_path(fingerprint: Fingerprint) -> Path:
    """The file of the record with this fingerprint."""
    return cache_directory() / "records" / f"{fingerprint.model_type}-{fingerprint.key()}.yaml"


def cached_record(fingerprint: Fingerprint) -> PerformanceRecord | None:
    """The record in the cache; None, logging why, where there is none that can be read."""
    path = record_path(fingerprint)
    if not path.exists():
        return None
    try:
        record = PerformanceRecord.load(path)
        record.require(fingerprint, str(path))
        return record
    except RecordRefused as error:
        logger.warning("measuring again: %s", error)
        return None


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
    fingerprint = fingerprint_of(engine)
    path = record_path(fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = cached_record(fingerprint)
        if known is not None:
            return known
        logger.info("no performance record of %s yet: measuring for about %.0f s", engine.model_name, budget_s)
        record = profile(engine, budget_s=budget_s, max_length=max_length, on_progress=on_progress)
        record.save(path)
    logger.info("performance record: %s", path)
    return record
