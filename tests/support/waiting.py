"""Waiting for what becomes so, and saying what did not."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], timeout_s: float, what: str) -> None:
    """Returns as soon as `is_so()`; fails with `what` after the timeout."""
    wait_within(is_so, time.monotonic() + timeout_s, f"{what}, within {timeout_s:g} s")


def wait_within(
    is_so: Callable[[], object],
    end_s: float,
    what: str,
    instead: Callable[[], object] = lambda: "nothing more is known",
) -> None:
    """Returns as soon as `is_so()`; fails with `what`, and what is so `instead`, at `end_s` of the monotonic clock."""
    while not is_so():
        assert time.monotonic() < end_s, f"not in time: {what}; instead: {instead()}"
        time.sleep(0.05)
