"""The requests in flight as the controller sees them, and how long steps may take so that each keeps its objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selectn_core.steps import StepShape

# Of a TPOT objective, what steps are planned to take: the rest is for what nobody can predict.
PLANNED_SHARE = 0.92
# A request whose average exceeds this share is behind, and catches up over so many tokens.
_BEHIND_SHARE = 0.97
_HORIZON_TOKENS = 8
# Of the time to a waiting request's deadline, what its prefill is planned to take.
_TTFT_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A request that has its first token: how many it has, when the first came, how many may follow, its TPOT."""

    num_tokens: int
    first_token_s: float
    num_left: int
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A request whose next token needs prefill: the tokens of it that are left, and by when TTFT wants its first one.

    One that was preempted has had its first: nothing is due, but its TPOT counts.
    """

    prefill_tokens: int
    deadline_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """All requests, waiting ones in the order in which they will be served; instants on one clock, in seconds.

    The first `num_begun` of the waiting ones hold KV cache, and the first `num_fitting` may (None: all): of the others
    none begins, however many tokens a step has room for. `is_full`: there is no room for one more, whether or not it
    waits here. Of the requests, `sampled_share` draw their tokens and `truncated_share` do so among the likeliest only.
    """

    now_s: float
    decoding: Sequence[Decoding]
    waiting: Sequence[Waiting]
    mean_kv_tokens: int  # keys of a decoding request, on average
    num_begun: int = 0
    num_fitting: int | None = None
    is_full: bool = False
    sampled_share: float = 0.0
    truncated_share: float = 0.0

    def sampling_in(self, shape: StepShape) -> StepShape:
        """This step with the same shares of those that decode in it sampling."""
        num_sampled, num_truncated = (
            math.ceil(share * shape.num_decodes) for share in (self.sampled_share, self.truncated_share)
        )
        return shape.sampling(num_sampled, num_truncated)

    @property
    def fitting(self) -> Sequence[Waiting]:
        """Those of the waiting that hold KV cache or may."""
        return self.waiting[: self.num_fitting]

    @property
    def tightest_tpot_s(self) -> float:
        """The smallest TPOT objective; infinite without requests."""
        objectives_s = [each.tpot_s for each in self.decoding] + [each.tpot_s for each in self.waiting]
        return min(objectives_s, default=math.inf)


def tpot_limit_s(request: Decoding, now_s: float, unloaded_s: float) -> float:
    """Seconds that steps may take so that this request keeps its TPOT: less for a while where it is behind.

    A request that cannot catch up at all, even with nothing offloaded, makes nobody hurry.
    """
    for horizon in (min(_HORIZON_TOKENS, request.num_left), request.num_left):
        tokens = max(1, horizon)
        due_s = request.first_token_s + (request.num_tokens - 1 + tokens) * _BEHIND_SHARE * request.tpot_s
        limit_s = (due_s - now_s) / tokens
        if limit_s >= unloaded_s:
            return min(PLANNED_SHARE * request.tpot_s, limit_s)
    return PLANNED_SHARE * request.tpot_s


def prefill_pace_s(load: Load) -> float:
    """Seconds per token of prefill with which every waiting request has its first token in time.

    Those that are late already have their turn, but nobody hurries for them.
    """
    pace_s, tokens = math.inf, 0
    for request in load.waiting:
        tokens += max(1, request.prefill_tokens)
        left_s = request.deadline_s - load.now_s
        if left_s > 0:
            pace_s = min(pace_s, _TTFT_SHARE * left_s / tokens)
    return pace_s
