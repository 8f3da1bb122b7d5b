"""The life of an engine: its generation thread is started, restarted after errors, and ended."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from selectn_core.batching import ContinuousBatching
from selectn_core.errors import EngineUnavailable
from selectn_core.requests.table import RequestTable

logger = logging.getLogger(__name__)

_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 60.0


class Supervisor:
    """`state` is loaded, then running, then closed; or failed, where errors came too often."""

    def __init__(self, batching: ContinuousBatching, requests: RequestTable, fail_all: Callable[[str], None]) -> None:
        """`fail_all` ends all requests in flight, with a reason."""
        self._batching, self._requests, self._fail_all = batching, requests, fail_all
        self.state = "loaded"
        self._lock = threading.Lock()  # of the state
        self._restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts generating. Raises EngineUnavailable on an engine that was started or closed."""
        with self._lock:
            if self.state != "loaded":
                raise EngineUnavailable(f"the engine is {self.state}; only a loaded one can be started")
            self.state = "running"
        thread = self._batching.start()
        self._thread = threading.Thread(target=self._supervise, args=(thread,), name="selectn-supervisor")
        self._thread.start()

    def close(self) -> bool:
        """Ends generation; False where it was ended before."""
        with self._lock:
            if self.state == "closed":
                return False
            self.state = "closed"
        self._requests.close("the engine is closed")
        self._batching.close()
        if self._thread is not None:
            self._thread.join()
        return True

    def _supervise(self, thread: threading.Thread) -> None:
        """Restarts the generation thread when an error has ended it, a few times a minute at most."""
        while True:
            thread.join()
            with self._lock:
                if self.state != "running":
                    return
                if not self._may_restart():
                    self.state = "failed"
                    self._requests.close("the engine is failed")
            self._fail_all(f"generation failed: {self._batching.fatal_error}")
            if self.state == "failed":
                logger.error(
                    "generation failed again after %d restarts in %.0f s; giving up", _MAX_RESTARTS, _RESTART_WINDOW_S
                )
                return
            logger.warning("restarting generation after: %s", self._batching.fatal_error)
            with self._lock:  # close() must not pass by a thread that is just being started
                if self.state != "running":
                    return
                thread = self._batching.start()

    def _may_restart(self) -> bool:
        now_s = time.monotonic()
        if len(self._restarts) == _MAX_RESTARTS and now_s - self._restarts[0] < _RESTART_WINDOW_S:
            return False
        self._restarts.append(now_s)
        return True
