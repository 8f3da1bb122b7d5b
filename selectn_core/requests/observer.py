"""Who hears of every request's tokens and of its end, beside its submitter: for metrics.

A room of its own because an engine must not know what becomes of it.
"""

from __future__ import annotations

from typing import Protocol

from selectn_core.requests.attainment import Outcome
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives


class Observer(Protocol):
    """Called on the thread that has the news, the engine's most of the time: it must neither block nor raise."""

    def tokens(self, handle: RequestHandle, num_tokens: int, gap_s: float | None) -> None:
        """A request has so many tokens more, that long after those before; None: its first."""

    def ended(self, handle: RequestHandle, outcome: Outcome, finish_reason: str, objectives: Objectives | None) -> None:
        """A request that the engine had has ended; all its times are known. `objectives` are those that it had."""
