"""A request in flight, as its submitter sees it: tokens as they come, timing, and a way to cancel."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selectn_core.requests.objectives import Objectives

if TYPE_CHECKING:  # which imports torch, and an ingress has no use for it
    from selectn_core.requests.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Newly generated tokens. The last event of a request has a `finish_reason`.

    `finish_reason` is "stop" (the last token is one that ends generation), "length", "cancelled" or "error".
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds; None before there is enough to tell.

    `itl_p99_s` is the 99th percentile of the times between two tokens, `waited_s` from arrival to the end, or to now.
    `next_tpot_s` is what TPOT would be had the next token come at that instant.
    """

    ttft_s: float | None
    tpot_s: float | None
    itl_p99_s: float | None = None
    waited_s: float = 0.0
    next_tpot_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestSpans:
    """Seconds from arrival to the beginning, to the first token, to the last; and from arrival to the end."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


class Gaps:
    """The times between a request's tokens, as their reader sees them: the 99th percentile, in bounded memory.

    The largest are kept, so it is exact up to 12,799 of them; of more it is the smallest kept, which is larger.
    """

    _NUM_KEPT = 128

    def __init__(self) -> None:
        self._largest: list[float] = []  # a heap
        self._number = 0

    def add(self, seconds: float, num_tokens: int) -> None:
        """So many tokens that came at once, so long after those before."""
        self._number += num_tokens
        self._keep(seconds)
        for _ in range(min(num_tokens - 1, self._NUM_KEPT)):
            self._keep(0.0)

    def _keep(self, seconds: float) -> None:
        if len(self._largest) < self._NUM_KEPT:
            heapq.heappush(self._largest, seconds)
        else:
            heapq.heappushpop(self._largest, seconds)

    @property
    def p99_s(self) -> float | None:
        """The smallest time that 99 % do not exceed; None before the second token."""
        ordered = sorted(self._largest, reverse=True)
        return ordered[min(self._number // 100, len(ordered) - 1)] if ordered else None


class RequestHandle:
    """A request that an engine has taken, from then to its end: its tokens as they come, and their times.

    Iterate over it, with `for` or `async for` but only once, to receive TokenEvents until the last.
    """

    def __init__(
        self, request_id: str, num_prompt_tokens: int, cancel: Callable[[str], None], *, waited_s: float = 0.0
    ) -> None:
        """`waited_s`: for how long it has been waited for already; its TTFT counts from then."""
        self.request_id = request_id
        # What the batching knows the request by: a client may reuse its own name for it at once after cancelling.
        self.ticket = uuid.uuid4().hex
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self.max_total_tokens = num_prompt_tokens  # prompt and the most output it may have
        self.eos_ids: frozenset[int] = frozenset()
        self.params: SamplingParams | None = None
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._finished = False
        self.objectives: Objectives | None = None
        self.when_tokens: Callable[[RequestHandle, int, float | None], None] | None = None  # `Observer.tokens`
        self.began_s: float | None = None
        self.arrived_s = time.perf_counter() - waited_s
        self.first_token_s = self._last_token_s = 0.0
        self._ended_s: float | None = None
        self._gaps = Gaps()
        self.has_enough = False

    def cancel(self) -> None:
        """Ends the request; its last event says "cancelled". Does nothing once it is over."""
        self._cancel(self.ticket)

    def stop(self) -> None:
        """As `cancel`, by a reader who has all that was asked for, as at a stop string: it counts as completed."""
        self.has_enough = True
        self._cancel(self.ticket)

    def begins(self) -> None:
        """It may have KV memory from the next step on: what it waited for is over."""
        if self.began_s is None:
            self.began_s = time.perf_counter()

    @property
    def spans(self) -> RequestSpans:
        """Where its time went, up to its end or to now."""
        with self._changed:
            end_s = time.perf_counter() if self._ended_s is None else self._ended_s
            began_s = end_s if self.began_s is None else self.began_s
            first_s, last_s = self.first_token_s or end_s, self._last_token_s or end_s
            return RequestSpans(
                queue_s=began_s - self.arrived_s,
                prefill_s=max(0.0, first_s - began_s),
                decode_s=last_s - first_s,
                total_s=end_s - self.arrived_s,
            )

    @property
    def timing(self) -> RequestTiming:
        """TTFT from arrival, what was waited before submission included, and TPOT over the tokens after the first."""
        with self._changed:
            end_s = time.perf_counter() if self._ended_s is None else self._ended_s
            later, waited_s = self.num_tokens - 1, end_s - self.arrived_s
            if later < 0:
                return RequestTiming(ttft_s=None, tpot_s=None, waited_s=waited_s)
            return RequestTiming(
                ttft_s=self.first_token_s - self.arrived_s,
                tpot_s=(self._last_token_s - self.first_token_s) / later if later else None,
                itl_p99_s=self._gaps.p99_s,
                waited_s=waited_s,
                next_tpot_s=(end_s - self.first_token_s) / (later + 1),
            )

    def result(self) -> list[int]:
        """Waits for the end and returns all tokens. Raises RuntimeError if the request failed."""
        tokens: list[int] = []
        for event in self:
            tokens.extend(event.token_ids)
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
        return tokens

    def push(self, event: TokenEvent, before_seen: Callable[[], None] = lambda: None) -> None:
        """Adds an event; called by the engine, from any thread. Nothing is added after the last.

        `before_seen` is called when its times are known and no reader has it yet.
        """
        with self._changed:
            if self._finished:
                return
            self._finished = event.finish_reason is not None
            now_s = time.perf_counter()
            if event.token_ids:
                gap_s = now_s - self._last_token_s if self.num_tokens else None
                if gap_s is not None:
                    self._gaps.add(gap_s, len(event.token_ids))
                self._last_token_s = now_s
                self.first_token_s = self.first_token_s or now_s
                self.num_tokens += len(event.token_ids)
                if self.when_tokens is not None:
                    self.when_tokens(self, len(event.token_ids), gap_s)
            if self._finished:
                self._ended_s = now_s
            before_seen()
            self._events.append(event)
            self._changed.notify()
            if self._wake is not None:
                self._wake()

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event
            if event.finish_reason is not None:
                return

    def take(self) -> list[TokenEvent]:
        """The events that are there and that no reader has had yet. Does not wait; for readers that do not iterate."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def when_pushed(self, wake: Callable[[], None] | None) -> None:
        """Has `wake` called after each event, on the engine's thread, and now if one is there; None: no more."""
        with self._changed:
            self._wake = wake
            if wake is not None and self._events:
                wake()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self.when_pushed(lambda: _wake(loop, arrived))
        try:
            while True:
                arrived.clear()
                events = self.take()
                for event in events:
                    yield event
                    if event.finish_reason is not None:
                        return
                if not events:
                    await arrived.wait()
        finally:
            self.when_pushed(None)  # not while push() is about to call it


def _wake(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the reader's loop may end at any moment, before its request does
        loop.call_soon_threadsafe(arrived.set)
