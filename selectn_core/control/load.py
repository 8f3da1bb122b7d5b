"""The requests in flight as the controller sees them, and how long steps may take so that each keeps its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from selectn_core.latency.steps import Chunk, StepShape, step_of

# Of a TPOT objective, what steps are planned to take: the rest is for what nobody can predict.
PLANNED_SHARE = 0.92
# A request whose average exceeds this share is behind, and catches up over so many tokens.
_BEHIND_SHARE = 0.97
_HORIZON_TOKENS = 8
# Of the time to a waiting request's deadline, what its prefill is planned to take.
TTFT_SHARE = 0.8
# Of its TTFT objective, for how long others may begin before a request that wants shorter steps than there are.
PASSED_SHARE = 0.5


class Decoding(NamedTuple):  # there are as many in every step as requests decode: a dataclass takes thrice as long
    """A request that has its first token: how many it has, when the first came, how many may follow, its TPOT."""

    num_tokens: int
    first_token_s: float
    num_left: int
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A request whose next token needs prefill: the tokens of it that are left, and by when TTFT wants its first one.

    `num_past` keys of it have been computed, `kv_bytes` are what its KV takes at its end. One that was preempted has
    had its first token: nothing is due. Others may begin before it until `passed_until_s`, if they must not wait for
    the step to become as short as it needs. It draws its tokens where `is_sampled`, among the likeliest only where
    `is_truncated`. `ticket` is its name.
    """

    prefill_tokens: int
    deadline_s: float
    tpot_s: float
    num_past: int = 0
    kv_bytes: int = 0
    passed_until_s: float = -math.inf
    is_sampled: bool = False
    is_truncated: bool = False
    ticket: str = ""

    @property
    def num_keys(self) -> int:
        """Keys that it has when it decodes."""
        return self.num_past + self.prefill_tokens


@dataclass(frozen=True, kw_only=True)
class Load:
    """All requests, waiting ones in the order in which they will be served; instants on one clock, in seconds.

    The first `num_begun` of the waiting ones hold KV cache, and for the first `num_fitting` memory will hold to their
    end (None: all): of the others none begins, however many tokens a step has room for. `is_full`: there is no room
    for one more, whether or not it waits here. Of those that hold KV cache, `sampled_share` draw their tokens and
    `truncated_share` do so among the likeliest only; where none holds any, of all.
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

    @cached_property
    def decoding_now(self) -> StepShape:
        """The step of those who decode now; of one request where none does."""
        return self.decode_step(max(1, len(self.decoding)), rounded_up(self.mean_kv_tokens))

    @cached_property
    def alone(self) -> StepShape:
        """The step of one request that has only begun to decode."""
        return self.decode_step(1, rounded_up(1))

    def sampling_in(self, shape: StepShape) -> StepShape:
        """This step with the same shares of those that decode in it sampling."""
        if not self.sampled_share and not shape.num_sampled:
            return shape
        num_sampled, num_truncated = (
            math.ceil(share * shape.num_decodes) for share in (self.sampled_share, self.truncated_share)
        )
        return shape.sampling(num_sampled, num_truncated)

    def joined_by(self, others: Sequence[Waiting], num_before: int | None = None) -> Load:
        """The same load with the shares that draw their tokens as they are once `others` hold KV cache too.

        `num_before`: how many these shares are of now; None: all that hold KV cache.
        """
        if not others:
            return self
        before = len(self.decoding) + self.num_begun if num_before is None else num_before
        num = before + len(others)
        return replace(
            self,
            sampled_share=(self.sampled_share * before + sum(each.is_sampled for each in others)) / num,
            truncated_share=(self.truncated_share * before + sum(each.is_truncated for each in others)) / num,
        )

    @property
    def begun(self) -> Sequence[Waiting]:
        """Those of the waiting that hold KV cache."""
        return self.waiting[: self.num_begun]

    @property
    def holding(self) -> list[Decoding | Waiting]:
        """All that hold KV cache: what they want counts, and what others want does not."""
        return [*self.decoding, *self.begun]

    @property
    def fitting(self) -> Sequence[Waiting]:
        """Those of the waiting that hold KV cache or may."""
        return self.waiting[: self.num_fitting]

    @property
    def candidates(self) -> Sequence[Waiting]:
        """Those of the waiting that may begin, as far as memory is concerned."""
        return self.waiting[self.num_begun : self.num_fitting]

    def decode_step(self, batch: int, kv_tokens: int) -> StepShape:
        """A step in which `batch` requests such as these decode, each with so many keys."""
        return self.sampling_in(StepShape.decode(batch, kv_tokens))

    def step_with(self, chunks: Sequence[Chunk], kv_tokens: int) -> StepShape:
        """A step with these chunks of prefill beside those that decode now, which have `kv_tokens` keys each."""
        return self.sampling_in(step_of(chunks, [kv_tokens] * len(self.decoding)))


def rounded_up(num_tokens: int) -> int:
    """To a sixteenth or so: the keys of a batch grow with every step, and nothing hangs on one."""
    unit = max(16, 1 << max(0, num_tokens.bit_length() - 4))
    return -(-num_tokens // unit) * unit


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


def in_turn(requests: Sequence[Waiting], num_tokens: int) -> list[Chunk]:
    """What a step with so many tokens of prefill computes of each, in their order, while there are tokens left."""
    chunks = []
    for request in requests:
        if num_tokens <= 0:
            break
        chunks.append(Chunk(min(num_tokens, request.prefill_tokens), request.num_past))
        num_tokens -= chunks[-1].num_tokens
    return chunks


def prefill_pace_s(
    requests: Sequence[Waiting], now_s: float, chunk_tokens: int, chunk_s: Callable[[int], float]
) -> float:
    """Seconds per token of the next chunk of prefill with which each of these has its first token in time.

    Chunks become slower as a prompt goes on: `chunk_s` says what one of `chunk_tokens` takes after so many keys, and
    the pace of the next one is to the average's as these are. Nothing hurries for those that are late already.
    """
    pace_s, tokens, past = math.inf, 0, 0.0
    for request in requests:
        more = max(1, request.prefill_tokens)
        tokens += more
        past += more * (request.num_past + max(0, more - chunk_tokens) / 2)
        left_s = request.deadline_s - now_s
        if 0 < left_s < math.inf:
            mean_s = chunk_s(int(past / tokens))
            pace_s = min(pace_s, TTFT_SHARE * left_s / tokens / mean_s)
    return pace_s * chunk_s(requests[0].num_past) if requests else pace_s
