"""A request in flight, as its submitter sees it: tokens as they come, timing, and a way to cancel."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from selectn_core.objectives import Objectives
from selectn_core.sampling import SamplingParams


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
    """Seconds; None before there is enough to tell."""

    ttft_s: float | None
    tpot_s: float | None


class RequestHandle:
    """Iterate over it, with `for` or `async for` but only once, to receive TokenEvents until the last."""

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
        self.params = SamplingParams()
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._finished = False
        self.objectives: Objectives | None = None
        self.arrived_s = time.perf_counter() - waited_s
        self.first_token_s = self._last_token_s = 0.0

    def cancel(self) -> None:
        """Ends the request; its last event says "cancelled". Does nothing once it is over."""
        self._cancel(self.ticket)

    @property
    def timing(self) -> RequestTiming:
        """TTFT from arrival, what was waited before submission included, and TPOT over the tokens after the first."""
        if not self.num_tokens:
            return RequestTiming(ttft_s=None, tpot_s=None)
        later = self.num_tokens - 1
        return RequestTiming(
            ttft_s=self.first_token_s - self.arrived_s,
            tpot_s=(self._last_token_s - self.first_token_s) / later if later else None,
        )

    def result(self) -> list[int]:
        """Waits for the end and returns all tokens. Raises RuntimeError if the request failed."""
        tokens: list[int] = []
        for event in self:
            tokens.extend(event.token_ids)
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
        return tokens

    def push(self, event: TokenEvent) -> None:
        """Adds an event; called by the engine, from any thread. Nothing is added after the last."""
        with self._changed:
            if self._finished:
                return
            self._finished = event.finish_reason is not None
            if event.token_ids:
                self._last_token_s = time.perf_counter()
                self.first_token_s = self.first_token_s or self._last_token_s
                self.num_tokens += len(event.token_ids)
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

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: _wake(loop, arrived)
        try:
            while True:
                arrived.clear()
                with self._changed:
                    events = list(self._events)
                    self._events.clear()
                for event in events:
                    yield event
                    if event.finish_reason is not None:
                        return
                if not events:
                    await arrived.wait()
        finally:
            with self._changed:  # not while push() is about to call it
                self._wake = None


def _wake(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the reader's loop may end at any moment, before its request does
        loop.call_soon_threadsafe(arrived.set)
