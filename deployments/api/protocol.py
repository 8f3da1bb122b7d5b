"""The OpenAI API's requests and responses, as far as they are served.

A field that would change what is generated and is not served is refused by name; what changes nothing is dropped
(`neutral_fields.py`). Lists are bounded before their items are looked at, and the first wrong item ends validation.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.fields import FirstErrorEnds, Flag, InRange, Prompt, at_most, only, shown, text_or_list
from deployments.api.neutral_fields import (
    CHAT_NEUTRAL_VALUES,
    COMPLETION_NEUTRAL_VALUES,
    IGNORED_FIELDS,
    MESSAGE_IGNORED,
    MESSAGE_NEUTRAL,
    NEUTRAL_VALUES,
    PART_IGNORED,
    PART_NEUTRAL,
    Neutral,
    changes_nothing,
)
from deployments.config import nearest
from deployments.messages import ChatMessage, Priority, Sampling
from selectn_core.bounds import Bounds, Number
from selectn_core.config import MOST_MS
from selectn_core.requests.sampling_ranges import RANGES

MAX_STOP_STRINGS, MAX_STOP_CHARS = 4, 1024
MAX_MESSAGES, MAX_PARTS = 4096, 1024
# The API's own default for /v1/completions.
DEFAULT_COMPLETION_TOKENS = 16


class ClientObject(BaseModel):
    """An object of a request: its fields, and of all others only those that change nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {
            name: value for name, value in values.items() if not changes_nothing(name, value, cls.ignored, cls.neutral)
        }
        fields = cls.model_fields
        unserved = {name: None for name in kept if name not in fields}  # in the client's order
        if unserved:
            raise _unserved(unserved, cls)
        return kept


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
MaxTokens = Annotated[int, InRange(RANGES["max_tokens"])]
Milliseconds = Annotated[
    float, InRange(Number(bounds=Bounds(above=0, at_most=MOST_MS), is_whole=False, is_optional=False, words=()))
]


class Request(ClientObject):
    """What the two generation requests share. `top_k`, `ignore_eos`, `slo` and `priority` are extensions."""

    ignored: ClassVar[frozenset[str]] = IGNORED_FIELDS
    neutral: ClassVar[Neutral] = NEUTRAL_VALUES
    # What is generated at most where `max_tokens` says nothing, if that much is left; None: what the server says.
    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, InRange(RANGES["temperature"])] = 1.0
    top_p: Annotated[float, InRange(RANGES["top_p"])] = 1.0
    top_k: Annotated[int, InRange(RANGES["top_k"])] = 0
    seed: Annotated[int, InRange(RANGES["seed"])] | None = None
    n: Annotated[Literal[1], only(1)] = 1
    stop: Annotated[tuple[StopString, ...], FirstErrorEnds(), at_most(MAX_STOP_STRINGS)] = ()
    stream: Flag = False
    stream_options: StreamOptions | None = None
    ignore_eos: Flag = False
    slo: RequestSlo | None = None
    priority: Priority = "normal"

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
        if not isinstance(value, str | list | tuple):
            raise PydanticCustomError("no_text_or_list", "expected text, or a list of texts")
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if self.include_usage and not self.stream:
            raise _at_fault("stream_options", "stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None) -> Sampling:
        """The sampling part of the message to a replica."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            default_max_tokens=self.default_max_tokens,
        )


class RequestSlo(ClientObject):
    """`slo`: this request's latency objectives in milliseconds, within what the server allows; null: the server's."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class StreamOptions(ClientObject):
    """`stream_options`; `include_obfuscation` pads chunks at OpenAI and changes nothing here."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    neutral: ClassVar[Neutral] = {"continuous_usage_stats": (False,)}

    include_usage: Flag = False


class TextPart(ClientObject):
    """The one kind of content part a text model can read."""

    ignored: ClassVar[frozenset[str]] = PART_IGNORED
    neutral: ClassVar[Neutral] = PART_NEUTRAL

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: Any) -> Any:
        kind = values.get("type", "text") if isinstance(values, dict) else "text"
        if kind != "text":
            what = f"of type '{shown(kind)}'" if isinstance(kind, str) else "of this type"
            raise PydanticCustomError("no_text", "a part {what} is not served: the model reads text", {"what": what})
        return values


Parts = Annotated[tuple[TextPart, ...], FirstErrorEnds(), at_most(MAX_PARTS)]


class Message(ClientObject):
    """One turn. `name` has no place in most chat templates and is ignored."""

    ignored: ClassVar[frozenset[str]] = MESSAGE_IGNORED
    neutral: ClassVar[Neutral] = MESSAGE_NEUTRAL

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")],
        text_or_list("expected text, or a list of text parts"),
    ]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _an_assistant_may_have_said_nothing(cls, values: Any) -> Any:
        """Servers answer with `content: null` where a turn was all tool calls, or empty."""
        if isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None:
            return {**values, "content": ""}
        return values

    def to_chat_message(self) -> ChatMessage:
        """The turn as chat templates know it: plain text, and "developer" under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class ChatCompletionRequest(Request):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Neutral] = CHAT_NEUTRAL_VALUES

    messages: Annotated[tuple[Message, ...], FirstErrorEnds(), at_most(MAX_MESSAGES, at_least=1)]
    max_completion_tokens: MaxTokens | None = None

    @property
    def output_tokens(self) -> int | None:
        """The newer of the two names wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions, for one prompt."""

    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL_VALUES
    default_max_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS

    prompt: Prompt


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_prompt_tokens: int, num_output_tokens: int) -> Usage:
        """The usage of one generation."""
        return cls(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
        )


FinishReason = Literal["stop", "length"]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage


class ChatDelta(BaseModel):
    """What is new; a key that is not is left out, not null."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _only_what_is_new(self) -> dict[str, str]:
        return {name: value for name, value in self if value is not None}


class ChatChunkChoice(BaseModel):
    index: int = 0
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """A whole completion, and also one chunk of a stream: the API gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None


class Model(BaseModel):
    """`max_model_len`, prompt and output tokens together, is an extension, as in other servers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "select-n"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


def now_unix_s() -> int:
    """`created` of a response."""
    return int(time.time())


def _unserved(names: Collection[str], kind: type[ClientObject]) -> PydanticCustomError:
    """An error for fields that `kind` does not have, which names all that are merely not served here."""
    known = [name for name in kind.neutral if name in names]
    if known:
        verb = "are" if len(known) > 1 else "is"
        return _at_fault(known[0], f"{' and '.join(known)} {verb} not served by this server")
    first = next(iter(names))
    name = shown(first)
    hint = nearest(name, kind.model_fields) if name == first else ""
    return _at_fault(name, f"unknown field '{name}'{hint}")


def _at_fault(name: str, message: str) -> PydanticCustomError:
    """An error of a whole object that still names the field for the response's `param`."""
    # Pydantic puts values into its text one after the other: what is put in last is not looked through again.
    return PydanticCustomError("at_fault", "{message}", {"param": name, "message": message})


Request.model_rebuild()
