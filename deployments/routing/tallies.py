"""What a board adds up when a report or a request comes or goes, so that decisions need not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.prefixes import digest


@dataclass(kw_only=True)
class Sent:
    replica_id: str
    ask: Ask
    at_door: bool
    sequence: int


class Seen:
    """A report, when it came, what it adds up to, and which of our requests in it have ended since."""

    def __init__(self, replica_id: str, report: HeadroomReport | None, seen_s: float, origin: str) -> None:
        self.report, self.seen_s = report, seen_s
        self.ended_tokens = self.ended_requests = 0
        promises = report.promises if report is not None else ()
        own = [promise for promise in promises if promise.origin == origin]
        self.promised_tokens = sum(promise.tokens for promise in promises)
        self.num_requests = sum(promise.requests for promise in promises)
        self.own_tokens = sum(promise.tokens for promise in own)
        self.own_requests = sum(promise.requests for promise in own)
        self.own_sequence = max((promise.sequence for promise in own), default=0)
        self.prefixes = frozenset(report.prefixes) if report is not None else frozenset()
        self.tie = digest(f"{origin}/{replica_id}".encode())  # callers differ in whom they take first


@dataclass(eq=False, kw_only=True)
class Mine:
    """What this caller has sent to a replica; `reported` is the latest of it that the replica's report knows of."""

    reported: int = 0
    requests: dict[str, Sent] = field(default_factory=dict)
    at_door: dict[str, int] = field(default_factory=dict)  # tokens
    num_unreported: int = 0
    unreported_tokens: int = 0

    def add(self, sent: Sent) -> None:
        self.requests[sent.ask.request_id] = sent
        if sent.at_door:
            self.at_door[sent.ask.request_id] = sent.ask.tokens
        self._count(sent, 1)

    def remove(self, request_id: str) -> None:
        self.at_door.pop(request_id, None)
        self._count(self.requests.pop(request_id), -1)

    def begun(self, request_id: str) -> None:
        self.requests[request_id].at_door = False
        self.at_door.pop(request_id, None)

    def has_reported(self, sequence: int) -> None:
        if sequence != self.reported:
            self.reported, self.num_unreported, self.unreported_tokens = sequence, 0, 0
            for sent in self.requests.values():
                self._count(sent, 1)

    def _count(self, sent: Sent, sign: int) -> None:
        if sent.sequence > self.reported:
            self.num_unreported += sign
            self.unreported_tokens += sign * sent.ask.tokens


NONE_SENT = Mine()


class Promised:
    """Tokens that fresh reports have promised to other callers, by origin."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._counted: dict[str, HeadroomReport] = {}
        self._by_origin: dict[str, list[int]] = {}  # promises, and their tokens
        self.tokens = 0

    @property
    def num_origins(self) -> int:
        return len(self._by_origin)

    def update(self, fresh: Mapping[str, HeadroomReport]) -> None:
        """These count, and no others: what has changed since is added and taken away."""
        for replica_id, report in [*self._counted.items()]:
            if fresh.get(replica_id) is not report:
                self._count(self._counted.pop(replica_id), -1)
        for replica_id, report in fresh.items():
            if replica_id not in self._counted:
                self._counted[replica_id] = report
                self._count(report, 1)

    def _count(self, report: HeadroomReport, sign: int) -> None:
        for promise in report.promises:
            if promise.origin != self._origin:
                counts = self._by_origin.setdefault(promise.origin, [0, 0])
                counts[0] += sign
                counts[1] += sign * promise.tokens
                self.tokens += sign * promise.tokens
                if not counts[0]:
                    del self._by_origin[promise.origin]
