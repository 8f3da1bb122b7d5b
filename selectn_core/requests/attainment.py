"""Whether requests met their objectives: the one definition, and the last requests, counted as they end.

Everything that was offered counts, however it ended. Offered is a request that was well formed and that this server
could have served: not one that is answered with a 400, 401, 404 or 413.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

from selectn_core.requests.handle import RequestTiming
from selectn_core.requests.objectives import Objectives

_WINDOW = 1024

# "completed": an end token, the length, or a stop string. "cancelled": whoever asked has left. "failed": an error, a
# server that closes included. "refused": for want of room or time, or because nobody serves.
Outcome = Literal["completed", "cancelled", "failed", "refused"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def is_met(timing: RequestTiming, objectives: Objectives, outcome: Outcome) -> bool:
    """Whether a request met both of its objectives.

    One that failed or was refused did not. One that was cancelled is late if it was by then: its first token, or its
    wait for one; its time per token, or what that would be had the next token come just then.
    """
    return all(each_met(timing, objectives, outcome))


def each_met(timing: RequestTiming, objectives: Objectives, outcome: Outcome) -> tuple[bool, bool]:
    """Whether a request met its TTFT objective, and its TPOT objective (`is_met`)."""
    if outcome in ("failed", "refused"):
        return False, False
    return _ttft_s(timing, outcome) <= objectives.ttft_s, _tpot_s(timing, outcome) <= objectives.tpot_s


def at_percentile(values: Sequence[float], percentile: float) -> float | None:
    """The smallest value that so many percent of `values` do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percentile / 100) - 1)] if ordered else None


class Attainment:
    """How requests ended since the start, and of the last 1,024 their latencies and which met their objectives."""

    def __init__(self, percentile: float) -> None:
        """`percentile` is that of the objectives, in percent."""
        self.percentile = percentile
        self._lock = threading.Lock()
        self._outcomes: Counter[Outcome] = Counter()
        self._ttft_s: deque[float] = deque(maxlen=_WINDOW)
        self._tpot_s: deque[float] = deque(maxlen=_WINDOW)
        self._itl_s: deque[float] = deque(maxlen=_WINDOW)
        self._met: deque[bool] = deque(maxlen=_WINDOW)

    @property
    def num_requests(self) -> int:
        """All that were offered and have ended."""
        with self._lock:
            return self._outcomes.total()

    def add(self, timing: RequestTiming, objectives: Objectives | None, outcome: Outcome) -> None:
        """Takes in a request that has ended, from any thread. Without `objectives` it can neither meet nor miss any."""
        met = objectives is not None and is_met(timing, objectives, outcome)
        with self._lock:
            self._outcomes[outcome] += 1
            if timing.ttft_s is not None or not (met or objectives is None):
                self._ttft_s.append(math.inf if timing.ttft_s is None else timing.ttft_s)
            if timing.tpot_s is not None:
                self._tpot_s.append(_tpot_s(timing, outcome))
            if timing.itl_p99_s is not None:
                self._itl_s.append(timing.itl_p99_s)
            if objectives is not None:
                self._met.append(met)

    def snapshot(self) -> dict[str, Any]:
        """Requests by outcome, the share that met both objectives, and latencies at the percentile.

        `itl_p99_s` is that of requests' own 99th percentiles of the time between two tokens. A latency is None before
        the first request that has it, and `ttft_s` too where so many had no first token at all.
        """
        with self._lock:
            met, ttft_s, tpot_s, itl_s = (list(each) for each in (self._met, self._ttft_s, self._tpot_s, self._itl_s))
            outcomes = {outcome: self._outcomes[outcome] for outcome in OUTCOMES}
        first_s = at_percentile(ttft_s, self.percentile)
        return {
            "percentile": self.percentile,
            "num_requests": sum(outcomes.values()),
            "outcomes": outcomes,
            "attained": sum(met) / len(met) if met else None,
            "ttft_s": None if first_s == math.inf else first_s,
            "tpot_s": at_percentile(tpot_s, self.percentile),
            "itl_p99_s": at_percentile(itl_s, self.percentile),
        }


def _ttft_s(timing: RequestTiming, outcome: Outcome) -> float:
    if timing.ttft_s is not None:
        return timing.ttft_s
    return timing.waited_s if outcome == "cancelled" else math.inf


def _tpot_s(timing: RequestTiming, outcome: Outcome) -> float:
    seen_s = timing.tpot_s or 0.0
    return max(seen_s, timing.next_tpot_s or 0.0) if outcome == "cancelled" else seen_s
