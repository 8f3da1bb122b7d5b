"""A real tmpfs that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_tmpfs_at(directory: Path, num_bytes: int) -> Iterator[Path]:
    """One of this size at `directory`; skips the test where it may not be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)
