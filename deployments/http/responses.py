"""A generation as an HTTP response body: whole, or as server-sent events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from json.encoder import encode_basestring
from math import inf
from typing import Protocol

from pydantic import BaseModel

from deployments.api.errors import ApiError, internal
from deployments.api.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    FinishReason,
    Usage,
    now_unix_s,
)
from deployments.http.write_budget import WriteBudget
from deployments.messages import Delta
from deployments.routing.replica_client import Generation, completed_reason

DONE = "data: [DONE]\n\n"
# What some clients' readers (Python's str.splitlines) end a line at, and JSON leaves as it is.
LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


class Writer(Protocol):
    """The shapes of one endpoint's responses."""

    def __init__(self, request_id: str, model: str) -> None: ...
    def whole(self, text: str, reason: FinishReason, usage: Usage) -> BaseModel: ...
    def opening(self) -> BaseModel | None: ...
    def piece(self, text: str) -> BaseModel: ...
    def closing(self, reason: FinishReason) -> BaseModel: ...
    def usage(self, usage: Usage) -> BaseModel: ...


class ChatWriter:
    """Shapes of /v1/chat/completions."""

    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = request_id, model, now_unix_s()

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> ChatCompletion:
        choice = ChatChoice(message=AssistantMessage(content=text), finish_reason=reason)
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=(choice,), usage=usage)

    def opening(self) -> ChatCompletionChunk:
        return self._chunk(ChatChunkChoice(delta=ChatDelta(role="assistant", content="")))

    def piece(self, text: str) -> ChatCompletionChunk:
        return self._chunk(ChatChunkChoice(delta=ChatDelta(content=text)))

    def closing(self, reason: FinishReason) -> ChatCompletionChunk:
        return self._chunk(ChatChunkChoice(delta=ChatDelta(), finish_reason=reason))

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk(usage=usage)

    def _chunk(self, *choices: ChatChunkChoice, usage: Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


class CompletionWriter:
    """Shapes of /v1/completions."""

    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = request_id, model, now_unix_s()

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> Completion:
        return self._completion(CompletionChoice(text=text, finish_reason=reason), usage=usage)

    def opening(self) -> None:
        return None

    def piece(self, text: str) -> Completion:
        return self._completion(CompletionChoice(text=text))

    def closing(self, reason: FinishReason) -> Completion:
        return self._completion(CompletionChoice(text="", finish_reason=reason))

    def usage(self, usage: Usage) -> Completion:
        return self._completion(usage=usage)

    def _completion(self, *choices: CompletionChoice, usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


class PieceEvents:
    """The events of a stream's text: as `Writer.piece` has them, with all but the text formatted once."""

    def __init__(self, writer: Writer) -> None:
        mark = uuid.uuid4().hex
        self._begin, self._end = _event(writer.piece(mark)).split(f'"{mark}"')

    def event(self, text: str) -> str:
        """The event that says `text`."""
        return f"{self._begin}{_one_line(encode_basestring(text))}{self._end}"


async def whole_response(generation: Generation, writer: Writer) -> BaseModel:
    """The response once the generation is finished. Raises ApiError if it fails."""
    text = []
    async with aclosing(generation.messages) as messages:
        messages.hold(inf)
        async for message in messages:
            if isinstance(message, Delta):
                text.append(message.text)
            else:
                usage = Usage.of(generation.num_prompt_tokens, message.num_output_tokens)
                return writer.whole("".join(text), completed_reason(message), usage)
    raise internal()


async def sse_events(
    generation: Generation, writer: Writer, *, include_usage: bool, budget: WriteBudget
) -> AsyncIterator[str]:
    """The response as server-sent events, one or more to a write. A failure becomes the last: the 200 is long sent."""
    try:
        with budget.stream():
            async with aclosing(_writes(generation, writer, include_usage, budget)) as writes:
                async for write in writes:
                    yield write
    except ApiError as error:
        yield _event(error.body())


async def _writes(
    generation: Generation, writer: Writer, include_usage: bool, budget: WriteBudget
) -> AsyncGenerator[str, None]:
    """The first text is written at once, the next in its turn with all that has come by then, and the end at once."""
    opening = writer.opening()
    before, pieces = _event(opening) if opening is not None else "", PieceEvents(writer)
    async with aclosing(generation.messages) as messages:
        async for message in messages:
            if isinstance(message, Delta):
                before += pieces.event(message.text)
                if not messages.has_end:
                    yield before
                    before = ""
                    messages.hold(budget.next_s())
                continue
            try:
                reason = completed_reason(message)
            except ApiError:
                if before:  # what has come is read before the error
                    yield before
                raise
            events = [before, _event(writer.closing(reason))]
            if include_usage:
                events.append(_event(writer.usage(Usage.of(generation.num_prompt_tokens, message.num_output_tokens))))
            yield "".join([*events, DONE])
            return


def _event(body: BaseModel) -> str:
    return f"data: {_one_line(body.model_dump_json())}\n\n"


def _one_line(data: str) -> str:
    return data if data.isascii() else data.translate(LINE_ENDS)
