"""Where the text of one request comes together: by its own call, and from some message on by a connection.

What has come and is not read yet is merged, so a slow reader holds no more than its own request's text.
"""

from __future__ import annotations

import asyncio
import time

from deployments.messages import Delta, Finished


class Inbox:
    """One request's text, for one reader, on one event loop. `connection` is what brings it, once that is known."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.connection: int | None = None
        self._text, self._end = "", None  # type: str, Finished | None
        self._early, self._early_end = "", None  # type: str, Finished | None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._hold_until_s, self._is_held = 0.0, False

    def put(self, text: str, end: Finished | None = None) -> None:
        """What the request's own call has brought."""
        self._text += text
        self._end = end or self._end
        if self.is_over or not self._is_held:
            self._wake()

    def deliver(self, text: str, end: Finished | None) -> None:
        """What a connection has brought: it comes behind what the call brought, of which all may not be here yet."""
        if self.connection is not None:
            self.put(text, end)
            return
        self._early += text
        self._early_end = end or self._early_end

    def moved(self, connection: int) -> None:
        """All that the call brought is here."""
        self.connection = connection
        self.put(self._early, self._early_end)
        self._early, self._early_end = "", None

    def fail(self, error: Exception) -> None:
        """Nothing more will come; what has come is read before the error. After an end this changes nothing."""
        if not self.is_over:
            self._error = error
            self._wake()

    @property
    def has_end(self) -> bool:
        """Whether all text is here, and the end behind it."""
        return self._end is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        return self._end is not None or self._error is not None

    def hold(self, until_s: float) -> None:
        """Has the reader wait until then, by `time.monotonic`, or until the end has come: it reads more at once."""
        self._hold_until_s = until_s

    async def take(self) -> Delta | Finished:
        """All text that is here, as soon as there is any; behind all of it the end, or what `fail` was given raised."""
        if self._hold_until_s > time.monotonic() and not self.is_over:
            await self._rest(self._hold_until_s - time.monotonic())
        while not self._text and not self.is_over:
            await self._woken()
        if self._text:
            text, self._text = self._text, ""
            return Delta(text=text)
        if self._error is not None:
            raise self._error
        assert self._end is not None
        return self._end

    async def _rest(self, seconds: float) -> None:
        loop, self._is_held = asyncio.get_running_loop(), True
        timer = loop.call_later(seconds, self._wake) if seconds != float("inf") else None
        try:
            await self._woken()
        finally:
            self._is_held = False
            if timer is not None:
                timer.cancel()

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
