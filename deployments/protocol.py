"""The OpenAI API's requests and responses, as far as they are served.

A field that would change what is generated and is not served is refused by name; what changes nothing is dropped
(`neutral_fields.py`). Lists are bounded before their items are looked at, and the first wrong item ends validation.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Strict,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from deployments.config import nearest
from deployments.fair_queue import Priority
from deployments.messages import ChatMessage, Sampling
from deployments.neutral_fields import (
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

MAX_STOP_STRINGS, MAX_STOP_CHARS = 4, 1024
MAX_MESSAGES, MAX_PARTS = 4096, 1024
MAX_TOKENS = 2**31 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
# What is shown of a name that a client made up.
MAX_SHOWN_CHARS = 64
# The API's own default for /v1/completions.
DEFAULT_COMPLETION_TOKENS = 16


def _at_most(limit: int, *, at_least: int = 0) -> BeforeValidator:
    """Refuses a list of more than `limit`, before any of its items is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) < at_least:
            raise PydanticCustomError("too_few", "expected at least {at_least}", {"at_least": at_least})
        if isinstance(value, list) and len(value) > limit:
            message = "at most {limit} are allowed, and there are {count}"
            raise PydanticCustomError("too_many", message, {"limit": limit, "count": len(value)})
        return value

    return BeforeValidator(check)


def _text_or_list(expected: str) -> Discriminator:
    """Of the union's two branches, tagged <text> and <list>, only the one that was meant says what is wrong."""
    branches: dict[type, str] = {str: "<text>", list: "<list>", tuple: "<list>"}
    return Discriminator(
        lambda value: branches.get(type(value)),
        custom_error_type="no_text_or_list",
        custom_error_message=expected,
    )


class FirstErrorEnds(FailFast):
    """pydantic's FailFast for lists within a union: what annotates those must have a hash."""

    __hash__ = object.__hash__


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
TokenIds = Annotated[tuple[Annotated[int, Strict()], ...], FirstErrorEnds()]


class Request(ClientObject):
    """What the two generation requests share. `top_k`, `ignore_eos`, `slo` and `priority` are extensions."""

    ignored: ClassVar[frozenset[str]] = IGNORED_FIELDS
    neutral: ClassVar[Neutral] = NEUTRAL_VALUES
    # What is generated at most where `max_tokens` says nothing, if that much is left; None: what the server says.
    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = Field(default=None, ge=MIN_SEED, le=MAX_SEED)
    n: Literal[1] = 1
    stop: Annotated[tuple[StopString, ...], FirstErrorEnds(), _at_most(MAX_STOP_STRINGS)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    slo: RequestSlo | None = None
    priority: Priority = "normal"

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
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

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)


class StreamOptions(ClientObject):
    """`stream_options`; `include_obfuscation` pads chunks at OpenAI and changes nothing here."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    neutral: ClassVar[Neutral] = {"continuous_usage_stats": (False,)}

    include_usage: bool = False


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
            shown = f"of type '{_shown(kind)}'" if isinstance(kind, str) else "of this type"
            raise PydanticCustomError("no_text", "a part {shown} is not served: the model reads text", {"shown": shown})
        return values


Parts = Annotated[tuple[TextPart, ...], FirstErrorEnds(), _at_most(MAX_PARTS)]


class Message(ClientObject):
    """One turn. `name` has no place in most chat templates and is ignored."""

    ignored: ClassVar[frozenset[str]] = MESSAGE_IGNORED
    neutral: ClassVar[Neutral] = MESSAGE_NEUTRAL

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")],
        _text_or_list("expected text, or a list of text parts"),
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

    messages: Annotated[tuple[Message, ...], FirstErrorEnds(), _at_most(MAX_MESSAGES, at_least=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    @property
    def output_tokens(self) -> int | None:
        """The newer of the two names wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions, for one prompt."""

    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL_VALUES
    default_max_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS

    prompt: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[TokenIds, Tag("<list>")],
        _text_or_list("expected text, or a list of token ids"),
    ]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        """[text] and [[ids]] are batches of one; larger batches are not served."""
        if not isinstance(value, list) or not value or isinstance(value[0], int):
            return value
        if len(value) > 1:
            raise PydanticCustomError("one_prompt", "only one prompt per request is served")
        return value[0]


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
    name = _shown(first)
    hint = nearest(name, kind.model_fields) if name == first else ""
    return _at_fault(name, f"unknown field '{name}'{hint}")


def _shown(name: str) -> str:
    return name if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]}..."


def _at_fault(name: str, message: str) -> PydanticCustomError:
    """An error of a whole object that still names the field for the response's `param`."""
    return PydanticCustomError("at_fault", "{message}", {"message": message, "param": name})


Request.model_rebuild()
