"""Whether requests met their objectives: the last ones, counted as they end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from selectn_core.objectives import Objectives
from selectn_core.requests import RequestTiming

_WINDOW = 1024


class Attainment:
    """The latencies of the last 1,024 requests that ended with a token, and which of them met their objectives."""

    def __init__(self, percentile: float) -> None:
        """`percentile` is that of the objectives, in percent."""
        self.percentile = percentile
        self.num_requests = 0
        self._ttft_s: deque[float] = deque(maxlen=_WINDOW)
        self._tpot_s: deque[float] = deque(maxlen=_WINDOW)
        self._met: deque[bool] = deque(maxlen=_WINDOW)

    def add(self, timing: RequestTiming, objectives: Objectives) -> None:
        """Takes in a request that has ended; one that never had a token says nothing of latency."""
        if timing.ttft_s is None:
            return
        self.num_requests += 1
        self._ttft_s.append(timing.ttft_s)
        if timing.tpot_s is not None:
            self._tpot_s.append(timing.tpot_s)
        self._met.append(timing.ttft_s <= objectives.ttft_s and (timing.tpot_s or 0.0) <= objectives.tpot_s)

    def snapshot(self) -> dict[str, Any]:
        """Share that met both objectives, and TTFT and TPOT at the percentile; None before the first request."""
        met = list(self._met)
        return {
            "percentile": self.percentile,
            "num_requests": self.num_requests,
            "attained": sum(met) / len(met) if met else None,
            "ttft_s": _at(list(self._ttft_s), self.percentile),
            "tpot_s": _at(list(self._tpot_s), self.percentile),
        }


def _at(values: Sequence[float], percentile: float) -> float | None:
    """The smallest value that so many percent of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percentile / 100) - 1)] if ordered else None
