"""A replica's door: requests come in in turn, and only those whose KV is sure to find room.

Callers choose a replica by reports, which are late, and several of them choose at once. Here, where all requests of a
replica meet, it is exact: nobody is let in with whom the requests inside might at some step not fit together.

That step is looked for. Every request inside gets a token per step until it has its last one, and gives back all it
has; so what they will hold together is known for every step to come, if none stops early. Its peak is what is promised:
less than the sum of what each has at its own end, since they do not end together.

For the same reason it is known when the first in turn can come in. Until then there may be room that it cannot use, and
whoever can use it without making the first one's turn later may pass: known as backfilling where jobs are scheduled on
a parallel machine (Lifka, "The ANL/IBM SP scheduling system", 1995). The first one's turn only ever comes closer, so
nobody waits for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from deployments.replica.forecast import Course, Footprints, Forecast
from deployments.routing.headroom_report import MAX_ORIGINS, Promise
from selectn_core.errors import EngineOverloaded, EngineUnavailable

_RECENT = 64
# Progress opens the door too, and is looked at this often while somebody waits.
PROGRESS_PERIOD_S = 0.05
# How many behind the first are looked at whether they may pass.
MAX_PASSING = 4


@dataclass(eq=False, kw_only=True)
class Visit:
    """A request on its replica, counted in tokens as KV holds them: at the door (`entered_s` None) or inside.

    `decide(True)`: it may come in; False: it never will.

    It begins with `prompt_tokens` and has `total_tokens` at most; `num_generated` says how far it is.
    """

    origin: str
    sequence: int = 0
    prompt_tokens: int
    total_tokens: int
    decide: Callable[[bool], None] = field(repr=False)
    num_generated: Callable[[], int] = field(default=lambda: 0, repr=False)
    entered_s: float | None = None


class Door:
    """Lets visits in, one after the other. Not thread-safe; `capacity_tokens` is asked at every decision.

    `footprint` is what a request of so many tokens takes of it, which is whole pages; it must always say the same.
    `longest` is what a request may have: until there it is asked now, and not when a long one comes.
    """

    def __init__(
        self,
        capacity_tokens: Callable[[], int],
        footprint: Callable[[int], int] = lambda num_tokens: num_tokens,
        *,
        max_requests: int,
        max_waiting: int,
        longest: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity_tokens, self._footprints, self._clock = capacity_tokens, Footprints(footprint), clock
        self._footprints.know(longest)
        self._max_requests, self._max_waiting = max_requests, max_waiting
        self._waiting: deque[Visit] = deque()
        self._inside: dict[Visit, None] = {}
        self._stays: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens, seconds inside
        self._looked_s = -PROGRESS_PERIOD_S
        self._last_forecast = Forecast.of((), self._footprints)
        self.is_closed = False

    def knock(self, visit: Visit) -> None:
        """Queues the visit, and lets it in at once if it can.

        Raises EngineUnavailable behind a closed door, EngineOverloaded where `max_waiting` wait already.
        """
        if self.is_closed:
            raise EngineUnavailable("this replica is stopping; send the request again")
        self._waiting.append(visit)
        self.let_in()
        if len(self._waiting) > self._max_waiting:
            self._waiting.remove(visit)
            raise EngineOverloaded(
                f"{len(self._inside)} requests are running and {self._max_waiting} are waiting for KV cache "
                f"(batch.max_requests={self._max_requests}, batch.max_waiting={self._max_waiting})"
            )

    def leave(self, visit: Visit) -> None:
        """The visit is over, or has given up waiting. Idempotent."""
        if visit in self._inside:
            assert visit.entered_s is not None
            del self._inside[visit]
            self._stays.append((self._footprints.of(visit.total_tokens), self._clock() - visit.entered_s))
        elif visit in self._waiting:
            self._waiting.remove(visit)
        self.let_in()

    def let_in(self) -> None:
        """Lets in whom there is room for; call it when the capacity may have grown, or requests are further."""
        while (visit := self._next()) is not None:
            self._waiting.remove(visit)
            visit.entered_s = self._clock()
            self._inside[visit] = None
            visit.decide(True)

    def progressed(self) -> None:
        """Somebody inside has more tokens: the step at which most is held may now leave room for who waits."""
        now_s = self._clock()
        if self._waiting and now_s - self._looked_s >= PROGRESS_PERIOD_S:
            self._looked_s = now_s
            self.let_in()

    def close(self) -> None:
        """Turns away who waits and whoever comes; who is inside may finish. Idempotent."""
        self.is_closed = True
        while self._waiting:
            self._waiting.popleft().decide(False)

    def _next(self) -> Visit | None:
        """Who may come in now: the first in turn, or else who does not delay it."""
        if not self._waiting:
            return None
        first = self._waiting[0]
        if not self._inside:  # alone it may have all there is: more layers are offloaded for it
            return first
        if len(self._inside) >= self._max_requests:
            return None
        inside, capacity = self._forecast(), self._capacity_tokens()
        beside = inside.beside(_course(first))
        if beside.peak <= capacity:
            self._last_forecast = beside
            return first
        turn: int | None = None
        for visit in islice(self._waiting, 1, 1 + MAX_PASSING):
            beside = inside.beside(_course(visit))
            if beside.peak > capacity:
                continue
            if turn is None:
                turn = inside.turn_of(_course(first), capacity, self._max_requests)
            if beside.may_begin(_course(first), turn, capacity, self._max_requests):
                self._last_forecast = beside
                return visit
        return None

    def _forecast(self) -> Forecast:
        """Of the visits inside as far as they are now; the last one, where nothing has changed since."""
        courses = tuple(_course(visit) for visit in self._inside)
        if courses != self._last_forecast.courses:
            self._last_forecast = Forecast.of(courses, self._footprints)
        return self._last_forecast

    # -- what a report says -------------------------------------------------------------------------------------

    @property
    def inside_tokens(self) -> int:
        """What the visits inside will hold at most together."""
        return self._forecast().peak

    @property
    def waiting(self) -> tuple[Visit, ...]:
        """Those at the door, the first in turn first."""
        return tuple(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_prompt_tokens(self) -> int:
        return sum(visit.prompt_tokens for visit in self._waiting)

    def promises(self) -> tuple[Promise, ...]:
        """Who was promised what, those at the door included: the largest by name, the rest together as ""."""
        held = [*zip(self._inside, self._forecast().at_peak(), strict=True)]
        held += [(visit, self._footprints.of(visit.total_tokens)) for visit in self._waiting]
        promises: dict[str, Promise] = {}
        for visit, tokens in held:
            promises[visit.origin] = _sum(visit, promises.get(visit.origin), tokens)
        by_size = sorted(promises.values(), key=lambda promise: (-promise.tokens, promise.origin))
        named, rest = by_size[:MAX_ORIGINS], by_size[MAX_ORIGINS:]
        if rest:
            tokens, requests = sum(each.tokens for each in rest), sum(each.requests for each in rest)
            named.append(Promise(origin="", tokens=tokens, requests=requests))
        return tuple(named)

    def drain_tokens_per_s(self) -> float | None:
        """At which a full replica gives promised tokens back; None before the first request has left.

        By Little's law what is inside over how long it stays, both as recently measured: so it is known without the
        replica ever having been full.
        """
        tokens = sum(each[0] for each in self._stays)
        token_s = sum(each[0] * each[1] for each in self._stays)
        if not tokens or token_s <= 0:
            return None
        inside = sum(self._footprints.of(visit.total_tokens) for visit in self._inside)
        packing = inside / self.inside_tokens if inside else 1.0  # tokens at their ends, per token held at the peak
        full = min(packing * self._capacity_tokens(), self._max_requests * tokens / len(self._stays))
        return full * tokens / token_s

    def check_integrity(self) -> None:
        """Raises AssertionError where someone waits who may come in, or more wait than may."""
        assert not set(self._inside).intersection(self._waiting), "a visit is inside and at the door"
        assert self._next() is None, "there is room, and somebody waits"
        assert len(self._waiting) <= self._max_waiting, "more wait than may"


def _course(visit: Visit) -> Course:
    tokens = visit.prompt_tokens + visit.num_generated()
    return Course(tokens, max(0, visit.total_tokens - tokens))


def _sum(visit: Visit, promise: Promise | None, tokens: int) -> Promise:
    if promise is None:
        return Promise(origin=visit.origin, tokens=tokens, requests=1, sequence=visit.sequence)
    return Promise(
        origin=visit.origin,
        tokens=promise.tokens + tokens,
        requests=promise.requests + 1,
        sequence=max(promise.sequence, visit.sequence),
    )
