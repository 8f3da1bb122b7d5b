"""Host-memory headroom: what replicas report of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from typing import Any

from deployments.routing.prefixes import MAX_PREFIXES

MAX_ORIGINS = 64


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a replica has promised one caller: what its requests may hold when the replica holds most.

    Those at the door are included. `sequence` is the latest of them: its earlier ones, if they still run, count
    too.
    """

    origin: str
    tokens: int
    requests: int
    sequence: int = 0


@dataclass(frozen=True, kw_only=True)
class HeadroomReport:
    """What a replica can hold and what it has promised.

    `reported_s` is the replica's own clock, and only tells one report from the next. `kv_capacity_tokens` is what it
    holds if it offloads as much as it surely may (`control/guarantee.py`); `longest_request_tokens` what one request
    may ever have there, prompt and output, and `is_model_limit` whether that is so because of the model,
    which no other replica could change. `drain_tokens_per_s`: at which a full replica gives promised
    tokens back. `slack`: 1 - (measured TPOT / objective); negative where it is missed. None: not measured yet.
    `ttft_s` is its objective now, and a request may name its own from `tightest_ttft_s` to `loosest_ttft_s`; None: it
    has none. `model` is the name of what it serves; "": it has not said. A text with more than `most_prompt_chars`,
    `uncounted_chars` left out, never fits there; None: its length says nothing.
    """

    replica_id: str
    reported_s: float
    kv_capacity_tokens: int
    longest_request_tokens: int
    max_requests: int
    is_model_limit: bool = False
    promises: tuple[Promise, ...] = ()
    num_waiting: int = 0
    waiting_prefill_tokens: int = 0
    drain_tokens_per_s: float | None = None
    prefill_s_per_token: float | None = None
    slack: float | None = None
    ttft_s: float | None = None
    tightest_ttft_s: float | None = None
    loosest_ttft_s: float | None = None
    prefixes: tuple[int, ...] = ()
    is_draining: bool = False
    model: str = ""
    max_model_len: int = 0
    model_created_unix_s: int = 0
    most_prompt_chars: int | None = None
    uncounted_chars: str = ""

    @property
    def promised_tokens(self) -> int:
        return sum(promise.tokens for promise in self.promises)

    @property
    def headroom_tokens(self) -> int:
        """Tokens that it can still promise."""
        return max(0, self.kv_capacity_tokens - self.promised_tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadroomReport | None:
        """The report, or None for anything that is none: a replica of another version is unknown, not an error."""
        try:
            known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
            promises = tuple(Promise(**promise) for promise in known.pop("promises", ())[: MAX_ORIGINS + 1])
            prefixes = tuple(int(prefix) for prefix in known.pop("prefixes", ())[:MAX_PREFIXES])
            report = cls(**known, promises=promises, prefixes=prefixes)
            return report if report._is_sane() else None
        except (TypeError, ValueError, KeyError):
            return None

    def _is_sane(self) -> bool:
        counts = (
            *(self.kv_capacity_tokens, self.longest_request_tokens, self.max_requests, self.waiting_prefill_tokens),
            *(self.max_model_len, self.model_created_unix_s, self.num_waiting),
            self.most_prompt_chars or 0,
            *(count for each in self.promises for count in (each.tokens, each.requests, each.sequence)),
        )
        rates = (self.drain_tokens_per_s, self.prefill_s_per_token)
        objectives = (self.ttft_s, self.tightest_ttft_s, self.loosest_ttft_s)  # endless is one, if of no use
        return (
            type(self.model) is type(self.uncounted_chars) is str
            and all(type(count) is int and count >= 0 for count in counts)
            and all(rate is None or 0 <= rate < inf for rate in rates)
            and all(objective is None or objective > 0 for objective in objectives)
            and isfinite(self.reported_s)  # NaN equals nothing: such a report would be new for ever
            and (self.slack is None or isfinite(self.slack))
        )
