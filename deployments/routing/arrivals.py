"""How many tokens lately came of each key and priority, admitted or not: who may yet come before one that waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from deployments.routing.fair_queue import Flow

# Averages over about this time: seconds after a crowd has gone nobody is refused for it any more.
MEMORY_S = 3.0
# Flows of which less than this is left are forgotten.
LEAST_TOKENS = 1.0
MAX_FLOWS = 4096


@dataclass(kw_only=True)
class _Seen:
    tokens: float
    seen_s: float


class Arrivals:
    """Exponentially weighted sums, one for each key and priority that has lately come."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flows: dict[Flow, _Seen] = {}

    def __len__(self) -> int:
        return len(self._flows)

    def add(self, flow: Flow, tokens: int) -> None:
        """A request has come."""
        if flow not in self._flows and len(self._flows) >= MAX_FLOWS:
            self._forget()
        if flow in self._flows or len(self._flows) < MAX_FLOWS:
            self._flows[flow] = _Seen(tokens=self._left(flow) + tokens, seen_s=self._clock())

    def expected(self, within_s: float) -> dict[Flow, float]:
        """Tokens that each flow will bring within this time if it goes on like this."""
        self._forget()
        return {flow: self._left(flow) / MEMORY_S * within_s for flow in self._flows}

    def _left(self, flow: Flow) -> float:
        seen = self._flows.get(flow)
        return 0.0 if seen is None else seen.tokens * math.exp((seen.seen_s - self._clock()) / MEMORY_S)

    def _forget(self) -> None:
        self._flows = {flow: seen for flow, seen in self._flows.items() if self._left(flow) >= LEAST_TOKENS}
