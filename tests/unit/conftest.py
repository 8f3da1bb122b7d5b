"""Fixtures of several rooms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def record_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Records that are measured are found again by the same file's tests, and by nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTN_CACHE_DIR", str(tmp_path_factory.mktemp("records")))
        yield
