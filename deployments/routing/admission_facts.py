"""What is kept of an admission that was refused: numbers, and why. Nothing of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

# "late": it would miss its deadline, as was clear when it came; "deadline": it has waited until then; "queue_full": no
# place to wait; "displaced": another took its place in the full queue; "too_large": no replica can ever hold it;
# "no_replica": none serves its model.
AdmissionReason = Literal["late", "deadline", "queue_full", "displaced", "too_large", "no_replica"]
ADMISSION_REASONS: tuple[AdmissionReason, ...] = get_args(AdmissionReason)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalFacts:
    """A request's size and standing, and those who waited. None: not looked at for this decision.

    `before_tokens` were to be served before it and `spread_tokens` is the margin; `free_tokens` replicas could promise
    then (below 0: they have promised more), and `rate_tokens_per_s` come free. `left_s` was left until its deadline.
    """

    request_id: str
    reason: AdmissionReason
    tokens: int
    prompt_tokens: int
    waited_s: float
    ttft_s: float | None
    num_waiting: int
    queued_tokens: int
    free_tokens: int | None = None
    rate_tokens_per_s: float | None = None
    before_tokens: float | None = None
    spread_tokens: float | None = None
    left_s: float | None = None
    longest_tokens: int | None = None
    retry_after_s: float | None = None

    @property
    def verdict(self) -> str:
        return "refused"

    @property
    def inputs(self) -> Mapping[str, float | None]:
        names = [name for name in self.__slots__ if name not in ("request_id", "reason")]
        return {name: getattr(self, name) for name in names}
