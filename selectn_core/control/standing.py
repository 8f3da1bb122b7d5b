"""For how long a decision stands: a step that differs from the last in nothing it was made for needs no new one.

A room of its own because it is all that Steering and Controller need not do: to decide costs half a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import Chunk, StepRecord
from selectn_core.offload.control import Decision
from selectn_core.requests.handle import RequestHandle

# By more than this share nothing that was learned may differ.
_TOLERANCE = 0.02


class Standing:
    """The last decision and what it was made for; it stands for at most `most_steps` further steps."""

    def __init__(self, most_steps: int) -> None:
        self._most_steps = most_steps
        self._decision: Decision | None = None
        self._left = 0
        self._requests: list[list[str]] = []
        self._learned: Sequence[float] = ()

    def forget(self) -> None:
        """The next step is looked at, whatever it is."""
        self._decision = None

    def decided(
        self,
        decision: Decision,
        handles: Mapping[str, RequestHandle],
        progress: Mapping[str, Chunk],
        learned: Sequence[float],
    ) -> None:
        """`decision` was made for these requests, at these factors and bandwidths."""
        self._left, self._requests, self._learned = self._most_steps, _requests(handles, progress), learned
        self._decision = decision

    def ran(self, record: StepRecord) -> None:
        """A step that takes longer than it may is a reason to decide anew."""
        decision = self._decision
        if decision is not None and record.duration_s > decision.limit_s:
            self.forget()

    def next(
        self,
        plan: OffloadPlan,
        handles: Mapping[str, RequestHandle],
        progress: Mapping[str, Chunk],
        learned: Sequence[float],
    ) -> Decision | None:
        """The decision, if it goes for the next step too; `plan` is what holds.

        The same requests are there, each decoding or in prefill as it was, no weights are under way, and nothing that
        was learned has changed by more than a fiftieth.
        """
        decision = self._decision
        if decision is None or not self._left or decision.plan != plan or decision.urgent:
            return None
        if self._requests != _requests(handles, progress):
            return None
        if any(abs(now - then) > _TOLERANCE * then for now, then in zip(learned, self._learned, strict=True)):
            return None
        self._left -= 1
        return decision


def _requests(handles: Mapping[str, RequestHandle], progress: Mapping[str, Chunk]) -> list[list[str]]:
    return [list(handles), list(progress), [ticket for ticket, left in progress.items() if left.num_tokens]]
