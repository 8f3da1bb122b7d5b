"""The text of a replica's requests, made once per step for all of them, and sent to whoever asked for it.

The engine's thread says which requests have new tokens. The event loop hears of it once, however many they are by then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from deployments.messages import Delta, EndReason, Finished, GenerateRequest, Moved
from deployments.replica.detokenizer import Detokenizer, StopStrings
from deployments.replica.outlet import Connection, OutletServer

if TYPE_CHECKING:  # which imports torch
    from selectn_core.requests.handle import RequestHandle, TokenEvent


class RequestText:
    """A request's token events as text, which ends early where a stop string is met."""

    def __init__(self, handle: RequestHandle, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.handle, self._detokenizer = handle, detokenizer
        self._stop = StopStrings(stop) if stop else None
        self._num_output_tokens = 0

    def read(self) -> tuple[str, Finished | None]:
        """What has become final since, and the end if it has come. Does not wait."""
        events = self.handle.take()
        if self._stop is None:  # where no event may be the last one wanted, all are decoded at once
            return self._text(events) if events else ("", None)
        text = ""
        for event in events:
            more, end = self._text([event])
            text += more
            if end is not None:
                return text, end
        return text, None

    def _text(self, events: list[TokenEvent]) -> tuple[str, Finished | None]:
        token_ids, last = [each for event in events for each in event.token_ids], events[-1]
        self._num_output_tokens += len(token_ids)
        text, reason, stopped = self._detokenizer.push(token_ids), last.finish_reason, False
        if reason is not None:
            text += self._detokenizer.finish()
        if self._stop is not None:
            text, stopped = self._stop.push(text)
            if stopped:
                self.handle.stop()
                reason = "stop"
            elif reason is not None:
                text += self._stop.finish()
        if reason is None:
            return text, None
        return text, Finished(
            reason=cast(EndReason, reason), num_output_tokens=self._num_output_tokens, error=last.error
        )


class Stream:
    """One request's text on its way: by its own call, until its caller is connected, and from then on that way."""

    def __init__(self, text: RequestText, request: GenerateRequest, outlet: OutletServer) -> None:
        self._text, self._outlet = text, outlet
        self._origin, self._inbox = request.origin, request.inbox
        self._connection: Connection | None = None
        self._is_over = self._is_done = False  # nothing more is read; nothing more is to be sent by the connection
        self._own: deque[Delta | Finished | Moved] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._connect()

    @property
    def handle(self) -> RequestHandle:
        """The request as the engine's submitter sees it."""
        return self._text.handle

    @property
    def connection(self) -> int | None:
        """The connection that brings the text; None while its own call does."""
        return self._connection.number if self._connection is not None else None

    def read(self) -> None:
        """Takes what the engine has for it, and passes it on."""
        if self._is_over:
            return
        try:
            text, end = self._text.read()
            self._is_over = end is not None
            if text or end is not None:
                self._send(text, end)
        except Exception as error:
            self._is_over, self._error = True, error
            self._changed.set()

    def _send(self, text: str, end: Finished | None) -> None:
        if self._connection is None and (joined := self._connect()) is not None:
            self._own.append(Moved(connection=joined.number))
            self._changed.set()
        if self._connection is not None:
            self._connection.put(self._inbox, text, end)
            return
        self._own.extend([Delta(text=text)] if text else [])
        self._own.extend([end] if end is not None else [])
        self._changed.set()

    def _connect(self) -> Connection | None:
        connection = self._outlet.connection(self._origin) if self._inbox else None
        if connection is not None:
            connection.follow(self._inbox, self)
            self._connection = connection
        return connection

    async def messages(self) -> AsyncIterator[Delta | Finished | Moved]:
        """What its own call brings. Returns when all its text is sent, by whichever way."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._own:
                message = self._own.popleft()
                yield message
                if isinstance(message, Finished):
                    return
            if self._error is not None:
                raise self._error
            if self._is_done:
                return

    def close(self) -> None:
        """Nobody wants more of it. Idempotent."""
        self._is_over = True
        self.handle.when_pushed(None)
        if self._connection is not None:
            self._connection.forget(self._inbox)

    # -- a connection's follower --------------------------------------------------------------------------------

    def delivered(self) -> None:
        """All its text is on its way."""
        self._is_done = True
        self._changed.set()

    def lost(self) -> None:
        """Its caller's connection has ended: there is nobody to bring the rest to."""
        self._is_over = self._is_done = True
        self.handle.cancel()
        self._changed.set()


class Streams:
    """The streams that a replica has open. For one event loop; only the engine's thread comes from outside."""

    def __init__(self, outlet: OutletServer, stepped: Callable[[], None]) -> None:
        """`stepped` is called after the text of a step has been passed on."""
        self._outlet, self._stepped = outlet, stepped
        self._loop = asyncio.get_running_loop()
        self._changed: deque[Stream] = deque()
        self._is_scheduled = False

    def open(self, text: RequestText, request: GenerateRequest) -> Stream:
        """A request's stream; `close` it."""
        stream = Stream(text, request, self._outlet)
        stream.handle.when_pushed(partial(self._pushed, stream))
        return stream

    def _pushed(self, stream: Stream) -> None:
        """On the engine's thread."""
        self._changed.append(stream)
        if not self._is_scheduled:  # cleared before the streams are looked at: at worst the loop looks once in vain
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all streams
                self._loop.call_soon_threadsafe(self._read)

    def _read(self) -> None:
        self._is_scheduled = False
        for _ in range(len(self._changed)):  # what comes meanwhile is read next
            self._changed.popleft().read()
        self._outlet.flush()
        self._stepped()
