"""Where performance records are kept, by fingerprint. Without torch: who plans reads them, and loads no model."""

from __future__ import annotations

from pathlib import Path

from selectn_core.planning.record import Fingerprint
from selectn_core.weights.embedded_model import cache_directory


def record_path(fingerprint: Fingerprint) -> Path:
    """The file of the record with this fingerprint."""
    return _directory() / f"{fingerprint.model_type}-{fingerprint.key()}.yaml"


def cached_records() -> list[Path]:
    """The files of all records in the cache."""
    return sorted(_directory().glob("*.yaml"))


def _directory() -> Path:
    return cache_directory() / "records"
