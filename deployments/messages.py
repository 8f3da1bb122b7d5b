"""What the ingress and a replica say to each other: frozen, plain data without behaviour.

Outcomes are messages, not exceptions: an exception that crosses Ray arrives wrapped, and its attributes
depend on both sides unpickling it alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deployments.prompt_length import TextBound

Priority = Literal["high", "normal", "low"]
# "overdue": it has waited for as long as it may, and no engine has had it.
Refusal = Literal["invalid", "overloaded", "unavailable", "too_large", "overdue"]
EndReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """selectn_core.requests.sampling.SamplingParams as the client wrote it; ingress and replica check the same ranges.

    Repeated here because the ingress must not import torch. `max_tokens` None: `default_max_tokens`, or what the
    replica has by default, if the model's length leaves that many.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    default_max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One generation as it goes to a replica: the only form of a request that has its prompt and its sampling.

    `prompt` is text, token ids, or a conversation for the chat template.

    `model` is the name that was asked for; "": whatever is served.
    `ttft_ms` and `tpot_ms` are the request's own latency objectives; None: the server's.
    `origin` names the caller among those that share the replicas, `sequence` the request among the caller's.
    `waited_s`: since it came to the caller, of which the time to its first token counts. For `wait_s` more (None: for
    ever) it may wait until it is let in.
    `inbox` is where the caller wants the text, by its connection to the replica; 0: by the call itself.
    """

    request_id: str
    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    model: str = ""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    origin: str = ""
    sequence: int = 0
    waited_s: float = 0.0
    wait_s: float | None = None
    inbox: int = 0


@dataclass(frozen=True, kw_only=True)
class Outlet:
    """Where a replica delivers text to callers that connect and show `secret`."""

    host: str
    port: int
    secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The only message of a request that was not taken. `field` is the request field at fault."""

    kind: Refusal
    message: str
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The first message of a request that was taken: sent before there is a token.

    With `connection` nothing more comes by this call: that connection of the caller's brings the rest. Without, the
    caller may connect to `outlet`.
    """

    num_prompt_tokens: int
    outlet: Outlet | None = None
    connection: int | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The last message of a call whose caller is connected by now: that connection brings the rest."""

    connection: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Text that is final: no later token changes it."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last message. `num_output_tokens` counts what was generated, cut-off stop strings included."""

    reason: EndReason
    num_output_tokens: int
    error: str | None = None


GenerateMessage = Refused | Accepted | Moved | Delta | Finished


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a replica serves. `max_model_len` counts prompt and output tokens.

    `text_bound` tells texts that have more tokens than that; None where the tokenizer sets no such bound.
    """

    name: str
    max_model_len: int
    created_unix_s: int
    text_bound: TextBound | None = None
