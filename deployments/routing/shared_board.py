"""A process's one view of an application's replicas: its router keeps it, its admission reads it.

Serve's router lives in the ingress's process, in an event loop and thread of its own, and is unpickled by value: its
module's globals are copies. This module is not: both sides import the same one.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from deployments.routing.board import Board

STALE_AFTER_S = 5.0


class SharedBoard:
    """A Board behind a lock, and those who want to know when it has changed."""

    def __init__(
        self,
        origin: str | None = None,
        *,
        stale_after_s: float = STALE_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.origin = origin or uuid.uuid4().hex[:16]
        self._board = Board(self.origin, stale_after_s=stale_after_s, clock=clock)
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[Board]:
        """The board, for a moment: nothing that waits belongs into this block."""
        with self._lock:
            yield self._board

    def listen(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, on any thread, when reports have come or a replica has gone."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """Tells the listeners."""
        for listener in list(self._listeners):
            listener()


_boards: dict[str, SharedBoard] = {}
_boards_lock = threading.Lock()


def board_of(app_name: str) -> SharedBoard:
    """The board of an application in this process."""
    with _boards_lock:
        return _boards.setdefault(app_name, SharedBoard())
