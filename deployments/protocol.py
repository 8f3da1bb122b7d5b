"""The OpenAI API's requests and responses, as far as they are served.

A field that would change what is generated and is not served is refused by name; fields that change nothing
(IGNORED_FIELDS), and unserved fields set to the value that means "off" (NEUTRAL_VALUES), are dropped.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from deployments.config import nearest
from deployments.fair_queue import Priority
from deployments.messages import ChatMessage, Sampling

MAX_STOP_STRINGS = 4
MAX_TOKENS = 2**31 - 1
# The API's own default for /v1/completions.
DEFAULT_COMPLETION_TOKENS = 16

IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "parallel_tool_calls"}
)
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


class Request(BaseModel):
    """What the two generation requests share. `top_k`, `ignore_eos`, `slo` and `priority` are extensions."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: Literal[1] = 1
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    slo: RequestSlo | None = None
    priority: Priority = "normal"

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if not _changes_nothing(name, value)}
        for name in kept.keys() - cls.model_fields.keys():
            raise _unserved(name, cls.model_fields)
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
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
        )


class RequestSlo(BaseModel):
    """`slo`: this request's latency objectives in milliseconds, within what the server allows; null: the server's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)


class StreamOptions(BaseModel):
    """`stream_options`; `include_obfuscation` pads chunks at OpenAI and changes nothing here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(BaseModel):
    """The one kind of content part a text model can read."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. `name` has no place in most chat templates and is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """The SDK echoes an assistant turn back with `tool_calls`, `refusal`, ... set to null."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key == "content"}

    def to_chat_message(self) -> ChatMessage:
        """The turn as chat templates know it: plain text, and "developer" under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class ChatCompletionRequest(Request):
    """POST /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    @property
    def output_tokens(self) -> int | None:
        """The newer of the two names wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions, for one prompt."""

    prompt: str | tuple[int, ...]

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


def _changes_nothing(name: str, value: Any) -> bool:
    if name in IGNORED_FIELDS or value is None:
        return True
    # By type too: 0 is neutral for top_logprobs, and in Python False == 0.
    return any(value == neutral and _same_kind(value, neutral) for neutral in NEUTRAL_VALUES.get(name, ()))


def _same_kind(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool)


def _unserved(name: str, known: Any) -> PydanticCustomError:
    if name in NEUTRAL_VALUES:
        return _at_fault(name, f"{name} is not served by this server")
    return _at_fault(name, f"unknown field '{name}'{nearest(name, known)}")


def _at_fault(name: str, message: str) -> PydanticCustomError:
    """An error of the whole body that still names the field for the response's `param`."""
    return PydanticCustomError("at_fault", "{message}", {"message": message, "param": name})


Request.model_rebuild()
