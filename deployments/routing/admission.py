"""Admission: a request goes to a replica now, waits its turn until a deadline, or is told when to return.

The queue is this ingress's own. That several of them agree is the replicas' doing (deployments/replica/door.py), and
that each gets its share of full replicas too: every ingress may have one request waiting at each door.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from deployments.api.errors import ApiError, late, overloaded, too_large, unavailable
from deployments.messages import Priority
from deployments.routing.arrivals import Arrivals
from deployments.routing.board import Board
from deployments.routing.fair_queue import Entry, FairQueue, QueueFull
from deployments.routing.headroom_report import Ask
from deployments.routing.offered import Offered
from deployments.routing.shared_board import SharedBoard

MAX_RETRY_AFTER_S = 60.0
# A prompt whose prefill alone takes up the objective may wait this share of it: it is late already, not by the queue.
LEAST_WAIT_SHARE = 0.25
# What it lately took from a place to the first text, beyond the prefill: of so many requests, so many percent.
NUM_STARTS, START_PERCENT = 64, 95
# How many requests end within a time varies by about the root of their number: by so many such roots fewer may do so.
# Counted for those that are to be served before the one in question; the next one is given the chance. Where hardly
# anybody may wait it would otherwise be refused as well, and the places fall to whoever asks most often.
SPREADS = 1.0
# How many that cannot be placed, each smaller than the one before, are passed by at most in search of one that can.
MAX_PASSED_BY = 4

# By where they must not go, and their model: one that found no place, and is not known to be larger than another.
InVain = dict[tuple[frozenset[str], str], Ask]


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """How many may wait, how long at most, and whether one that will miss its TTFT objective is refused instead."""

    max_queued_requests: int
    timeout_s: float
    refuse_late: bool


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A request that wants a place: since when, for whom, how urgently, and where it must not go again."""

    ask: Ask
    key: str
    priority: Priority
    arrived_s: float
    excluded: frozenset[str] = frozenset()
    has_waited: bool = False
    retried_s: float | None = None

    def again(self, excluded: Collection[str] = ()) -> Claim:
        """The claim of a request that had a place and was not let in: it is in front of those that came later."""
        return replace(self, has_waited=True, excluded=self.excluded.union(excluded))

    def after_death(self, replica_id: str, now_s: float) -> Claim:
        """The claim of a request whose replica died: late or not, it is run on another."""
        return replace(self.again((replica_id,)), retried_s=now_s)


@dataclass(eq=False, kw_only=True)
class _Waiter:
    claim: Claim
    deadline_s: float
    placed: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def has_place(self) -> bool:
        return self.placed.done() and not self.placed.cancelled() and self.placed.exception() is None

    def fail(self, error: ApiError) -> None:
        if not self.placed.done():
            self.placed.set_exception(error)


class Turn:
    """A place on a replica. `end` gives it back; call it always, more than once if need be.

    `replica_id` is where admission has placed the request, and from its end on where the router had sent it.
    """

    def __init__(self, admission: Admission, entry: Entry[_Waiter], replica_id: str, sequence: int) -> None:
        self._admission = admission
        self._unbegun: Entry[_Waiter] | None = entry
        self.claim, self.deadline_s = entry.item.claim, entry.item.deadline_s
        self.replica_id, self.sequence = replica_id, sequence
        self._begun_s = 0.0

    def begun(self) -> None:
        """The replica has let the request in."""
        self._begun_s, self._unbegun = self._admission.now_s, None
        self._admission.on_board(lambda board: board.begun(self.claim.ask.request_id))

    def started(self) -> None:
        """The request's first text is there."""
        self._admission.has_started(self.claim.ask, self._admission.now_s - self._begun_s)

    def end(self) -> None:
        """The request is over, or has lost its place."""
        unbegun, self._unbegun = self._unbegun, None
        if unbegun is not None:
            self._admission.refund(unbegun)
        self._admission.on_board(self._leave)

    def _leave(self, board: Board) -> None:
        request_id = self.claim.ask.request_id
        self.replica_id = board.replica_of(request_id) or self.replica_id
        board.end(request_id)


class Admission:
    """The queue in front of the replicas. All methods belong to one event loop, that of the ingress."""

    def __init__(
        self, shared: SharedBoard, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shared, self._config, self._clock = shared, config, clock
        self._queue: FairQueue[_Waiter] = FairQueue(config.max_queued_requests)
        self._retried: list[_Waiter] = []  # in the order of `retried_s`: their replicas have died
        self._arrivals = Arrivals(clock)
        self._starts_s: deque[float] = deque(maxlen=NUM_STARTS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self.origin = shared.origin
        self.offered = Offered()

    @property
    def now_s(self) -> float:
        return self._clock()

    def claim(self, ask: Ask, *, key: str, priority: Priority) -> Claim:
        """The claim of a request that comes now."""
        return Claim(ask=ask, key=key, priority=priority, arrived_s=self._clock())

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._retried)

    @property
    def ttft_s(self) -> float | None:
        """The objective that replicas have now; None where none has said one."""
        with self.shared.locked() as board:
            return board.ttft_s

    @property
    def ttft_range_s(self) -> tuple[float, float] | None:
        """From what to what a request's own objective may be; None where no replica has said it."""
        with self.shared.locked() as board:
            return board.ttft_range_s

    async def enter(self, claim: Claim) -> Turn:
        """Returns when the request has a place. Raises ApiError: 503 if none can ever have it, 429 if not in time."""
        with self.counting(claim):
            return await self._enter(claim)

    @contextlib.contextmanager
    def counting(self, claim: Claim) -> Iterator[None]:
        """Counts the request as offered where this block, before an engine has it, is the end of it."""
        try:
            yield
        except ApiError as error:
            self.offered.refused(error)
            raise
        except asyncio.CancelledError:
            self.offered.given_up(claim.ask, self._clock() - claim.arrived_s)
            raise

    async def _enter(self, claim: Claim) -> Turn:
        self._listen()
        waiter = _Waiter(claim=claim, deadline_s=self._deadline_s(claim))
        if claim.has_waited and waiter.deadline_s <= self._clock():
            raise self.overdue(claim)
        entry = Entry(item=waiter, key=claim.key, priority=claim.priority, tokens=claim.ask.tokens)
        if not claim.has_waited:
            self._arrivals.add((claim.priority, claim.key), claim.ask.tokens)
        self._line_up(entry)
        try:
            self._pump()
            if not waiter.placed.done():
                self._refuse_what_is_hopeless(entry)
            async with asyncio.timeout(max(0.0, waiter.deadline_s - self._clock())):
                replica_id = await waiter.placed
        except BaseException as error:
            self._give_up(entry)
            self.on_board(lambda board: board.end(claim.ask.request_id))
            if isinstance(error, TimeoutError):
                raise self.overdue(claim) from None
            raise
        with self.shared.locked() as board:
            sequence = board.sequence_of(claim.ask.request_id)
        return Turn(self, entry, replica_id, sequence)

    def refund(self, entry: Entry[_Waiter]) -> None:
        """A request had a place, and was not begun there: its key is not charged for it."""
        if entry.item.claim.retried_s is None:
            self._queue.refund(entry)

    def on_board(self, change: Callable[[Board], None]) -> None:
        """Changes the board, and lets in whom that makes room for."""
        with self.shared.locked() as board:
            change(board)
        self._pump()

    def has_started(self, ask: Ask, seconds: float) -> None:
        """A request's first text is there, so long after it was let in."""
        with self.shared.locked() as board:
            prefill_s = board.prefill_s(ask)
        self._starts_s.append(max(0.0, seconds - prefill_s))

    async def news(self, at_most_s: float) -> None:
        """Returns when a replica has reported or gone."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._news.wait()

    def overdue(self, claim: Claim) -> ApiError:
        """What a request is told whose deadline has passed before a replica has begun it."""
        with self.shared.locked() as board:
            is_somebody_there = board.has_model(claim.ask.model)
        if not is_somebody_there:
            return unavailable()
        if self._config.refuse_late and claim.ask.ttft_s is not None:
            return late(claim.ask.ttft_s, self._retry_after_s(claim.ask.tokens))
        return overloaded(retry_after_s=self._retry_after_s(claim.ask.tokens))

    # -- parts --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.shared.listen(self._on_news_from_any_thread)

    def _on_news_from_any_thread(self) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is this ingress
            self._loop.call_soon_threadsafe(self._on_news)

    def _on_news(self) -> None:
        self._news.set()
        self._pump()

    def _deadline_s(self, claim: Claim) -> float:
        wait_s, ttft_s = self._config.timeout_s, claim.ask.ttft_s
        if claim.retried_s is not None:
            return claim.retried_s + wait_s
        if self._config.refuse_late and ttft_s is not None:
            with self.shared.locked() as board:
                start_s = board.prefill_s(claim.ask) + self._start_s()
            wait_s = min(wait_s, max(ttft_s - start_s, LEAST_WAIT_SHARE * ttft_s))
        return claim.arrived_s + wait_s

    def _start_s(self) -> float:
        """From a place to the first text, beyond the prefill at its best: the step that runs, calls, threads."""
        ordered = sorted(self._starts_s)
        return ordered[len(ordered) * START_PERCENT // 100] if ordered else 0.0

    def _refuse_what_is_hopeless(self, entry: Entry[_Waiter]) -> None:
        waiter, claim, ttft_s = entry.item, entry.item.claim, entry.item.claim.ask.ttft_s
        if self._config.max_queued_requests == 0 and claim.retried_s is None:
            raise self._full()
        if claim.has_waited or not self._config.refuse_late or ttft_s is None:
            return
        free, rate = self._free_tokens_and_rate()
        if rate is None:
            return
        # If it had to wait until its deadline, could all that would be before it be served by then?
        longest_s = waiter.deadline_s - self._clock()
        before = self._queue.tokens_before(entry, self._arrivals.expected(longest_s)) + self._retried_tokens
        spread = SPREADS * math.sqrt(before * entry.tokens)
        if before + spread + entry.tokens - free > rate * longest_s:
            raise late(ttft_s, self._retry_after_s(0, beyond_s=longest_s))

    def _free_tokens_and_rate(self) -> tuple[int, float | None]:
        """Tokens that are free for those who wait here, below 0 where more are promised already; tokens/s to come."""
        with self.shared.locked() as board:
            return board.free_tokens() - board.door_tokens(), board.drain_tokens_per_s()

    @property
    def _retried_tokens(self) -> int:
        return sum(waiter.claim.ask.tokens for waiter in self._retried)

    def _line_up(self, entry: Entry[_Waiter]) -> None:
        """A retried one comes before the queue, and does not count there: it may find no place where others do."""
        claim = entry.item.claim
        if claim.retried_s is not None:
            insort(self._retried, entry.item, key=lambda waiter: waiter.claim.retried_s or 0.0)
            return
        # Where nobody may wait, one may still find a place at once.
        is_first = claim.has_waited or self._config.max_queued_requests == 0
        try:
            victim = self._queue.push(entry, front=is_first)
        except QueueFull:
            raise self._full() from None
        if victim is not None:
            victim.item.fail(self._full())

    def _give_up(self, entry: Entry[_Waiter]) -> None:
        """Nobody waits for the entry any more, or takes its place."""
        if entry.item.has_place:
            self.refund(entry)
        elif entry.item in self._retried:
            self._retried.remove(entry.item)
        else:
            self._queue.discard(entry)

    def _full(self) -> ApiError:
        return overloaded(retry_after_s=self._retry_after_s(0))

    def _pump(self) -> None:
        """Places whoever can be placed: those that are retried, each where it may go, then those of the queue."""
        in_vain: InVain = {}
        self._retried = [waiter for waiter in self._retried if not self._settle(waiter, in_vain)]
        self._pump_queue()

    def _pump_queue(self) -> None:
        """Places the head, or where it cannot be, smaller ones of its key (deployments/replica/door.py)."""
        below_tokens, num_passed_by = math.inf, 0
        while num_passed_by <= MAX_PASSED_BY and (entry := self._queue.head(below_tokens)) is not None:
            if not self._settle(entry.item):
                below_tokens, num_passed_by = entry.tokens, num_passed_by + 1
            elif entry.item.has_place:
                self._queue.serve(entry)
                below_tokens, num_passed_by = math.inf, 0
            else:
                self._queue.discard(entry)

    def _settle(self, waiter: _Waiter, in_vain: InVain | None = None) -> bool:
        """Places the waiter if it can be placed now. Whether it waits no more: placed, refused, or cancelled.

        `in_vain`: those of this pass that found no place. When a replica dies many ask at once, most of the same size.
        """
        if not waiter.placed.done():
            claim, kind = waiter.claim, (waiter.claim.excluded, waiter.claim.ask.model)
            smaller = in_vain.get(kind) if in_vain is not None else None
            with self.shared.locked() as board:
                is_in_vain = smaller is not None and _needs_less(smaller, claim.ask)
                replica_id = None if is_in_vain else board.place(claim.ask, claim.excluded)
                error = None if replica_id is not None else _never(board, claim.ask)
            if in_vain is not None and replica_id is None and (smaller is None or _needs_less(claim.ask, smaller)):
                in_vain[kind] = claim.ask
            if replica_id is not None:
                waiter.placed.set_result(replica_id)
            elif error is not None:
                waiter.fail(error)
        return waiter.placed.done()

    def _retry_after_s(self, tokens: int, *, beyond_s: float = 0.0) -> float:
        """When a request of `tokens` would be due, all that wait now served before it; less what it would wait."""
        queued = self._queue.num_tokens + self._retried_tokens
        free, rate = self._free_tokens_and_rate()
        if rate is None:
            return 1.0
        wait_s = (queued + tokens - free) / rate - beyond_s
        return float(min(MAX_RETRY_AFTER_S, max(1.0, math.ceil(wait_s))))


def _needs_less(one: Ask, other: Ask) -> bool:
    """Or as much: where the one finds no place, the other finds none either."""
    return one.tokens <= other.tokens and one.least_tokens <= other.least_tokens


def _never(board: Board, ask: Ask) -> ApiError | None:
    """Why no replica that there is will ever have the request; None where one may."""
    if board.replica_ids and not board.has_model(ask.model):
        return unavailable(f"no replica serves the model '{ask.model}' any more; retry later")
    if not board.could_hold(ask):
        return too_large(ask.least_tokens, board.longest_request_tokens(ask.model) or 0)
    return None
