"""What deployments/routing/board.py must decide, added up anew for each replica at each question.

It is the board as it was before it kept tallies. Tests compare the two.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport, Promise

# A caller may have one request waiting at a full replica's door: the next one is there when the last one leaves. And
# where that waits for KV, one more that is smaller: there may be room for it before there is for the other.
DOOR_REQUESTS, PASSING_REQUESTS = 1, 1
# Headroom that differs by less than this share of a replica's capacity is equal: then prefixes decide.
EQUAL_SHARE = 0.1
AWAY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A replica as a place for one request. `room_tokens` None: it has not reported, or not lately.

    `may_pass`: those at the door wait for KV, the replica knows until when, and this one needs less than any of them.
    """

    replica_id: str
    room_tokens: int | None
    fits: bool
    is_late: bool
    num_at_door: int
    may_pass: bool

    @property
    def can_take(self) -> bool:
        """Whether the request may be sent there now: it has room, or its door is free."""
        return self.fits or self.num_at_door < DOOR_REQUESTS + (PASSING_REQUESTS if self.may_pass else 0)


@dataclass(kw_only=True)
class _Sent:
    replica_id: str
    ask: Ask
    at_door: bool
    sequence: int


@dataclass(kw_only=True)
class _Seen:
    """A report, when it came, and which of our requests in it have ended since. `left_s` None: the replica runs."""

    report: HeadroomReport | None
    seen_s: float
    left_s: float | None = None
    ended_tokens: int = 0
    ended_requests: int = 0


class Board:
    """One caller's view of the replicas. Not thread-safe."""

    def __init__(self, origin: str, *, stale_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._origin, self._stale_after_s, self._clock = origin, stale_after_s, clock
        self._ever_seen: dict[str, _Seen] = {}
        self._sent: dict[str, _Sent] = {}
        self._sequence = 0
        self._sent_to: dict[str, dict[str, _Sent]] = {}  # the same by replica

    # -- what is known ------------------------------------------------------------------------------------------

    def observe(self, reports: Mapping[str, HeadroomReport | None]) -> None:
        """The replicas that run now, with their latest reports; any other is away for a moment, and then gone."""
        now_s, before = self._clock(), self._present
        for replica_id, seen in before.items():
            if replica_id not in reports and seen.left_s is None:
                seen.left_s = now_s
        for replica_id, report in reports.items():
            known = before.get(replica_id)
            if known is None or (report is not None and known.report != report):
                self._ever_seen[replica_id] = _Seen(report=report, seen_s=now_s)
            else:
                known.left_s = None

    def forget(self, replica_id: str) -> None:
        """The replica has died."""
        self._ever_seen.pop(replica_id, None)

    @property
    def _seen(self) -> dict[str, _Seen]:
        """Those that run."""
        return {replica_id: seen for replica_id, seen in self._ever_seen.items() if seen.left_s is None}

    @property
    def _present(self) -> dict[str, _Seen]:
        """Those that run, and those that left lately, had reported and were not draining."""
        now_s = self._clock()
        return {
            replica_id: seen
            for replica_id, seen in self._ever_seen.items()
            if seen.left_s is None
            or (now_s < seen.left_s + AWAY_S and seen.report is not None and not seen.report.is_draining)
        }

    @property
    def replica_ids(self) -> frozenset[str]:
        return frozenset(self._seen or self._present)

    def has_model(self, name: str) -> bool:
        return bool(self._present)  # these tests' reports name no model, so each may serve any

    @property
    def longest_request_tokens(self) -> int | None:
        """What the longest request on any replica may have; None while that is not known of all of them."""
        reports = [seen.report for seen in self._present.values()]
        known = [report.longest_request_tokens for report in reports if report is not None]
        return max(known) if known and len(known) == len(reports) else None

    def could_hold(self, ask: Ask) -> bool:
        """Whether some replica may, as far as is known, have the request at some time."""
        return not self._present or any(_may_hold(seen.report, ask) for seen in self._present.values())

    def free_tokens(self) -> int:
        """Tokens that the replicas can still promise, as far as they are known to; none where no more requests fit."""
        return sum(self._free_tokens(replica_id) for replica_id in self._seen)

    def door_tokens(self) -> int:
        """Tokens of this caller's requests that wait at the doors of full replicas."""
        return sum(sent.ask.tokens for sent in self._sent.values() if sent.at_door)

    def drain_tokens_per_s(self) -> float | None:
        """At which this caller gets tokens back from full replicas: its share of what they measured."""
        reports = self._fresh_reports()
        rate = sum(report.drain_tokens_per_s or 0.0 for report in reports)
        if rate <= 0:
            return None
        promised: dict[str, int] = {self._origin: sum(sent.ask.tokens for sent in self._sent.values())}
        for report in reports:
            for promise in report.promises:
                if promise.origin != self._origin:
                    promised[promise.origin] = promised.get(promise.origin, 0) + promise.tokens
        total = sum(promised.values())
        share = promised[self._origin] / total if total else 1.0
        return rate * max(share, 1 / len(promised))

    @property
    def ttft_s(self) -> float | None:
        """The objective that replicas have now, the loosest where they differ; None where none has said one.

        It does not change by itself, so reports that are late say it too where there are no others.
        """
        reports = self._fresh_reports() or [seen.report for seen in self._present.values() if seen.report is not None]
        return max((report.ttft_s for report in reports if report.ttft_s is not None), default=None)

    @property
    def ttft_range_s(self) -> tuple[float, float] | None:
        """What a request may name as its own on some replica, the least and the most; None where none has said."""
        reports = self._fresh_reports()
        lows = [report.tightest_ttft_s for report in reports if report.tightest_ttft_s is not None]
        highs = [report.loosest_ttft_s for report in reports if report.loosest_ttft_s is not None]
        return (min(lows), max(highs)) if lows and highs else None

    def prefill_s(self, ask: Ask) -> float:
        """The least time until the first token on the replica that would be soonest; 0 where nothing is known."""
        times = [self._prefill_s(report, ask) for report in self._fresh_reports()]
        return min(times, default=0.0) if len(times) == len(self._seen) else 0.0

    # -- places -------------------------------------------------------------------------------------------------

    def rank(self, ask: Ask, excluded: Collection[str] = ()) -> list[Standing]:
        """Replicas that can ever hold the request and are not told to stop, best first.

        Those that have room first, and of them those that meet the objective; then those of which nothing is known;
        then full ones. Within these, most room first; where room is equal, the longest known prefix.
        """
        standings = [
            self._standing(replica_id, seen.report, ask)
            for replica_id, seen in self._seen.items()
            if replica_id not in excluded and _may_hold(seen.report, ask) and not _is_draining(seen.report)
        ]
        groups: dict[int, list[Standing]] = {}
        for standing in standings:
            groups.setdefault(_group(standing), []).append(standing)
        return [each for group in sorted(groups) for each in self._by_room(groups[group], ask)]

    def place(self, ask: Ask) -> str | None:
        """Picks a replica and debits it until `end`; None where the request must wait."""
        for standing in self.rank(ask, ask.excluded):
            if standing.can_take:
                at_door = not standing.fits
                self._sequence += 1
                sent = _Sent(replica_id=standing.replica_id, ask=ask, at_door=at_door, sequence=self._sequence)
                self._add(sent)
                return standing.replica_id
        return None

    def sequence_of(self, request_id: str) -> int:
        """The number that the request must carry, by which reports say that it is in them; 0 for one never placed."""
        sent = self._sent.get(request_id)
        return 0 if sent is None else sent.sequence

    def order(self, request_id: str) -> list[str]:
        """The replica that was picked for the request, then the others as they rank; empty for one never placed."""
        sent = self._sent.get(request_id)
        if sent is None:
            return []
        others = [standing.replica_id for standing in self.rank(sent.ask, excluded=(sent.replica_id,))]
        return [each for each in (sent.replica_id, *others) if each in self._seen]

    def replica_of(self, request_id: str) -> str | None:
        """Where the request is, as far as is known; None for one never placed."""
        sent = self._sent.get(request_id)
        return None if sent is None else sent.replica_id

    def moved(self, request_id: str, replica_id: str) -> None:
        """The request went to another replica than was picked."""
        sent = self._sent.get(request_id)
        if sent is not None and sent.replica_id != replica_id:
            self._remove(request_id)
            self._add(replace(sent, replica_id=replica_id))

    def begun(self, request_id: str) -> None:
        """The replica has taken the request in."""
        if request_id in self._sent:
            self._sent[request_id].at_door = False

    def end(self, request_id: str) -> None:
        """The request is over, whatever became of it."""
        sent = self._sent.get(request_id)
        seen = self._present.get(sent.replica_id) if sent is not None else None
        report = seen.report if seen is not None else None
        if sent is not None and seen is not None and report is not None and not self._unreported(report, [sent]):
            seen.ended_tokens += sent.ask.tokens
            seen.ended_requests += 1
        self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            there = self._sent_to[sent.replica_id]
            del there[request_id]
            if not there:
                del self._sent_to[sent.replica_id]

    # -- parts --------------------------------------------------------------------------------------------------

    def _is_fresh(self, seen: _Seen) -> bool:
        return seen.report is not None and self._clock() - seen.seen_s <= self._stale_after_s

    def _fresh_reports(self) -> list[HeadroomReport]:
        return [seen.report for seen in self._seen.values() if seen.report is not None and self._is_fresh(seen)]

    def _add(self, sent: _Sent) -> None:
        self._remove(sent.ask.request_id)
        self._sent[sent.ask.request_id] = sent
        self._sent_to.setdefault(sent.replica_id, {})[sent.ask.request_id] = sent

    def _mine(self, replica_id: str) -> list[_Sent]:
        return list(self._sent_to.get(replica_id, {}).values())

    def _own(self, report: HeadroomReport) -> list[Promise]:
        return [promise for promise in report.promises if promise.origin == self._origin]

    def _unreported(self, report: HeadroomReport, mine: list[_Sent]) -> list[_Sent]:
        """Those of `mine` that the report knows nothing of."""
        reported = max((promise.sequence for promise in self._own(report)), default=0)
        return [sent for sent in mine if sent.sequence > reported]

    def _room(self, replica_id: str, mine: list[_Sent]) -> int | None:
        """Tokens that the replica can still promise; below 0 where its door is in use; None if it is not known."""
        seen = self._seen[replica_id]
        if seen.report is None or not self._is_fresh(seen):
            return None
        unreported = sum(sent.ask.tokens for sent in self._unreported(seen.report, mine))
        ended = min(seen.ended_tokens, sum(promise.tokens for promise in self._own(seen.report)))
        return seen.report.kv_capacity_tokens - seen.report.promised_tokens - unreported + ended

    def _free_tokens(self, replica_id: str) -> int:
        report, mine = self._seen[replica_id].report, self._mine(replica_id)
        room = self._room(replica_id, mine)
        if report is None or room is None or self._num_requests(replica_id, report, mine) >= report.max_requests:
            return 0
        return max(0, room)

    def _num_requests(self, replica_id: str, report: HeadroomReport, mine: list[_Sent]) -> int:
        """Requests on the replica and on their way there, those that have ended since it reported not counted."""
        own = sum(promise.requests for promise in self._own(report))
        ended = min(self._seen[replica_id].ended_requests, own)
        reported = sum(promise.requests for promise in report.promises)
        return reported + len(self._unreported(report, mine)) - ended

    def _standing(self, replica_id: str, report: HeadroomReport | None, ask: Ask) -> Standing:
        mine = [sent for sent in self._mine(replica_id) if sent.ask.request_id != ask.request_id]
        at_door = [sent.ask.tokens for sent in mine if sent.at_door]
        room = self._room(replica_id, mine)
        fits = is_late = may_pass = False
        if report is not None and room is not None:
            num_requests = self._num_requests(replica_id, report, mine)
            # Where they wait for one of `max_requests` places a smaller one would not get it sooner.
            is_kv_short = num_requests - len(at_door) < report.max_requests
            may_pass = is_kv_short and ask.tokens < min(at_door, default=0)
            # One request alone may have more than the capacity of many: layers are offloaded for it.
            fits = num_requests == 0 or (num_requests < report.max_requests and ask.tokens <= room)
            is_late = ask.ttft_s is not None and self._prefill_s(report, ask) > ask.ttft_s
            is_late = is_late or (report.slack is not None and report.slack < 0)
        return Standing(
            replica_id=replica_id,
            room_tokens=room,
            fits=fits,
            is_late=is_late,
            num_at_door=len(at_door),
            may_pass=may_pass,
        )

    def _prefill_s(self, report: HeadroomReport, ask: Ask) -> float:
        return (report.waiting_prefill_tokens + ask.prompt_tokens) * (report.prefill_s_per_token or 0.0)

    def _by_room(self, standings: list[Standing], ask: Ask) -> list[Standing]:
        best = max((each.room_tokens for each in standings if each.room_tokens is not None), default=0)

        def key(standing: Standing) -> tuple[Any, ...]:
            report, room = self._seen[standing.replica_id].report, standing.room_tokens
            mine = len(self._mine(standing.replica_id))
            tie = _digest(f"{self._origin}/{standing.replica_id}".encode())  # callers differ in whom they take first
            if report is None or room is None:
                return (1, 0, 0, mine, tie)
            is_equal = room >= best - EQUAL_SHARE * report.kv_capacity_tokens
            matched = len(set(ask.prefixes).intersection(report.prefixes)) if is_equal else 0
            return (0 if is_equal else 1, -matched, -room, mine, tie)

        return sorted(standings, key=key)


def _may_hold(report: HeadroomReport | None, ask: Ask) -> bool:
    # What is too long for the model itself is the request's mistake, which the replica explains.
    return report is None or report.is_model_limit or ask.least_tokens <= report.longest_request_tokens


def _is_draining(report: HeadroomReport | None) -> bool:
    return report is not None and report.is_draining


def _group(standing: Standing) -> int:
    if standing.fits:
        return 1 if standing.is_late else 0
    return 2 if standing.room_tokens is None else 3


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
