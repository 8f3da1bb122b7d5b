"""Requests that were offered here and that no engine has taken: they count for attainment too.

What an engine has taken it counts itself, to the end. The sum of both is everything that was offered, each once.
"""

from __future__ import annotations

import math
from typing import Any

from deployments.api.errors import ApiError
from deployments.routing.ask import Ask
from selectn_core.requests.attainment import Attainment
from selectn_core.requests.handle import RequestTiming
from selectn_core.requests.objectives import Objectives

_SNAPSHOT = ("num_requests", "outcomes", "attained")


class Offered:
    """An ingress's count of requests that were refused, or given up, before an engine had them."""

    def __init__(self) -> None:
        self._attainment = Attainment(100.0)

    def refused(self, error: ApiError) -> None:
        """One was answered with `error`: it counts where it was for want of room or time, or of who serves."""
        if error.status in (429, 503):
            nothing_s = RequestTiming(ttft_s=None, tpot_s=None)
            self._attainment.add(nothing_s, Objectives(ttft_s=0.0, tpot_s=math.inf), "refused")

    def given_up(self, ask: Ask, waited_s: float) -> None:
        """Whoever asked has left while it waited."""
        objectives = None if ask.ttft_s is None else Objectives(ttft_s=ask.ttft_s, tpot_s=math.inf)
        self._attainment.add(RequestTiming(ttft_s=None, tpot_s=None, waited_s=waited_s), objectives, "cancelled")

    def snapshot(self) -> dict[str, Any]:
        """As `attainment` in a replica's snapshot; latencies there are none."""
        return {name: value for name, value in self._attainment.snapshot().items() if name in _SNAPSHOT}
