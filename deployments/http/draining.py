"""An HTTP front end that must stop ends its answers in order: newcomers are sent elsewhere, and what is left says why.

Serve tells a replica to stop, waits until nothing is under way there, and kills it when its grace is over. Without this
a client whose answer takes longer would see a broken connection, or the plain-text 500 of Serve's proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import ApiError, unavailable

logger = logging.getLogger(__name__)

# So long before the end of its grace an answer is broken off: its last words have yet to pass Serve's proxy, and Serve
# looks once a second whether anything is under way. Of a short grace half is for answers.
LAST_WORDS_S = 2.0


class Stopping:
    """Whether this process must stop, and the answers that are under way in it. For one event loop, but for `begin`."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.has_begun = False

    def begin(self, grace_s: float) -> None:
        """The process will be killed in `grace_s`. On any thread; what is said a second time changes nothing."""
        if self.has_begun:
            return
        self.has_begun = True
        if self._loop is not None:  # or no request has come yet, and none will be let in
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._limit, max(grace_s / 2, grace_s - LAST_WORDS_S))

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncGenerator[asyncio.Timeout, None]:
        """An answer is under way. Cancels the block, and raises TimeoutError, when there is no more time for it."""
        self._loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            self._limits.add(limit)
            try:
                yield limit
            finally:
                self._limits.discard(limit)

    def _limit(self, seconds: float) -> None:
        assert self._loop is not None
        logger.info("stopping: %d answers have %.1f s to come to their end", len(self._limits), seconds)
        ends_s = self._loop.time() + seconds
        for limit in self._limits:
            limit.reschedule(ends_s)


class OrderlyEnd:
    """ASGI middleware around everything: 503 for newcomers, an error for what cannot be finished."""

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self._app, self._stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._stopping.has_begun:
            await _stops().response()(scope, receive, send)
            return
        answer, limit = _Answer(send), None
        try:
            async with self._stopping.answering() as limit:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if limit is None or not limit.expired():
                raise
            await answer.break_off(scope, receive)


class _Answer:
    """What has been sent of an answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = self._is_complete = self._is_events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._is_events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    async def break_off(self, scope: Scope, receive: Receive) -> None:
        """The last words: a whole error where nothing was sent yet, an event where events were."""
        if not self._has_begun:
            await _stops().response()(scope, receive, self._send)
        elif not self._is_complete:
            event = f"data: {_stops().body().model_dump_json()}\n\n" if self._is_events else ""
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _stops() -> ApiError:
    return unavailable("this server is stopping; send the request again")
