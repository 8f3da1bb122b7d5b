"""A generation as an HTTP response body: whole, or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
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


async def whole_response(generation: Generation, writer: Writer) -> BaseModel:
    """The response once the generation is finished. Raises ApiError if it fails."""
    text = []
    async with aclosing(generation.messages) as messages:
        async for message in messages:
            if isinstance(message, Delta):
                text.append(message.text)
            else:
                usage = Usage.of(generation.num_prompt_tokens, message.num_output_tokens)
                return writer.whole("".join(text), completed_reason(message), usage)
    raise internal()


async def sse_events(generation: Generation, writer: Writer, *, include_usage: bool) -> AsyncIterator[str]:
    """The response as server-sent events. A failure becomes the last event: the 200 is long sent."""
    try:
        async with aclosing(_chunks(generation, writer, include_usage)) as chunks:
            async for chunk in chunks:
                yield _event(chunk)
        yield DONE
    except ApiError as error:
        yield _event(error.body())


async def _chunks(generation: Generation, writer: Writer, include_usage: bool) -> AsyncGenerator[BaseModel, None]:
    opening = writer.opening()
    if opening is not None:
        yield opening
    async with aclosing(generation.messages) as messages:
        async for message in messages:
            if isinstance(message, Delta):
                yield writer.piece(message.text)
                continue
            yield writer.closing(completed_reason(message))
            if include_usage:
                yield writer.usage(Usage.of(generation.num_prompt_tokens, message.num_output_tokens))


def _event(body: BaseModel) -> str:
    data = body.model_dump_json()
    return f"data: {data if data.isascii() else data.translate(LINE_ENDS)}\n\n"
