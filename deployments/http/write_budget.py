"""How often the streams of an ingress are written to: every write costs it and Serve's proxy the same, however long.

Nothing says when the proxy has taken a write. So the writes of a second are shared out among the streams: who has just
written waits for its next turn, and what comes meanwhile goes out together. Few streams have a turn before each token.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class WriteBudget:
    """So many writes a second, in equal parts, for the streams that are under way; None: no bound."""

    def __init__(self, writes_per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._writes_per_s, self._clock = writes_per_s, clock
        self._num_streams = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A stream is under way while this block lasts."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    def next_s(self) -> float:
        """When a stream that writes now may write again, by the clock."""
        now_s = self._clock()
        return now_s if self._writes_per_s is None else now_s + self._num_streams / self._writes_per_s
