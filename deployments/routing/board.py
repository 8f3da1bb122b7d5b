"""A caller's board of the replicas: what they have reported, what it has sent since, and where a request should go.

What replicas have promised a caller (an ingress) knows from their reports; what it has sent since, it knows itself. A
report says up to which of its requests they are in it, so none is counted twice and no two clocks are compared.

What decides is added up when a report or a request comes or goes, so that ranking takes as long as there are replicas,
however many requests they have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.tallies import NONE_SENT, Mine, Promised, Seen, Sent

# A caller may have one request waiting at a full replica's door: the next one is there when the last one leaves. And
# where that waits for KV, one more that is smaller: there may be room for it before there is for the other.
DOOR_REQUESTS, PASSING_REQUESTS = 1, 1
# Headroom that differs by less than this share of a replica's capacity is equal: then prefixes decide.
EQUAL_SHARE = 0.1
# Serve lists only replicas that run, and for a moment none that takes a new user_config: about 0.2 s.
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


class Board:
    """One caller's view of the replicas. Not thread-safe."""

    def __init__(self, origin: str, *, stale_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._origin, self._stale_after_s, self._clock = origin, stale_after_s, clock
        self._seen: dict[str, Seen] = {}
        self._away: dict[str, tuple[Seen, float]] = {}  # and when it left
        self._sent: dict[str, Sent] = {}
        self._sent_to: dict[str, Mine] = {}  # the same by replica
        self._sequence = 0
        self._sent_tokens = self._door_tokens = 0
        self._promised = Promised(origin)

    # -- what is known ------------------------------------------------------------------------------------------

    def observe(self, reports: Mapping[str, HeadroomReport | None]) -> None:
        """The replicas that run now, with their latest reports. Any other is away for a moment, and then gone.

        One that is away is sent nothing. But where it has reported it is expected back: nothing that was known of it is
        forgotten, and no request is told that there is nobody.
        """
        now_s, before = self._clock(), self._present()
        left = {replica_id: seen for replica_id, seen in before.items() if replica_id not in reports}
        self._away = {
            replica_id: self._away.get(replica_id, (seen, now_s))
            for replica_id, seen in left.items()
            if seen.report is not None and not seen.report.is_draining
        }
        self._seen = {}
        for replica_id, report in reports.items():
            seen = before.get(replica_id)
            if seen is not None and (report is None or seen.report is report or seen.report == report):
                self._seen[replica_id] = seen
                continue
            self._seen[replica_id] = seen = Seen(replica_id, report, now_s, self._origin)
            if replica_id in self._sent_to:
                self._sent_to[replica_id].has_reported(seen.own_sequence)

    def forget(self, replica_id: str) -> None:
        """The replica has died."""
        self._seen.pop(replica_id, None)
        self._away.pop(replica_id, None)

    @property
    def replica_ids(self) -> frozenset[str]:
        """Those that run; where none does, those that are away for a moment."""
        return frozenset(self._seen or self._present())

    def models(self) -> dict[str, HeadroomReport]:
        """The models that replicas serve, as far as they have said, by name: of one name who loaded it last."""
        found: dict[str, HeadroomReport] = {}
        for seen in (self._seen or self._present()).values():
            report = seen.report
            if report is None or not report.model:
                continue
            known = found.get(report.model)
            if known is None or report.model_created_unix_s > known.model_created_unix_s:
                found[report.model] = report
        return found

    @property
    def num_unnamed(self) -> int:
        """Replicas that have not said what they serve."""
        replicas = self._seen or self._present()
        return sum(seen.report is None or not seen.report.model for seen in replicas.values())

    def has_model(self, name: str) -> bool:
        """Whether some replica serves it, or may, as far as is known."""
        return any(_may_serve(seen.report, name) for seen in self._present().values())

    def longest_request_tokens(self, model: str = "") -> int | None:
        """What the longest request on any replica may have; None while that is not known of all of them."""
        reports = [seen.report for seen in self._present().values() if _may_serve(seen.report, model)]
        known = [report.longest_request_tokens for report in reports if report is not None]
        return max(known) if known and len(known) == len(reports) else None

    def could_hold(self, ask: Ask) -> bool:
        """Whether some replica may, as far as is known, have the request at some time; or none has its model."""
        places = [seen.report for seen in self._present().values() if _may_serve(seen.report, ask.model)]
        return not places or any(_may_hold(report, ask) for report in places)

    def free_tokens(self) -> int:
        """Tokens that the replicas can still promise, as far as they are known to; none where no more requests fit."""
        return sum(self._free_tokens(replica_id) for replica_id in self._seen)

    def door_tokens(self) -> int:
        """Tokens of this caller's requests that wait at the doors of full replicas."""
        return self._door_tokens

    def drain_tokens_per_s(self) -> float | None:
        """At which this caller gets tokens back from full replicas: its share of what they measured."""
        fresh = self._fresh_reports()
        rate = sum(report.drain_tokens_per_s or 0.0 for report in fresh.values())
        if rate <= 0:
            return None
        self._promised.update(fresh)
        total = self._sent_tokens + self._promised.tokens
        share = self._sent_tokens / total if total else 1.0
        return rate * max(share, 1 / (1 + self._promised.num_origins))

    @property
    def ttft_s(self) -> float | None:
        """The objective that replicas have now, the loosest where they differ; None where none has said one.

        It does not change by itself, so reports that are late say it too where there are no others.
        """
        reports = self._fresh_reports().values() or [
            seen.report for seen in self._present().values() if seen.report is not None
        ]
        return max((report.ttft_s for report in reports if report.ttft_s is not None), default=None)

    @property
    def ttft_range_s(self) -> tuple[float, float] | None:
        """What a request may name as its own on some replica, the least and the most; None where none has said."""
        reports = self._fresh_reports().values()
        lows = [report.tightest_ttft_s for report in reports if report.tightest_ttft_s is not None]
        highs = [report.loosest_ttft_s for report in reports if report.loosest_ttft_s is not None]
        return (min(lows), max(highs)) if lows and highs else None

    def prefill_s(self, ask: Ask) -> float:
        """The least time until the first token on the replica that would be soonest; 0 where nothing is known."""
        times = [_prefill_s(report, ask) for report in self._fresh_reports().values()]
        return min(times, default=0.0) if len(times) == len(self._seen) else 0.0

    # -- places -------------------------------------------------------------------------------------------------

    def rank(self, ask: Ask, excluded: Collection[str] = ()) -> list[Standing]:
        """Replicas that can ever hold the request and are not told to stop, best first.

        Those that have room first, and of them those that meet the objective; then those of which nothing is known;
        then full ones. Within these, most room first; where room is equal, the longest known prefix.
        """
        return list(self._ranked(self._standings(ask, excluded), ask))

    def place(self, ask: Ask) -> str | None:
        """Picks a replica and debits it until `end`; None where the request must wait."""
        standings = self._standings(ask, ask.excluded)
        if not any(standing.can_take for standing in standings):
            return None
        standing = next(standing for standing in self._ranked(standings, ask) if standing.can_take)
        self._sequence += 1
        replica_id, at_door = standing.replica_id, not standing.fits
        self._add(Sent(replica_id=replica_id, ask=ask, at_door=at_door, sequence=self._sequence))
        return replica_id

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
        sent = self._sent.get(request_id)
        if sent is not None and sent.at_door:
            self._sent_to[sent.replica_id].begun(request_id)
            self._door_tokens -= sent.ask.tokens

    def end(self, request_id: str) -> None:
        """The request is over, whatever became of it."""
        sent = self._sent.get(request_id)
        seen = self._present().get(sent.replica_id) if sent is not None else None
        if sent is not None and seen is not None and seen.report is not None and sent.sequence <= seen.own_sequence:
            seen.ended_tokens += sent.ask.tokens
            seen.ended_requests += 1
        self._remove(request_id)

    # -- parts --------------------------------------------------------------------------------------------------

    def _add(self, sent: Sent) -> None:
        self._remove(sent.ask.request_id)
        self._sent[sent.ask.request_id] = sent
        seen, there = self._present().get(sent.replica_id), self._sent_to.get(sent.replica_id)
        if there is None:
            there = self._sent_to[sent.replica_id] = Mine(reported=seen.own_sequence if seen is not None else 0)
        there.add(sent)
        self._sent_tokens += sent.ask.tokens
        self._door_tokens += sent.ask.tokens if sent.at_door else 0

    def _remove(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            there = self._sent_to[sent.replica_id]
            there.remove(request_id)
            if not there.requests:
                del self._sent_to[sent.replica_id]
            self._sent_tokens -= sent.ask.tokens
            self._door_tokens -= sent.ask.tokens if sent.at_door else 0

    def _present(self) -> dict[str, Seen]:
        """The replicas that run, and those that have left so lately that they may be back."""
        if not self._away:
            return self._seen
        now_s = self._clock()
        lately = {replica_id: seen for replica_id, (seen, left_s) in self._away.items() if now_s < left_s + AWAY_S}
        return {**lately, **self._seen}

    def _is_fresh(self, seen: Seen, now_s: float) -> bool:
        return seen.report is not None and now_s - seen.seen_s <= self._stale_after_s

    def _fresh_reports(self) -> dict[str, HeadroomReport]:
        """By replica."""
        now_s = self._clock()
        return {
            replica_id: seen.report
            for replica_id, seen in self._seen.items()
            if seen.report is not None and self._is_fresh(seen, now_s)
        }

    def _room(self, seen: Seen, unreported_tokens: int, now_s: float) -> int | None:
        """Tokens that the replica can still promise; below 0 where its door is in use; None if it is not known."""
        if seen.report is None or not self._is_fresh(seen, now_s):
            return None
        ended = min(seen.ended_tokens, seen.own_tokens)
        return seen.report.kv_capacity_tokens - seen.promised_tokens - unreported_tokens + ended

    def _free_tokens(self, replica_id: str) -> int:
        seen, mine = self._seen[replica_id], self._sent_to.get(replica_id, NONE_SENT)
        room = self._room(seen, mine.unreported_tokens, self._clock())
        if seen.report is None or room is None:
            return 0
        return max(0, room) if _num_requests(seen, mine.num_unreported) < seen.report.max_requests else 0

    def _standings(self, ask: Ask, excluded: Collection[str]) -> list[Standing]:
        now_s = self._clock()
        return [
            self._standing(replica_id, seen, ask, now_s)
            for replica_id, seen in self._seen.items()
            if replica_id not in excluded and _may_hold(seen.report, ask) and not _is_draining(seen.report)
        ]

    def _standing(self, replica_id: str, seen: Seen, ask: Ask, now_s: float) -> Standing:
        mine = self._sent_to.get(replica_id, NONE_SENT)
        at_door = mine.at_door
        num_unreported, unreported_tokens = mine.num_unreported, mine.unreported_tokens
        own = mine.requests.get(ask.request_id)
        if own is not None:  # as if it were not there yet
            at_door = {key: tokens for key, tokens in at_door.items() if key != ask.request_id}
            if own.sequence > mine.reported:
                num_unreported, unreported_tokens = num_unreported - 1, unreported_tokens - own.ask.tokens
        report, room = seen.report, self._room(seen, unreported_tokens, now_s)
        fits = is_late = may_pass = False
        if report is not None and room is not None:
            num_requests = _num_requests(seen, num_unreported)
            # Where they wait for one of `max_requests` places a smaller one would not get it sooner.
            is_kv_short = num_requests - len(at_door) < report.max_requests
            may_pass = is_kv_short and ask.tokens < min(at_door.values(), default=0)
            # One request alone may have more than the capacity of many: layers are offloaded for it.
            fits = num_requests == 0 or (num_requests < report.max_requests and ask.tokens <= room)
            is_late = ask.ttft_s is not None and _prefill_s(report, ask) > ask.ttft_s
            is_late = is_late or (report.slack is not None and report.slack < 0)
        return Standing(
            replica_id=replica_id,
            room_tokens=room,
            fits=fits,
            is_late=is_late,
            num_at_door=len(at_door),
            may_pass=may_pass,
        )

    def _ranked(self, standings: list[Standing], ask: Ask) -> Iterator[Standing]:
        """The best first, sorted as far as they are asked for."""
        groups: dict[int, list[Standing]] = {}
        for standing in standings:
            groups.setdefault(_group(standing), []).append(standing)
        for group in sorted(groups):
            yield from self._by_room(groups[group], ask)

    def _by_room(self, standings: list[Standing], ask: Ask) -> list[Standing]:
        best = max((each.room_tokens for each in standings if each.room_tokens is not None), default=0)
        prefixes = set(ask.prefixes)

        def key(standing: Standing) -> tuple[Any, ...]:
            seen, room = self._seen[standing.replica_id], standing.room_tokens
            num_mine = len(self._sent_to.get(standing.replica_id, NONE_SENT).requests)
            if seen.report is None or room is None:
                return (1, 0, 0, num_mine, seen.tie)
            is_equal = room >= best - EQUAL_SHARE * seen.report.kv_capacity_tokens
            matched = len(prefixes & seen.prefixes) if is_equal else 0
            return (0 if is_equal else 1, -matched, -room, num_mine, seen.tie)

        return sorted(standings, key=key)


def _num_requests(seen: Seen, num_unreported: int) -> int:
    """Requests on the replica and on their way there, those that have ended since it reported not counted."""
    return seen.num_requests + num_unreported - min(seen.ended_requests, seen.own_requests)


def _prefill_s(report: HeadroomReport, ask: Ask) -> float:
    return (report.waiting_prefill_tokens + ask.prompt_tokens) * (report.prefill_s_per_token or 0.0)


def _may_serve(report: HeadroomReport | None, model: str) -> bool:
    return report is None or not model or not report.model or report.model == model


def _may_hold(report: HeadroomReport | None, ask: Ask) -> bool:
    # What is too long for the model itself is the request's mistake, which the replica explains.
    return report is None or (
        _may_serve(report, ask.model) and (report.is_model_limit or ask.least_tokens <= report.longest_request_tokens)
    )


def _is_draining(report: HeadroomReport | None) -> bool:
    return report is not None and report.is_draining


def _group(standing: Standing) -> int:
    if standing.fits:
        return 1 if standing.is_late else 0
    return 2 if standing.room_tokens is None else 3
