"""An ingress's connections to the replicas that have requests of its own: what they bring is put into inboxes.

A connection costs a replica one message per step for all requests of an ingress. Where there is none, as before the
first answer or where nothing gets through, the text comes by the requests' own calls, and costs more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import cast

from deployments.messages import Accepted, Delta, Finished, GenerateMessage, Moved, Outlet
from deployments.routing.frames import FrameReader, Greeting, encode_greeting, keep_watch
from deployments.routing.inbox import Inbox

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# After an outlet could not be reached the next request that could use it tries again no sooner.
CONNECT_AGAIN_S = 30.0
# A call that has ended has had all its text sent: so long it may still be under way.
LAST_TEXT_S = 10.0


class DeliveryLost(Exception):
    """The connection that brought a request's text has ended before the text: its replica has, in all likelihood."""


class Deliveries:
    """The inboxes of the requests that run, and the connections that fill them. For one event loop."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._last_calls: dict[int, asyncio.TimerHandle] = {}
        self._connections: dict[int, Connection] = {}  # those that are open, by number
        self._outlets: set[Outlet] = set()  # connected to
        self._connecting: dict[Outlet, asyncio.Task[None]] = {}
        self._failed_s: dict[Outlet, float] = {}

    def open(self) -> Inbox:
        """An inbox for a request that is about to be sent; `close` it."""
        inbox = Inbox(next(self._numbers))
        self._inboxes[inbox.number] = inbox
        return inbox

    def close(self, inbox: Inbox) -> None:
        """Nobody reads it any more: what still comes for it is dropped. Idempotent."""
        self._inboxes.pop(inbox.number, None)
        last_call = self._last_calls.pop(inbox.number, None)
        if last_call is not None:
            last_call.cancel()

    def accepted(self, inbox: Inbox, accepted: Accepted) -> None:
        """A replica has taken the request."""
        if accepted.connection is not None:
            self._move(inbox, accepted.connection)
        if accepted.outlet is not None and accepted.connection not in self._connections:
            # Or the replica still thinks that a connection is there, which has ended on this side.
            self._connect(accepted.outlet)

    async def read_call(self, inbox: Inbox, call: AsyncIterator[GenerateMessage]) -> None:
        """Puts what the request's own call brings, behind its Accepted, into the inbox; fails it where the call does.

        While a connection brings the text, the call still says whether the replica lives.
        """
        try:
            async for message in call:
                if isinstance(message, Moved):
                    self._move(inbox, message.connection)
                elif isinstance(message, Finished):
                    inbox.put("", message)
                elif isinstance(message, Delta):
                    inbox.put(message.text)
            self._call_has_ended(inbox)
        except Exception as error:
            inbox.fail(error)

    def _call_has_ended(self, inbox: Inbox) -> None:
        seconds = LAST_TEXT_S if inbox.connection is not None else 0.0
        if inbox.number in self._inboxes and not inbox.is_over:
            self._last_calls[inbox.number] = asyncio.get_running_loop().call_later(seconds, self._is_lost, inbox)

    def _is_lost(self, inbox: Inbox) -> None:
        inbox.fail(DeliveryLost("a call has ended before its text"))
        connection = self._connections.get(inbox.connection) if inbox.connection is not None else None
        if connection is not None:
            connection.abort()  # the replica's side of it has ended, in all likelihood

    def _move(self, inbox: Inbox, connection: int) -> None:
        inbox.moved(connection)
        if connection not in self._connections:
            inbox.fail(DeliveryLost("the connection to a replica has ended"))

    def _connect(self, outlet: Outlet) -> None:
        since_s = time.monotonic() - CONNECT_AGAIN_S
        self._failed_s = {each: failed_s for each, failed_s in self._failed_s.items() if failed_s > since_s}
        if not any(outlet in those for those in (self._outlets, self._connecting, self._failed_s)):
            self._connecting[outlet] = asyncio.ensure_future(self._connected(outlet))

    async def _connected(self, outlet: Outlet) -> None:
        greeting = Greeting(origin=self._origin, connection=next(self._numbers), secret=outlet.secret)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self, outlet, greeting), outlet.host, outlet.port
                )
        except (OSError, TimeoutError) as error:
            self._failed_s[outlet] = time.monotonic()
            logger.warning("no connection to a replica's outlet, so its text comes by Ray's calls: %r", error)
        finally:
            self._connecting.pop(outlet, None)

    # -- what a connection says ---------------------------------------------------------------------------------

    def joined(self, connection: Connection) -> None:
        """It is open."""
        self._connections[connection.number] = connection
        self._outlets.add(connection.outlet)

    def delivered(self, connection: int, number: int, text: str, end: Finished | None) -> None:
        """A connection has brought text for an inbox, which may have been closed by now, or be another one's."""
        inbox = self._inboxes.get(number)
        if inbox is not None and inbox.connection in (None, connection):
            inbox.deliver(text, end)

    def left(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.pop(connection.number, None)
        self._outlets.discard(connection.outlet)
        for inbox in list(self._inboxes.values()):
            if inbox.connection == connection.number:
                inbox.fail(DeliveryLost("the connection to a replica has ended"))


class Connection(asyncio.Protocol):
    """One connection to one replica's outlet. It is always read: inboxes take whatever comes."""

    def __init__(self, deliveries: Deliveries, outlet: Outlet, greeting: Greeting) -> None:
        self._deliveries, self.outlet, self._greeting = deliveries, outlet, greeting
        self._frames = FrameReader()
        self.number = greeting.connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_watch(transport.get_extra_info("socket"))
        self._transport.write(encode_greeting(self._greeting))
        self._deliveries.joined(self)

    def data_received(self, data: bytes) -> None:
        try:
            for number, text, end in self._frames.feed(data):
                self._deliveries.delivered(self.number, number, text, end)
        except ValueError as error:
            logger.warning("what a replica's outlet sends is not understood, and the connection ends: %s", error)
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._deliveries.left(self)
