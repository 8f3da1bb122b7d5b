"""What a step was, and how long it took: the record that reports, benchmarks and the controller read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from statistics import mean, median
from typing import NamedTuple

from selectn_core.latency.placement import OffloadPlan

_RECENT = 512
_MOST_CHANGES = 512


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one type of attention reads in a step: no more keys of a request than its sliding window has.

    `kv_tokens` are the keys of all requests, their new tokens included, of which `decode_kv_tokens` are of the decoding
    ones. `prefill_pairs` counts query-key pairs of the others: for each its tokens times its keys.
    """

    kv_tokens: int
    decode_kv_tokens: int
    prefill_pairs: int


class Chunk(NamedTuple):
    """Tokens of a prompt that are computed, or left to compute, and the keys that came before them."""

    num_tokens: int
    num_past: int


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step computes: its time depends on nothing else.

    `prefills` are chunks of prefill, each (tokens, keys before them); `decodes` has for each request that decodes, one
    token each, its keys, the new one included. Both ascending: make one with `of`. `num_sampled` of the requests draw
    their token, `num_truncated` of those among the most likely ones only.
    """

    prefills: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()
    num_sampled: int = 0
    num_truncated: int = 0

    @classmethod
    def of(cls, prefills: Sequence[tuple[int, int]] = (), decodes: Sequence[int] = ()) -> StepShape:
        """Of chunks of prefill, each (tokens, keys before them), and of decoding requests, each with its keys."""
        return cls(prefills=tuple(sorted(prefills)), decodes=tuple(sorted(decodes)))

    @classmethod
    def decode(cls, batch: int, length: int) -> StepShape:
        """`batch` requests that decode, each with `length` keys, the new one included."""
        return cls(decodes=(length,) * batch)

    @classmethod
    def prefill(cls, tokens: int, cached: int = 0) -> StepShape:
        """One chunk of `tokens` after `cached` keys."""
        return cls(prefills=((tokens, cached),))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Asked for many times in every step."""
        return hash((self.prefills, self.decodes, self.num_sampled, self.num_truncated))

    @cached_property
    def num_tokens(self) -> int:
        """Query tokens of all requests."""
        return sum(tokens for tokens, _ in self.prefills) + len(self.decodes)

    @property
    def num_requests(self) -> int:
        return len(self.prefills) + len(self.decodes)

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)

    @property
    def kv_tokens(self) -> int:
        return self._all.kv_tokens

    @property
    def decode_kv_tokens(self) -> int:
        return self._all.decode_kv_tokens

    @property
    def prefill_pairs(self) -> int:
        return self._all.prefill_pairs

    @cached_property
    def _all(self) -> Attended:
        return self._attended(None)

    def attended(self, window: int | None) -> Attended:
        """What attention with this sliding window reads (None: with none): the keys that the cache keeps for it.

        For a chunk that is itself and the `window - 1` keys before it.
        """
        return self._all if window is None else self._attended(window)

    def _attended(self, window: int | None) -> Attended:
        decodes = self.decodes if window is None else [min(keys, window) for keys in self.decodes]
        prefills = [(n, past if window is None else min(past, window - 1)) for n, past in self.prefills]
        decode_kv_tokens = sum(decodes)
        return Attended(
            kv_tokens=sum(n + past for n, past in prefills) + decode_kv_tokens,
            decode_kv_tokens=decode_kv_tokens,
            prefill_pairs=sum(n * (n + past) for n, past in prefills),
        )

    def sampling(self, num_sampled: int | None = None, num_truncated: int = 0) -> StepShape:
        """The same with so many requests that draw their token; None: all that decode, as clients do by default."""
        num_sampled = self.num_decodes if num_sampled is None else num_sampled
        return StepShape(
            prefills=self.prefills, decodes=self.decodes, num_sampled=num_sampled, num_truncated=num_truncated
        )

    @property
    def is_decode_only(self) -> bool:
        return not self.prefills

    def covers(self, other: StepShape, windows: Sequence[int | None] = (None,)) -> bool:
        """Whether this step is at least as large in every respect, to attention with these windows."""
        return all(mine >= theirs for mine, theirs in zip(self.sizes(windows), other.sizes(windows), strict=True))

    def sizes(self, windows: Sequence[int | None]) -> tuple[int, ...]:
        """Every respect in which what the model computes may be large; sampling takes its time apart."""
        attended = [each for window in windows for each in astuple(self.attended(window))]
        return (self.num_tokens, self.num_requests, self.num_decodes, *attended)


def step_of(chunks: Sequence[Chunk], decodes: Sequence[int] = ()) -> StepShape:
    """The step that computes these; one token after others is a step of decoding.

    So a request comes back whose KV was in host memory. `decodes`: keys of others that decode.
    """
    single = [num_past + 1 for num_tokens, num_past in chunks if num_tokens == 1 and num_past > 0]
    prefills = [each for each in chunks if not (each.num_tokens == 1 and each.num_past > 0)]
    return StepShape.of(prefills, [*single, *decodes])


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step that ran.

    `duration_s` is from scheduling to the last token handed out; `stall_s` of it compute waited for copies. Where a
    controller planned it, `predicted_s` is what it should have taken and `limit_s` what it was allowed. `ended_s` is an
    instant of `time.perf_counter`.
    """

    iteration: int
    shape: StepShape
    num_offloaded: int
    num_slots: int
    duration_s: float
    stall_s: float
    offloaded_bytes: int
    ended_s: float
    predicted_s: float | None = None
    limit_s: float | None = None

    def over_bound(self, link_bytes_per_s: float) -> float:
        """Duration over T_bound, whose compute term is this step's own time without its stalls."""
        link_s = self.offloaded_bytes / link_bytes_per_s if self.num_offloaded > self.num_slots else 0.0
        return self.duration_s / max(self.duration_s - self.stall_s, link_s)


class StepLog:
    """The last `capacity` steps, and where the interval changed among all of them (the last `capacity` changes)."""

    def __init__(self, capacity: int = 4096) -> None:
        self.records: deque[StepRecord] = deque(maxlen=capacity)
        self.interval_history: deque[tuple[int, int]] = deque(maxlen=capacity)  # (iteration, num_offloaded)
        self.k_history: deque[tuple[float, int]] = deque(maxlen=_MOST_CHANGES)  # (Unix seconds, num_offloaded)
        self.num_steps = 0

    def add(
        self,
        shape: StepShape,
        plan: OffloadPlan,
        *,
        duration_s: float,
        stall_s: float,
        offloaded_bytes: int,
        predicted_s: float | None = None,
        limit_s: float | None = None,
    ) -> StepRecord:
        num_offloaded = plan.num_offloaded
        if not self.interval_history or self.interval_history[-1][1] != num_offloaded:
            self.interval_history.append((self.num_steps, num_offloaded))
            self.k_history.append((time.time(), num_offloaded))
        record = StepRecord(
            iteration=self.num_steps,
            shape=shape,
            num_offloaded=num_offloaded,
            num_slots=plan.num_slots,
            duration_s=duration_s,
            stall_s=stall_s,
            offloaded_bytes=offloaded_bytes,
            ended_s=time.perf_counter(),
            predicted_s=predicted_s,
            limit_s=limit_s,
        )
        self.records.append(record)
        self.num_steps += 1
        return record

    def median_over_bound(self, link_bytes_per_s: float) -> float | None:
        """Median of measured step over T_bound; None before the first step."""
        records = list(self.records)
        return median(record.over_bound(link_bytes_per_s) for record in records) if records else None

    def prediction_error(self) -> float | None:
        """Mean absolute error of the predicted step times, relative to the measured ones; None without any."""
        errors = [abs(r.predicted_s / r.duration_s - 1) for r in list(self.records) if r.predicted_s is not None]
        return mean(errors) if errors else None

    def prefill_s_per_token(self) -> float | None:
        """Seconds that a token of prefill costs at best, in the recent steps that had some; None before the first."""
        recent = [r for r in list(self.records)[-_RECENT:] if not r.shape.is_decode_only]
        return min((r.duration_s / r.shape.num_tokens for r in recent), default=None)
