"""A request's handle: events in order, from any thread, to one reader, sync or async."""

from __future__ import annotations

import asyncio
import threading

import pytest

from selectn_core.requests.handle import RequestHandle, TokenEvent, Wakes

EVENTS = [TokenEvent(token_ids=(i,)) for i in range(50)] + [TokenEvent(token_ids=(99,), finish_reason="length")]


def new_handle(cancel=lambda ticket: None) -> RequestHandle:
    return RequestHandle("request", 3, cancel)


def push_all(handle: RequestHandle, events=EVENTS) -> threading.Thread:
    thread = threading.Thread(target=lambda: [handle.push(event) for event in events])
    thread.start()
    return thread


def test_a_sync_reader_gets_every_event_in_order() -> None:
    handle = new_handle()
    thread = push_all(handle)
    assert list(handle) == EVENTS
    thread.join()


def test_an_async_reader_gets_every_event_in_order() -> None:
    async def read() -> list[TokenEvent]:
        handle = new_handle()
        thread = push_all(handle)
        events = [event async for event in handle]
        thread.join()
        return events

    assert asyncio.run(read()) == EVENTS


def test_nothing_comes_after_the_last_event() -> None:
    handle = new_handle()
    push_all(handle, [*EVENTS, TokenEvent(token_ids=(1,)), TokenEvent(token_ids=(), finish_reason="error")]).join()
    assert list(handle) == EVENTS
    assert handle.num_tokens == len(EVENTS)


def test_the_result_is_all_tokens_and_an_error_is_raised() -> None:
    handle = new_handle()
    push_all(handle).join()
    assert handle.result() == [*range(50), 99]
    failed = new_handle()
    failed.push(TokenEvent(token_ids=(), finish_reason="error", error="it broke"))
    with pytest.raises(RuntimeError, match="it broke"):
        failed.result()


def test_cancelling_names_the_ticket_and_tickets_differ() -> None:
    cancelled: list[str] = []
    handles = [new_handle(cancelled.append) for _ in range(2)]
    for handle in handles:
        handle.cancel()
    assert cancelled == [handle.ticket for handle in handles]
    assert len(set(cancelled)) == 2


def test_timing_needs_tokens() -> None:
    handle = new_handle()
    assert (handle.timing.ttft_s, handle.timing.tpot_s) == (None, None)
    handle.push(TokenEvent(token_ids=(1,)))
    assert handle.timing.ttft_s is not None
    assert handle.timing.tpot_s is None
    handle.push(TokenEvent(token_ids=(2, 3)))
    assert handle.timing.tpot_s is not None
    assert handle.timing.tpot_s >= 0


def test_what_was_waited_before_counts_to_the_first_token_alone() -> None:
    handle = RequestHandle("request", 3, lambda ticket: None, waited_s=100.0)
    handle.push(TokenEvent(token_ids=(1,)))
    handle.push(TokenEvent(token_ids=(2,)))
    assert 100 <= (handle.timing.ttft_s or 0) < 150
    assert (handle.timing.tpot_s or 0) < 50


def test_an_event_for_a_reader_whose_loop_has_ended_is_dropped() -> None:
    handle = new_handle()

    async def read_one() -> None:
        handle.push(TokenEvent(token_ids=(1,)))
        async for _ in handle:
            return

    asyncio.run(read_one())
    handle.push(TokenEvent(token_ids=(2,)))


def test_a_loop_that_closed_under_its_reader_does_not_disturb_the_sender() -> None:
    """The sender is the generation thread: an exception there would fail every other request."""
    handle = new_handle()
    loop = asyncio.new_event_loop()
    reader = handle.__aiter__()
    handle.push(TokenEvent(token_ids=(1,)))
    loop.run_until_complete(anext(reader))
    loop.close()
    handle.push(TokenEvent(token_ids=(2,)))
    assert handle.num_tokens == 2
    with pytest.raises(StopIteration):
        reader.aclose().send(None)  # closes the reader, as the loop would have


def test_readers_of_one_loop_are_woken_together() -> None:
    """All get their events, and the loop's thread was interrupted once for them all."""

    async def read_all() -> tuple[list[TokenEvent], int]:
        loop, handles, num_calls = asyncio.get_running_loop(), [new_handle() for _ in range(5)], 0
        readers = [asyncio.ensure_future(anext(aiter(handle))) for handle in handles]
        await asyncio.sleep(0)
        call_soon = loop.call_soon_threadsafe

        def counted(*args):
            nonlocal num_calls
            num_calls += 1
            return call_soon(*args)

        loop.call_soon_threadsafe = counted
        with Wakes() as wakes:
            for i, handle in enumerate(handles):
                handle.push(TokenEvent(token_ids=(i,)), wakes=wakes)
        return await asyncio.gather(*readers), num_calls

    events, num_calls = asyncio.run(read_all())
    assert events == [TokenEvent(token_ids=(i,)) for i in range(5)]
    assert num_calls == 1


def test_readers_may_leave_while_events_arrive() -> None:
    """Many clients disconnect in the middle; each time the sender may be about to wake them."""

    async def read_a_few(handle: RequestHandle) -> None:
        async for event in handle:
            if event.token_ids[0] >= 20:
                return

    for _ in range(20):
        handle, errors = new_handle(), []

        def push(handle: RequestHandle = handle, errors: list[Exception] = errors) -> None:
            try:
                for event in EVENTS:
                    handle.push(event)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        asyncio.run(read_a_few(handle))
        thread.join()
        assert not errors
