"""A bounded log of decisions, kept where they are made: a small tuple each, and words only when asked."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["interval", "admission", "scaling"]
# The first part of an id. Nothing decides about scaling yet: its place is kept, in ids and in what shows them.
PREFIXES: Mapping[Kind, str] = {"interval": "i", "admission": "a", "scaling": "s"}
CAPACITY = 256


class Facts(Protocol):
    """What is kept of a decision. Whatever costs time is computed by these, when somebody asks."""

    @property
    def verdict(self) -> str:
        """What was decided, one word of a bounded set."""

    @property
    def reason(self) -> str:
        """Why, one word of a bounded set."""

    @property
    def inputs(self) -> Mapping[str, float | None]:
        """What was known: numbers, with their units in their names. Nothing of a prompt."""

    @property
    def request_id(self) -> str | None:
        """Whose it was, where it was of one request."""


@dataclass(frozen=True, kw_only=True)
class LoggedDecision:
    """A decision as it is shown. `id` names its kind, the place where it was made, and its number there."""

    id: str
    kind: Kind
    unix_s: float
    verdict: str
    reason: str
    inputs: Mapping[str, float | None]
    request_id: str | None = None


class DecisionLog:
    """The last `capacity` decisions of one kind and one place. One thread adds; any thread reads."""

    def __init__(self, kind: Kind, *, capacity: int = CAPACITY, clock: Callable[[], float] = time.time) -> None:
        self._kind, self._clock = kind, clock
        self._entries: deque[tuple[int, float, Facts]] = deque(maxlen=capacity)
        self._num = 0

    def add(self, facts: Facts) -> int:
        """Notes a decision that is made now; returns its number, from 1."""
        self._num += 1
        self._entries.append((self._num, self._clock(), facts))
        return self._num

    def latest(self, place: str, most: int = CAPACITY) -> list[LoggedDecision]:
        """The newest first; `place` is what ids name."""
        entries = list(reversed(self._entries.copy()))[:most]
        return [self._logged(place, *entry) for entry in entries]

    def find(self, place: str, decision_id: str) -> LoggedDecision | None:
        """The decision of that id; None where it was never made here, or is no longer kept."""
        for number, unix_s, facts in self._entries.copy():
            if id_of(self._kind, place, number) == decision_id:
                return self._logged(place, number, unix_s, facts)
        return None

    def _logged(self, place: str, number: int, unix_s: float, facts: Facts) -> LoggedDecision:
        return LoggedDecision(
            id=id_of(self._kind, place, number),
            kind=self._kind,
            unix_s=unix_s,
            verdict=facts.verdict,
            reason=facts.reason,
            inputs={name: _finite(value) for name, value in facts.inputs.items()},
            request_id=facts.request_id,
        )


def _finite(value: float | None) -> float | None:
    """What is endless is no number: JSON has none of that kind."""
    return value if value is not None and math.isfinite(value) else None


def id_of(kind: Kind, place: str, number: int) -> str:
    """Such as `i-8h3k2a1b-123`: the 123rd interval decision of the replica 8h3k2a1b."""
    return f"{PREFIXES[kind]}-{place}-{number}"


def parts_of(decision_id: str) -> tuple[Kind, str] | None:
    """The kind and the place that an id names; None for what is no id."""
    kinds = {prefix: kind for kind, prefix in PREFIXES.items()}
    prefix, _, rest = decision_id.partition("-")
    place, _, number = rest.rpartition("-")
    return (kinds[prefix], place) if prefix in kinds and place and number.isdecimal() else None
