"""Where callers connect to be brought the text of their requests: beside Ray's calls, one frame per step and caller.

A call's items cost Ray about a millisecond each, on both sides. The calls themselves stay: Serve counts, cancels and
drains them. A connection that pauses has its text merged in an outbox, and holds no other one up.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import time
from typing import Protocol, cast

from deployments.messages import Finished, Outlet
from deployments.replica.outbox import Outbox
from deployments.routing.frames import MAX_GREETING_BYTES, decode_greeting, encode, keep_watch

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 10.0
# More than this in a transport, and text is merged until it has gone.
HIGH_WATER_BYTES = 2**16
# Who has connected greets at once. Of more than these the oldest goes; and so often it is said that secrets were wrong.
MOST_STRANGERS, WARN_EVERY_S = 64, 60.0
CLOSING_TIMEOUT_S = 2.0


class Follower(Protocol):
    """Who puts text into a connection, and wants to know what becomes of it."""

    def delivered(self) -> None:
        """The end of it is on its way."""

    def lost(self) -> None:
        """The connection has ended before."""


class OutletServer:
    """The replica's side: listens on one address, and knows the callers that are connected. For one event loop."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._open: dict[Connection, None] = {}  # in the order in which they came
        self._num_wrong, self._warned_s = 0, -WARN_EVERY_S
        self._connections: dict[str, Connection] = {}  # those that have greeted, by origin
        self.outlet: Outlet | None = None

    async def open(self, host: str) -> None:
        """Listens there. Without a listener all text goes by the calls, which works as well and costs more."""
        if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
            logger.info("Ray's calls are encrypted, and a connection beside them would not be: text goes by the calls")
            return
        try:
            self._server = await asyncio.get_running_loop().create_server(lambda: Connection(self), host, 0)
        except OSError as error:
            logger.warning("cannot listen on %s, so text goes by Ray's calls: %s", host, error)
            return
        port = self._server.sockets[0].getsockname()[1]
        self.outlet = Outlet(host=host, port=port, secret=self._secret)

    def connection(self, origin: str) -> Connection | None:
        """The caller's connection; None where it has none now."""
        return self._connections.get(origin)

    def flush(self) -> None:
        """Sends what the connections' outboxes hold, where nothing holds them up."""
        for connection in list(self._connections.values()):
            connection.flush()

    async def close(self) -> None:
        """Listens no more, and ends the connections behind what they have been given."""
        if self._server is not None:
            self._server.close()
        connections = list(self._open)
        for connection in connections:
            connection.close()
        if connections:
            await asyncio.wait([connection.ended for connection in connections], timeout=CLOSING_TIMEOUT_S)

    def knows(self, secret: str) -> bool:
        """Whether it is the one that callers were told by Ray."""
        return hmac.compare_digest(secret.encode(), self._secret.encode())

    def opened(self, connection: Connection) -> None:
        """Somebody has connected."""
        self._open[connection] = None
        strangers = [each for each in self._open if not each.origin]
        if len(strangers) > MOST_STRANGERS:
            strangers[0].abort()

    def refused(self) -> None:
        """Somebody did not know the secret."""
        self._num_wrong += 1
        now_s = time.monotonic()
        if now_s >= self._warned_s + WARN_EVERY_S:
            logger.warning("%d connections to this replica's outlet did not know the secret", self._num_wrong)
            self._num_wrong, self._warned_s = 0, now_s

    def joined(self, connection: Connection) -> None:
        """A caller has greeted; of two connections of one caller the later counts."""
        before = self._connections.get(connection.origin)
        self._connections[connection.origin] = connection
        if before is not None:
            before.close()

    def left(self, connection: Connection) -> None:
        """The connection has ended."""
        self._open.pop(connection, None)
        if self._connections.get(connection.origin) is connection:
            del self._connections[connection.origin]


class Connection(asyncio.Protocol):
    """One caller's connection. Until it has greeted it is nobody's."""

    def __init__(self, server: OutletServer) -> None:
        self._server = server
        self._greeting = bytearray()
        self._outbox, self._followers = Outbox(), dict[int, Follower]()
        self._is_paused = False
        self.origin, self.number = "", 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def follow(self, inbox: int, follower: Follower) -> None:
        """The follower will put text for the inbox in, until its end, or until it has the inbox forgotten."""
        self._followers[inbox] = follower

    def put(self, inbox: int, text: str, end: Finished | None) -> None:
        """Has the text sent with the next flush that nothing holds up."""
        self._outbox.put(inbox, text, end)

    def forget(self, inbox: int) -> None:
        """The request is over: what has not been sent of it is not wanted any more. Idempotent."""
        self._outbox.forget(inbox)
        self._followers.pop(inbox, None)

    def flush(self) -> None:
        """One frame with all that waits, unless the caller has yet to read what was sent before."""
        if self._is_paused or not self._outbox:
            return
        pieces = self._outbox.take()
        self._transport.write(encode(pieces))
        for inbox, _, end in pieces:
            if end is not None:
                self._followers.pop(inbox).delivered()

    def close(self) -> None:
        """Ends the connection behind what has been sent."""
        self._is_paused = False
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    # -- asyncio's hooks ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        keep_watch(transport.get_extra_info("socket"))
        self._server.opened(self)
        self._timer = asyncio.get_running_loop().call_later(GREETING_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.origin:
            return  # nothing is said after the greeting
        self._greeting += data
        line, newline, _ = bytes(self._greeting).partition(b"\n")
        if not newline and len(line) <= MAX_GREETING_BYTES:
            return
        greeting = decode_greeting(line) if newline else None
        if greeting is None or not self._server.knows(greeting.secret):
            self._server.refused()
            self.abort()
            return
        self._timer.cancel()
        self.origin, self.number = greeting.origin, greeting.connection
        self._server.joined(self)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._server.left(self)
        followers, self._followers = self._followers, {}
        for follower in followers.values():
            follower.lost()
        if not self.ended.done():
            self.ended.set_result(None)
