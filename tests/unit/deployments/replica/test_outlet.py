"""Replica and ingress over a real connection on loopback: streams, outlet and deliveries; the engine is pretended."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from deployments.messages import Accepted, Delta, Finished, GenerateMessage, GenerateRequest, Outlet
from deployments.replica import outlet as outlets
from deployments.replica.detokenizer import Detokenizer
from deployments.replica.outlet import OutletServer
from deployments.replica.streams import RequestText, Streams
from deployments.routing import deliveries
from deployments.routing.deliveries import Deliveries, DeliveryLost
from deployments.routing.frames import LENGTH_BYTES, MAX_FRAME_BYTES, Greeting, encode_greeting
from deployments.routing.inbox import Inbox
from selectn_core.requests.handle import RequestHandle, TokenEvent

TIMEOUT_S = 20
LOOPBACK = "127.0.0.1"


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


class Letters:
    """A tokenizer whose tokens are code points."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(map(chr, token_ids))


class Replica:
    """`SelectNReplica.generate` from where the engine has the request, for handles that a test pushes into."""

    def __init__(self) -> None:
        self.server, self.num_steps = OutletServer(), 0
        self.streams = Streams(self.server, self._stepped)
        self.handles: dict[int, RequestHandle] = {}
        self.cancelled: set[str] = set()
        self.num_inside = 0

    def _stepped(self) -> None:
        self.num_steps += 1

    def submit(self, inbox: int) -> RequestHandle:
        handle = self.handles[inbox] = RequestHandle(f"r{inbox}", 1, self.cancelled.add)
        return handle

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateMessage]:
        handle = self.handles[request.inbox]
        self.num_inside += 1
        try:
            text = RequestText(handle, Detokenizer(Letters()), request.stop)
            with closing(self.streams.open(text, request)) as stream:
                yield Accepted(num_prompt_tokens=1, outlet=self.server.outlet, connection=stream.connection)
                async for message in stream.messages():
                    yield message
        finally:
            self.num_inside -= 1
            handle.cancel()


class Ingress:
    """`ReplicaClient`'s part: an inbox, the call, and what it brings."""

    def __init__(self, replica: Replica, origin: str = "ingress") -> None:
        self._replica, self._origin, self.deliveries = replica, origin, Deliveries(origin)
        self.calls: list[asyncio.Task[None]] = []

    async def ask(self, stop: tuple[str, ...] = ()) -> tuple[Inbox, RequestHandle]:
        inbox = self.deliveries.open()
        handle = self._replica.submit(inbox.number)
        request = GenerateRequest(request_id="r", prompt="p", origin=self._origin, inbox=inbox.number, stop=stop)
        call = self._replica.generate(request)
        accepted = await anext(call)
        assert isinstance(accepted, Accepted)
        self.deliveries.accepted(inbox, accepted)
        self.calls.append(asyncio.create_task(self.deliveries.read_call(inbox, call)))
        return inbox, handle

    async def connected(self) -> None:
        """Has a connection made, by a request that ends at once."""
        inbox, handle = await self.ask()
        await until(lambda: self._replica.server.connection(self._origin) is not None)
        handle.push(ended())
        assert await text_of(inbox) == ""


@asynccontextmanager
async def a_replica() -> AsyncIterator[Replica]:
    replica = Replica()
    await replica.server.open(LOOPBACK)
    try:
        yield replica
    finally:
        await replica.server.close()
        await asyncio.sleep(0.01)  # its callers hear of that


async def a_connected_ingress(replica: Replica) -> tuple[Ingress, outlets.Connection]:
    ingress = Ingress(replica)
    await ingress.connected()
    connection = replica.server.connection("ingress")
    assert connection is not None
    return ingress, connection


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.002)


def tokens(text: str) -> TokenEvent:
    return TokenEvent(token_ids=tuple(map(ord, text)))


def ended(reason: str = "length", text: str = "") -> TokenEvent:
    return TokenEvent(token_ids=tuple(map(ord, text)), finish_reason=reason)


async def text_of(inbox: Inbox) -> str:
    text = ""
    while isinstance(message := await inbox.take(), Delta):
        text += message.text
    return text


async def dropped(outlet: Outlet, said: bytes) -> None:
    """Returns when who said that has been dropped."""
    reader, writer = await asyncio.open_connection(outlet.host, outlet.port)
    writer.write(said)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


def test_the_first_request_begins_by_its_call_and_moves_to_the_connection() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress = Ingress(replica)
            inbox, handle = await ingress.ask()
            handle.push(tokens("ab"))
            assert await inbox.take() == Delta(text="ab")
            assert inbox.connection is None
            await until(lambda: replica.server.connection("ingress") is not None)
            handle.push(tokens("cd"))
            assert await inbox.take() == Delta(text="cd")
            assert inbox.connection is not None
            handle.push(ended(text="e"))
            assert await text_of(inbox) == "e"
            await asyncio.gather(*ingress.calls)
            second, handle = await ingress.ask()
            assert second.connection == inbox.connection, "it is there already"
            handle.push(ended("stop", "f"))
            assert await text_of(second) == "f"
            assert second._end == Finished(reason="stop", num_output_tokens=1)
            await asyncio.gather(*ingress.calls)
            assert replica.num_inside == 0

    run(check)


@pytest.mark.parametrize("is_reachable", [True, False])
def test_many_streams_at_once_are_whole_and_in_order(is_reachable: bool) -> None:
    """Steps on a thread of their own, as an engine has one; some clients leave. Without a connection it is the same."""

    async def check() -> None:
        async with a_replica() as replica:
            if not is_reachable:
                replica.server.outlet = None
            ingress, asked = Ingress(replica), dict[int, tuple[Inbox, str]]()
            rng = random.Random(0)
            asked_for = {}
            for _ in range(40):
                inbox, handle = await ingress.ask()
                text = "".join(rng.choices("abcdé", k=60))
                asked[inbox.number], asked_for[inbox.number] = (inbox, text), (handle, text)
            gone = rng.sample(sorted(asked), 8)

            def steps() -> None:
                for index in range(60):
                    for handle, text in asked_for.values():
                        handle.push(tokens(text[index]) if index < 59 else ended(text=text[index]))

            thread = threading.Thread(target=steps)
            thread.start()
            reading = {number: asyncio.create_task(text_of(inbox)) for number, (inbox, _) in asked.items()}
            await asyncio.sleep(0)
            for number in gone:
                reading.pop(number).cancel()
                ingress.deliveries.close(asked[number][0])
            texts = dict(zip(reading, await asyncio.gather(*reading.values()), strict=True))
            assert texts == {number: asked[number][1] for number in reading}
            thread.join()
            await asyncio.gather(*ingress.calls)
            assert replica.num_inside == 0
            assert replica.num_steps <= 60 * 40

    run(check)


def test_a_stop_string_ends_a_request_where_it_is_met() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress = Ingress(replica)
            await ingress.connected()
            inbox, handle = await ingress.ask(stop=("cd",))
            for each in (tokens("ab"), tokens("c"), tokens("de"), tokens("f"), ended()):
                handle.push(each)
            assert await text_of(inbox) == "ab"
            assert inbox._end == Finished(reason="stop", num_output_tokens=5)
            assert handle.ticket in replica.cancelled

    run(check)


def test_an_ingress_that_reads_nothing_holds_no_other_one_up_and_grows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "HIGH_WATER_BYTES", 1024)

    async def check() -> None:
        async with a_replica() as replica:
            ingress = Ingress(replica)
            await ingress.connected()
            assert replica.server.outlet is not None
            deaf = socket.create_connection((LOOPBACK, replica.server.outlet.port))
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            greeting = Greeting(origin="deaf", connection=1, secret=replica.server.outlet.secret)
            deaf.sendall(encode_greeting(greeting))
            await until(lambda: replica.server.connection("deaf") is not None)
            connection = replica.server.connection("deaf")
            assert connection is not None
            handle = replica.submit(999)
            request = GenerateRequest(request_id="r", prompt="p", origin="deaf", inbox=999)
            call = replica.generate(request)
            await anext(call)
            text = "x" * 10_000
            while not connection._is_paused:
                handle.push(tokens(text))
                await asyncio.sleep(0)
            before = len(connection._outbox.take())
            for _ in range(5):
                handle.push(tokens(text))
                await asyncio.sleep(0.005)
            assert before <= 1
            assert connection._outbox.take() == [(999, text * 5, None)]
            inbox, other = await ingress.ask()
            other.push(ended(text="quick"))
            assert await text_of(inbox) == "quick"
            deaf.close()
            with pytest.raises(StopAsyncIteration):
                await anext(call)
            assert handle.ticket in replica.cancelled, "an ingress that has gone wants nothing more"
            assert replica.num_inside == 0
            assert replica.server.connection("deaf") is None

    run(check)


def test_a_request_that_is_cancelled_leaves_nothing_in_the_outbox() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            connection.pause_writing()
            _, handle = await ingress.ask()
            handle.push(tokens("abc"))
            await until(lambda: len(connection._outbox) == 1)
            ingress.calls[-1].cancel()
            await asyncio.wait(ingress.calls)
            await until(lambda: replica.num_inside == 0)
            assert (len(connection._outbox), connection._followers) == (0, {})
            assert handle.ticket in replica.cancelled

    run(check)


def test_a_call_lasts_until_its_text_is_on_its_way() -> None:
    """Serve counts it until then: a replica that drains leaves nothing unsent."""

    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            connection.pause_writing()
            inbox, handle = await ingress.ask()
            handle.push(ended(text="last words"))
            await until(lambda: len(connection._outbox) == 1)
            await asyncio.sleep(0.01)
            assert replica.num_inside == 1
            connection.resume_writing()
            await asyncio.gather(*ingress.calls)
            assert replica.num_inside == 0
            assert await text_of(inbox) == "last words"

    run(check)


def test_a_replica_that_dies_ends_its_requests_behind_what_has_come() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress = Ingress(replica)
            await ingress.connected()
            (moved, first), (unread, second) = await ingress.ask(), await ingress.ask()
            for handle in (first, second):
                handle.push(tokens("a"))
            assert await moved.take() == Delta(text="a")
            connection = replica.server.connection("ingress")
            assert connection is not None
            connection._transport.abort()
            for inbox in (moved, unread):
                with pytest.raises(DeliveryLost):
                    await text_of(inbox)
            await until(lambda: {first.ticket, second.ticket} <= replica.cancelled)
            third, handle = await ingress.ask()  # another connection, or its call
            handle.push(ended(text="b"))
            assert await text_of(third) == "b"
            await until(lambda: not ingress.deliveries._connecting)

    run(check)


def test_a_connection_that_has_ended_on_the_ingress_side_alone_is_made_again() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            (open_one,) = ingress.deliveries._connections.values()
            ingress.deliveries.left(open_one)  # as after a reset that the replica has not heard of
            lost, _ = await ingress.ask()
            with pytest.raises(DeliveryLost):
                await lost.take()
            await until(lambda: replica.server.connection("ingress") not in (None, connection))
            inbox, handle = await ingress.ask()
            handle.push(ended(text="here"))
            assert await text_of(inbox) == "here"

    run(check)


def test_a_connection_that_has_ended_on_the_replica_side_alone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "LAST_TEXT_S", 0.05)

    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            inbox, handle = await ingress.ask()
            monkeypatch.setattr(connection, "flush", lambda: None)  # nothing arrives any more
            handle.push(ended(text="lost"))
            await asyncio.sleep(0.02)
            connection.connection_lost(None)
            with pytest.raises(DeliveryLost):
                await text_of(inbox)
            await until(lambda: not ingress.deliveries._connections)

    run(check)


def test_text_for_the_inbox_of_another_connection_is_dropped() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            inbox, handle = await ingress.ask()
            ingress.deliveries.delivered(connection.number + 100, inbox.number, "forged", None)
            handle.push(ended(text="real"))
            assert await text_of(inbox) == "real"

    run(check)


def test_those_who_connect_and_say_nothing_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlets, "MOST_STRANGERS", 5)

    async def check() -> None:
        async with a_replica() as replica:
            outlet = replica.server.outlet
            assert outlet is not None
            silent = [await asyncio.open_connection(outlet.host, outlet.port) for _ in range(9)]
            ingress, _ = await a_connected_ingress(replica)
            await until(lambda: len(replica.server._open) <= 5 + 1)
            assert [await asyncio.wait_for(reader.read(), 5) for reader, _ in silent[:4]] == [b""] * 4
            inbox, handle = await ingress.ask()
            handle.push(ended(text="served"))
            assert await text_of(inbox) == "served"
            for _ in range(7):
                await dropped(outlet, b"wrong 1 somebody\n")
            for _, writer in silent:
                writer.close()

    run(check)
    assert sum("did not know the secret" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("payload", [None, b"[" * 50_000, b"\xff"])
def test_what_is_no_frame_ends_the_connection(payload: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    length = MAX_FRAME_BYTES + 1 if payload is None else len(payload)

    async def check() -> None:
        async with a_replica() as replica:
            ingress, connection = await a_connected_ingress(replica)
            connection._transport.write(length.to_bytes(LENGTH_BYTES) + (payload or b""))
            await until(lambda: not ingress.deliveries._connections)

    run(check)
    assert sum("is not understood" in record.message for record in caplog.records) == 1


def test_who_does_not_know_the_secret_is_nobody() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            assert replica.server.outlet is not None
            wrong = encode_greeting(Greeting(origin="ingress", connection=1, secret="guessed"))
            for said in (wrong, b"\n", b"x" * 5000, b"\xff 1 a\n"):
                await dropped(replica.server.outlet, said)
            assert replica.server.connection("ingress") is None

    run(check)


def test_who_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "GREETING_TIMEOUT_S", 0.05)

    async def check() -> None:
        async with a_replica() as replica:
            assert replica.server.outlet is not None
            await dropped(replica.server.outlet, b"half a greet")

    run(check)


def test_with_encrypted_calls_text_stays_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")

    async def check() -> None:
        async with a_replica() as replica:
            assert replica.server.outlet is None
            inbox, handle = await Ingress(replica).ask()
            handle.push(ended(text="a"))
            assert await text_of(inbox) == "a"
            assert inbox.connection is None

    run(check)


def test_an_outlet_out_of_reach_is_not_tried_with_every_request(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with a_replica() as replica:
            assert replica.server._server is not None
            replica.server._server.close()
            ingress = Ingress(replica)
            for _ in range(3):
                inbox, handle = await ingress.ask()
                await asyncio.sleep(0.02)
                handle.push(ended(text="a"))
                assert await text_of(inbox) == "a"

    run(check)
    assert caplog.text.count("no connection to a replica's outlet") == 1


def test_a_detokenizer_that_fails_ends_its_own_request_alone() -> None:
    async def check() -> None:
        async with a_replica() as replica:
            ingress = Ingress(replica)
            await ingress.connected()
            (broken, first), (whole, second) = await ingress.ask(), await ingress.ask()
            first.push(TokenEvent(token_ids=(-1,)))  # no code point
            with pytest.raises(ValueError, match="chr"):
                await text_of(broken)
            second.push(ended(text="a"))
            assert await text_of(whole) == "a"
            assert first.ticket in replica.cancelled

    run(check)
