"""The bytes of a response: one event is one line, for any reader of lines."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.api.protocol import ErrorDetail, ErrorResponse
from deployments.http.responses import DONE, ChatWriter, CompletionWriter, PieceEvents, Writer, _event, sse_events
from deployments.http.write_budget import WriteBudget
from deployments.messages import Delta, Finished
from deployments.routing.inbox import Inbox
from deployments.routing.replica_client import Generation, Messages

LINE_ENDS = [char for char in map(chr, range(sys.maxunicode + 1)) if len(f"a{char}b".splitlines()) > 1]


def test_an_event_is_one_line_whatever_is_said() -> None:
    assert "\u2028" in LINE_ENDS
    text = "世é".join(["", *LINE_ENDS, ""])
    for body in (
        ChatWriter("id", "m").piece(text),
        CompletionWriter("id", "m").piece(text),
        ErrorResponse(error=ErrorDetail(message=text, type="t")),
    ):
        event = _event(body)
        assert event.endswith("\n\n")
        (line,) = event[:-2].splitlines()
        assert json.loads(line.removeprefix("data: ")) == body.model_dump(mode="json")


MODELS = st.text('m"\\é\u2028\x00', max_size=6)


@pytest.mark.parametrize("writer_type", [ChatWriter, CompletionWriter])
@given(texts=st.lists(st.text(), max_size=3), model=MODELS)
@example(texts=["".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))], model="m")
@example(texts=['\ufffd\u2028\u2029\x85\x7f\x00\x1f"\\/', ""], model="m")
def test_a_piece_has_the_bytes_of_its_model(writer_type: type[Writer], texts: list[str], model: str) -> None:
    writer = writer_type("id", model)
    pieces = PieceEvents(writer)
    for text in texts:
        assert pieces.event(text).encode() == _event(writer.piece(text)).encode()


def test_half_a_surrogate_pair_is_an_error_either_way() -> None:
    writer = CompletionWriter("id", "m")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        _event(writer.piece("\ud83d"))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        PieceEvents(writer).event("\ud83d").encode()


class TestWrites:
    """What goes out together."""

    @staticmethod
    async def _inbox_messages(inbox: Inbox) -> AsyncIterator[Delta | Finished]:
        while True:
            yield await inbox.take()

    def writes(self, inbox: Inbox, budget: WriteBudget, writer: Writer) -> AsyncIterator[str]:
        messages = Messages(Delta(text="first"), self._inbox_messages(inbox), inbox)  # type: ignore[arg-type]
        generation = Generation(num_prompt_tokens=1, messages=messages)
        return sse_events(generation, writer, include_usage=False, budget=budget)

    def test_the_first_text_and_the_end_are_written_at_once_and_the_rest_in_its_turn(self) -> None:
        async def check() -> None:
            inbox, writer = Inbox(1), ChatWriter("id", "m")
            writes = self.writes(inbox, WriteBudget(10.0), writer)
            began_s = time.monotonic()
            first = await anext(writes)
            assert first.count("data: ") == 2, "the opening, and the first text"
            for text in "abc":
                inbox.put(text)
            second = await anext(writes)
            assert second == _event(writer.piece("abc"))
            assert time.monotonic() - began_s >= 0.09
            inbox.put("d")
            inbox.put("", Finished(reason="stop", num_output_tokens=5))
            ended_s = time.monotonic()
            last = _event(writer.piece("d")) + _event(writer.closing("stop")) + DONE
            assert [each async for each in writes] == [last]
            assert time.monotonic() - ended_s < 0.09

        asyncio.run(check())

    def test_what_has_come_is_read_before_an_error(self) -> None:
        async def check() -> None:
            inbox, writer = Inbox(1), CompletionWriter("id", "m")
            writes = self.writes(inbox, WriteBudget(10.0), writer)
            await anext(writes)
            inbox.put("held")
            inbox.put("", Finished(reason="error", num_output_tokens=5, error="a layer failed"))
            text, error = [each async for each in writes]
            assert text == _event(writer.piece("held"))
            assert "error" in json.loads(error.removeprefix("data: "))

        asyncio.run(check())

    def test_without_a_budget_each_text_is_written_as_it_comes(self) -> None:
        async def check() -> None:
            inbox, writer = Inbox(1), CompletionWriter("id", "m")
            writes = self.writes(inbox, WriteBudget(None), writer)
            await anext(writes)
            for text in "abc":
                inbox.put(text)
                assert await anext(writes) == _event(writer.piece(text))

        asyncio.run(check())


def test_a_budget_is_shared_by_the_streams_under_way() -> None:
    budget = WriteBudget(100.0, clock=lambda: 50.0)
    with budget.stream():
        assert budget.next_s() == pytest.approx(50.01)
        with budget.stream():
            assert budget.next_s() == pytest.approx(50.02)
    assert budget.next_s() == 50.0
    assert WriteBudget(None, clock=lambda: 50.0).next_s() == 50.0
