"""An inbox: text of two ways comes out as one, once, in order, and as late as its reader allows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import Delta, Finished
from deployments.routing.inbox import Inbox

END = Finished(reason="length", num_output_tokens=3)
TIMEOUT_S = 10


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


async def read(inbox: Inbox) -> list[Delta | Finished]:
    messages = [await inbox.take()]
    while not isinstance(messages[-1], Finished):
        messages.append(await inbox.take())
    return messages


@given(
    own=st.lists(st.text("abc", min_size=1, max_size=3), max_size=5),
    delivered=st.lists(st.text("xyz", min_size=1, max_size=3), max_size=5),
    order=st.randoms(use_true_random=False),
    reads=st.sets(st.integers(0, 12)),
)
def test_what_the_call_brought_comes_first_whichever_arrives_first(own, delivered, order, reads) -> None:
    """The two ways are not in step with each other; each is in order in itself."""

    async def check() -> None:
        inbox, text = Inbox(1), ""
        by_call: list[Callable[[], None]] = [*(partial(inbox.put, each) for each in own), partial(inbox.moved, 7)]
        by_connection: list[Callable[[], None]] = [partial(inbox.deliver, each, None) for each in delivered[:-1]]
        by_connection.append(partial(inbox.deliver, "".join(delivered[-1:]), END))
        num_events = 0
        while by_call or by_connection:
            way = order.choice([each for each in (by_call, by_connection) if each])
            way.pop(0)()
            if num_events in reads and inbox._text:
                message = await inbox.take()
                assert isinstance(message, Delta)
                text += message.text
            num_events += 1
        messages = await read(inbox)
        text += "".join(each.text for each in messages if isinstance(each, Delta))
        assert text == "".join([*own, *delivered])
        assert messages[-1] == END
        assert len(messages) <= 2, "what waits is merged"

    run(check)


def test_a_reader_wakes_as_soon_as_there_is_text() -> None:
    async def check() -> None:
        inbox = Inbox(1)
        reading = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        assert not reading.done()
        inbox.put("a")
        assert await reading == Delta(text="a")

    run(check)


def test_text_comes_before_the_error_behind_it_and_nothing_after_an_end() -> None:
    async def check() -> None:
        inbox = Inbox(1)
        inbox.put("a")
        inbox.fail(ValueError("gone"))
        assert await inbox.take() == Delta(text="a")
        with pytest.raises(ValueError, match="gone"):
            await inbox.take()
        ended = Inbox(2)
        ended.put("", END)
        ended.fail(ValueError("gone"))
        assert await ended.take() == END

    run(check)


def test_one_that_is_held_gives_all_that_has_come_by_then() -> None:
    async def check() -> None:
        inbox = Inbox(1)
        began_s = time.monotonic()
        inbox.hold(began_s + 0.1)
        reading = asyncio.ensure_future(inbox.take())
        for text in "abc":
            await asyncio.sleep(0)
            inbox.put(text)
        assert await reading == Delta(text="abc")
        assert time.monotonic() - began_s >= 0.09

    run(check)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
def test_an_end_is_never_held(fails: bool, is_there: bool) -> None:
    async def check() -> None:
        inbox = Inbox(1)
        inbox.hold(math.inf)

        def end() -> None:
            inbox.fail(ValueError()) if fails else inbox.put("b", END)

        inbox.put("a")
        if is_there:
            end()
        reading = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        if not is_there:
            assert not reading.done()
            end()
        assert await reading == Delta(text="a" if fails else "ab")

    run(check)


def test_a_reader_that_gives_up_loses_nothing() -> None:
    async def check() -> None:
        inbox = Inbox(1)
        for until_s in (0.0, time.monotonic() + 60):
            inbox.hold(until_s)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(inbox.take(), 0.01)
        inbox.put("a", END)
        assert await read(inbox) == [Delta(text="a"), END]

    run(check)
