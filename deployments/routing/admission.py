"""Admission: a request goes to a replica now, waits its turn until a deadline, or is told when to return.

The queue is this ingress's own. That several of them agree is the replicas' doing (deployments/replica/door.py), and
that each gets its share of full replicas too: every ingress may have one request waiting at each door.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deployments.api.errors import ApiError, late, overloaded, too_large, unavailable
from deployments.messages import Priority
from deployments.routing.admission_events import AdmissionEvents, Unheard
from deployments.routing.admission_facts import AdmissionReason, RefusalFacts
from deployments.routing.arrivals import Arrivals
from deployments.routing.ask import Ask
from deployments.routing.board import Board
from deployments.routing.fair_queue import FairQueue, QueueFull
from deployments.routing.offered import Offered
from deployments.routing.request_log import RequestLogger
from deployments.routing.shared_board import SharedBoard
from selectn_core.decision_log import DecisionLog

logger = logging.getLogger(__name__)

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


@dataclass(eq=False, kw_only=True)
class _Waiter:
    """A request that waits for a place now, until its deadline; each time it does it is another."""

    ask: Ask
    deadline_s: float
    placed: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def key(self) -> str:
        return self.ask.key

    @property
    def priority(self) -> Priority:
        return self.ask.priority

    @property
    def tokens(self) -> int:
        return self.ask.tokens

    @property
    def has_place(self) -> bool:
        return self.placed.done() and not self.placed.cancelled() and self.placed.exception() is None

    def fail(self, error: ApiError) -> None:
        if not self.placed.done():
            self.placed.set_exception(error)


class Turn:
    """A request's place on a replica, from when it is given to its `end`, which gives it back.

    Call `end` always, more than once if need be.

    `replica_id` is where admission has placed the request, and from its end on where the router had sent it.
    """

    def __init__(self, admission: Admission, waiter: _Waiter, replica_id: str, sequence: int) -> None:
        self._admission = admission
        self._unbegun: _Waiter | None = waiter
        self.ask, self.deadline_s = waiter.ask, waiter.deadline_s
        self.replica_id, self.sequence = replica_id, sequence
        self._begun_s = 0.0

    def begun(self) -> None:
        """The replica has let the request in."""
        if self._unbegun is not None:
            self._admission.events.admitted(self._admission.now_s - self.ask.arrived_s)
        self._begun_s, self._unbegun = self._admission.now_s, None
        self._admission.on_board(lambda board: board.begun(self.ask.request_id))

    def started(self) -> None:
        """The request's first text is there."""
        self._admission.has_started(self.ask, self._admission.now_s - self._begun_s)

    def end(self) -> None:
        """The request is over, or has lost its place."""
        unbegun, self._unbegun = self._unbegun, None
        if unbegun is not None:
            self._admission.refund(unbegun)
        self._admission.on_board(self._leave)

    def _leave(self, board: Board) -> None:
        request_id = self.ask.request_id
        self.replica_id = board.replica_of(request_id) or self.replica_id
        board.end(request_id)


class Admission:
    """The queue in front of the replicas. All methods belong to one event loop, that of the ingress."""

    def __init__(
        self, shared: SharedBoard, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.events: AdmissionEvents = Unheard()
        self.decisions = DecisionLog("admission")
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

    async def enter(self, ask: Ask) -> Turn:
        """Returns when the request has a place. Raises ApiError: 503 if none can ever have it, 429 if not in time."""
        with self.counting(ask):
            return await self._enter(ask)

    @contextlib.contextmanager
    def counting(self, ask: Ask) -> Iterator[None]:
        """Counts the request as offered where this block, before an engine has it, is the end of it."""
        try:
            yield
        except ApiError as error:
            self.count_refused(error)
            raise
        except asyncio.CancelledError:
            waited_s = self._clock() - ask.arrived_s
            self.offered.given_up(ask, waited_s)
            self.events.given_up(met=None if ask.ttft_s is None else waited_s <= ask.ttft_s)
            raise

    def count_refused(self, error: ApiError) -> None:
        """Counts a request as offered that is answered with this, without an engine that could count it."""
        self.offered.refused(error)
        self.events.refused(error.code or str(error.status), error.status)

    async def _enter(self, ask: Ask) -> Turn:
        self._listen()
        waiter = _Waiter(ask=ask, deadline_s=self._deadline_s(ask))
        if ask.has_waited and waiter.deadline_s <= self._clock():
            raise self.overdue(ask)
        if not ask.has_waited:
            self._arrivals.add((ask.priority, ask.key), ask.tokens)
        self._line_up(waiter)
        try:
            self._pump()
            if not waiter.placed.done():
                self._refuse_what_is_hopeless(waiter)
            async with asyncio.timeout(max(0.0, waiter.deadline_s - self._clock())):
                replica_id = await waiter.placed
        except BaseException as error:
            self._give_up(waiter)
            self.on_board(lambda board: board.end(ask.request_id))
            if isinstance(error, TimeoutError):
                raise self.overdue(ask) from None
            raise
        with self.shared.locked() as board:
            sequence = board.sequence_of(ask.request_id)
        return Turn(self, waiter, replica_id, sequence)

    def refund(self, waiter: _Waiter) -> None:
        """A request had a place, and was not begun there: its key is not charged for it."""
        if waiter.ask.retried_s is None:
            self._queue.refund(waiter)

    def on_board(self, change: Callable[[Board], None]) -> None:
        """Changes the board, and lets in whom that makes room for."""
        with self.shared.locked() as board:
            change(board)
        self._pump()

    def has_started(self, ask: Ask, seconds: float) -> None:
        """A request's first text is there, so long after it was let in."""
        self.events.started(self._clock() - ask.arrived_s)
        with self.shared.locked() as board:
            prefill_s = board.prefill_s(ask)
        self._starts_s.append(max(0.0, seconds - prefill_s))

    async def news(self, at_most_s: float) -> None:
        """Returns when a replica has reported or gone."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._news.wait()

    def overdue(self, ask: Ask) -> ApiError:
        """What a request is told whose deadline has passed before a replica has begun it."""
        with self.shared.locked() as board:
            is_somebody_there = board.has_model(ask.model)
        if not is_somebody_there:
            return self._refused("no_replica", ask, unavailable())
        if self._config.refuse_late and ask.ttft_s is not None:
            return self._refused("deadline", ask, late(ask.ttft_s, self._retry_after_s(ask.tokens)))
        return self._refused("deadline", ask, overloaded(retry_after_s=self._retry_after_s(ask.tokens)))

    # -- parts --------------------------------------------------------------------------------------------------

    def _refused(self, reason: AdmissionReason, ask: Ask, error: ApiError, **numbers: float | None) -> ApiError:
        """Notes that the request is refused with `error`, and returns that."""
        facts = RefusalFacts(
            request_id=ask.request_id,
            reason=reason,
            tokens=ask.tokens,
            prompt_tokens=ask.prompt_tokens,
            waited_s=self._clock() - ask.arrived_s,
            ttft_s=ask.ttft_s,
            num_waiting=self.num_waiting,
            queued_tokens=self._queue.num_tokens + self._retried_tokens,
            retry_after_s=error.retry_after_s,
            **numbers,  # type: ignore[arg-type]  # by their names
        )
        number = self.decisions.add(facts)
        RequestLogger(logger, ask.request_id).info("refused, %s (decision %d)", reason, number)
        return error

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

    def _deadline_s(self, ask: Ask) -> float:
        wait_s, ttft_s = self._config.timeout_s, ask.ttft_s
        if ask.retried_s is not None:
            return ask.retried_s + wait_s
        if self._config.refuse_late and ttft_s is not None:
            with self.shared.locked() as board:
                start_s = board.prefill_s(ask) + self._start_s()
            wait_s = min(wait_s, max(ttft_s - start_s, LEAST_WAIT_SHARE * ttft_s))
        return ask.arrived_s + wait_s

    def _start_s(self) -> float:
        """From a place to the first text, beyond the prefill at its best: the step that runs, calls, threads."""
        ordered = sorted(self._starts_s)
        return ordered[len(ordered) * START_PERCENT // 100] if ordered else 0.0

    def _refuse_what_is_hopeless(self, waiter: _Waiter) -> None:
        ask, ttft_s = waiter.ask, waiter.ask.ttft_s
        if self._config.max_queued_requests == 0 and ask.retried_s is None:
            raise self._full("queue_full", ask)
        if ask.has_waited or not self._config.refuse_late or ttft_s is None:
            return
        free, rate = self._free_tokens_and_rate()
        if rate is None:
            return
        # If it had to wait until its deadline, could all that would be before it be served by then?
        longest_s = waiter.deadline_s - self._clock()
        before = self._queue.tokens_before(waiter, self._arrivals.expected(longest_s)) + self._retried_tokens
        spread = SPREADS * math.sqrt(before * waiter.tokens)
        if before + spread + waiter.tokens - free > rate * longest_s:
            raise self._refused(
                "late",
                ask,
                late(ttft_s, self._retry_after_s(0, beyond_s=longest_s)),
                free_tokens=free,
                rate_tokens_per_s=rate,
                before_tokens=before,
                spread_tokens=spread,
                left_s=longest_s,
            )

    def _free_tokens_and_rate(self) -> tuple[int, float | None]:
        """Tokens that are free for those who wait here, below 0 where more are promised already; tokens/s to come."""
        with self.shared.locked() as board:
            return board.free_tokens() - board.door_tokens(), board.drain_tokens_per_s()

    @property
    def _retried_tokens(self) -> int:
        return sum(waiter.ask.tokens for waiter in self._retried)

    def _line_up(self, waiter: _Waiter) -> None:
        """A retried one comes before the queue, and does not count there: it may find no place where others do."""
        ask = waiter.ask
        if ask.retried_s is not None:
            insort(self._retried, waiter, key=lambda waiter: waiter.ask.retried_s or 0.0)
            return
        # Where nobody may wait, one may still find a place at once.
        is_first = ask.has_waited or self._config.max_queued_requests == 0
        try:
            victim = self._queue.push(waiter, front=is_first)
        except QueueFull:
            raise self._full("queue_full", ask) from None
        if victim is not None:
            victim.fail(self._full("displaced", victim.ask))

    def _give_up(self, waiter: _Waiter) -> None:
        """It waits no more, or does not take its place."""
        if waiter.has_place:
            self.refund(waiter)
        elif waiter in self._retried:
            self._retried.remove(waiter)
        else:
            self._queue.discard(waiter)

    def _full(self, reason: AdmissionReason, ask: Ask) -> ApiError:
        return self._refused(reason, ask, overloaded(retry_after_s=self._retry_after_s(0)))

    def _pump(self) -> None:
        """Places whoever can be placed: those that are retried, each where it may go, then those of the queue."""
        in_vain: InVain = {}
        self._retried = [waiter for waiter in self._retried if not self._settle(waiter, in_vain)]
        self._pump_queue()

    def _pump_queue(self) -> None:
        """Places the head, or where it cannot be, smaller ones of its key (deployments/replica/door.py)."""
        below_tokens, num_passed_by = math.inf, 0
        while num_passed_by <= MAX_PASSED_BY and (waiter := self._queue.head(below_tokens)) is not None:
            if not self._settle(waiter):
                below_tokens, num_passed_by = waiter.tokens, num_passed_by + 1
            elif waiter.has_place:
                self._queue.serve(waiter)
                below_tokens, num_passed_by = math.inf, 0
            else:
                self._queue.discard(waiter)

    def _settle(self, waiter: _Waiter, in_vain: InVain | None = None) -> bool:
        """Places the waiter if it can be placed now. Whether it waits no more: placed, refused, or cancelled.

        `in_vain`: those of this pass that found no place. When a replica dies many ask at once, most of the same size.
        """
        if not waiter.placed.done():
            ask, kind = waiter.ask, (waiter.ask.excluded, waiter.ask.model)
            smaller = in_vain.get(kind) if in_vain is not None else None
            with self.shared.locked() as board:
                is_in_vain = smaller is not None and _needs_less(smaller, ask)
                replica_id = None if is_in_vain else board.place(ask)
                never = None if replica_id is not None else _never(board, ask)
                longest = board.longest_request_tokens(ask.model) if never is not None else None
            if in_vain is not None and replica_id is None and (smaller is None or _needs_less(ask, smaller)):
                in_vain[kind] = ask
            if replica_id is not None:
                waiter.placed.set_result(replica_id)
            elif never is not None:
                reason, error = never
                waiter.fail(self._refused(reason, ask, error, longest_tokens=longest))
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


def _never(board: Board, ask: Ask) -> tuple[AdmissionReason, ApiError] | None:
    """Why no replica that there is will ever have the request; None where one may."""
    if board.replica_ids and not board.has_model(ask.model):
        return "no_replica", unavailable(f"no replica serves the model '{ask.model}' any more; retry later")
    if not board.could_hold(ask):
        return "too_large", too_large(ask.least_tokens, board.longest_request_tokens(ask.model) or 0)
    return None
