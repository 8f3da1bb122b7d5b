"""Calls to a Ray that may end before they do: it waits a minute for a cluster that is gone, then ends this process.

A signal to a whole process group, as of `timeout` or systemd, reaches Ray's own processes as it reaches this one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_PERIOD_S = 0.05
# Between the first call that fails because Ray is ending and the end of its processes.
ENDING_S = 3.0


class RayIsGone(Exception):
    """Nothing answers any more, or not in time."""


def never() -> bool:
    """Of a cluster of which nothing is known but what it answers."""
    return False


def answer(call: Callable[[], T], *, is_gone: Callable[[], bool] = never, at_most_s: float = math.inf) -> T:
    """What `call` returns or raises. On a thread of its own, so that signals interrupt the wait for it.

    Raises RayIsGone where the cluster is gone before it answers, or it does not answer in time: the call is left alone.
    """
    if is_gone():
        raise RayIsGone
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="call to Ray", daemon=True)
    ends_s = time.monotonic() + at_most_s
    thread.start()
    while thread.is_alive():
        thread.join(POLL_PERIOD_S)
        if thread.is_alive() and (is_gone() or time.monotonic() >= ends_s):
            raise RayIsGone
    if errors:
        if _is_ending(is_gone):
            raise RayIsGone from errors[0]
        raise errors[0]
    return results[0]


def _is_ending(is_gone: Callable[[], bool]) -> bool:
    """Whether the cluster is gone in a moment: its parts end one after the other, and the others fail meanwhile."""
    ends_s = time.monotonic() + (ENDING_S if is_gone is not never else 0.0)
    while not is_gone():
        if time.monotonic() >= ends_s:
            return False
        time.sleep(POLL_PERIOD_S)
    return True
