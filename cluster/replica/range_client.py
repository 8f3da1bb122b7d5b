"""Keeps a replica's range up to date, in a thread of its own: a token never waits for it.

Reports, waits for the coordinator's answer, applies it, and falls back when the lease runs out, also while a call
hangs. `on_range` is called from that thread whenever what the replica should do changes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType

from cluster.protocol.messages import NOTHING, Allowance, Epoch, KvUse, LinkDemand, RangeUpdate, ReplicaReport
from cluster.replica.lease import RangeHolder

logger = logging.getLogger(__name__)

# Reports a replica's state and returns what it may do; may block for `hold_s` and longer, and may raise anything.
Exchange = Callable[[ReplicaReport, float], RangeUpdate | None]
# What is allowed, and (k_min, k_max).
OnRange = Callable[[Allowance, tuple[int, int]], None]

_MIN_PERIOD_S, _MAX_BACKOFF_S = 0.05, 2.0
_LEAVE_TIMEOUT_S = 2.0
# The call that waits, and the one that takes its place when the demand changes; a third thread is for the goodbye.
_MAX_CALLS = 2


@dataclass(frozen=True, kw_only=True)
class RangeState:
    """What a replica may do, for its reports and for people.

    `lease_end_s` is on the replica's clock, None without a lease. `last_error`: why the last call failed.
    """

    allowed: Allowance
    k_range: tuple[int, int]
    lease_end_s: float | None
    epoch: Epoch
    problem: str | None
    last_error: str | None

    @property
    def has_lease(self) -> bool:
        return self.lease_end_s is not None


@dataclass(frozen=True, kw_only=True)
class _Demand:
    link: LinkDemand
    kv: KvUse = field(default_factory=KvUse)


class RangeClient:
    """A replica's side of the protocol, from `start` to `close`, or as a context manager."""

    def __init__(
        self,
        holder: RangeHolder,
        exchange: Exchange,
        on_range: OnRange,
        *,
        link: LinkDemand,
        hold_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hold_s`, how long the coordinator may sit on a report, must be well below its lease."""
        self._holder, self._exchange, self._on_range = holder, exchange, on_range
        self._hold_s, self._clock = hold_s, clock
        self._demand = _Demand(link=link)
        self._state = RangeState(
            allowed=NOTHING,
            k_range=(link.k_min, link.k_min),
            lease_end_s=None,
            epoch=holder.epoch,
            problem=None,
            last_error=None,
        )
        self._changed = threading.Condition()
        self._should_report, self._is_closing = True, False
        self._calls: list[Future[RangeUpdate | None]] = []
        self._next_call_s, self._num_failures = clock(), 0
        self._told: tuple[Allowance, tuple[int, int]] | None = None
        self._pool = ThreadPoolExecutor(_MAX_CALLS + 1, thread_name_prefix="coordinator-call")
        self._thread = threading.Thread(target=self._run, name="range-client", daemon=True)

    def start(self) -> None:
        """Begins to report."""
        self._thread.start()

    def close(self) -> None:
        """Says goodbye and ends; call it when the replica no longer uses the link. Idempotent."""
        with self._changed:
            was_closing, self._is_closing = self._is_closing, True
            self._changed.notify_all()
        if was_closing:
            return
        if self._thread.is_alive():
            self._thread.join()
        self._say_goodbye()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> RangeClient:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> RangeState:
        """What the replica may do now, as of the last change."""
        with self._changed:
            return self._state

    def set_demand(self, *, link: LinkDemand | None = None, kv: KvUse | None = None) -> None:
        """What the replica wants from now on, any thread. A new link demand is reported at once."""
        with self._changed:
            before = self._demand
            self._demand = replace(before, link=link or before.link, kv=kv or before.kv)
            if before.link != self._demand.link:
                self._should_report = True
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closing:
                    return
                self._take_answers()
                self._call_if_due()
                self._refresh_state()
                told = (self._state.allowed, self._state.k_range)
                if not self._holder.version or told == self._told:
                    self._changed.wait(self._until_next_s())
                    continue
                self._told = told
            self._tell(told)

    def _call_if_due(self) -> None:
        now_s = self._clock()
        is_idle = not self._calls
        if now_s < self._next_call_s or not (is_idle or self._should_report) or len(self._calls) == _MAX_CALLS:
            return
        demand = self._demand
        report = self._holder.report(demand.link, now_s, kv=demand.kv)
        call = self._pool.submit(self._exchange, report, self._hold_s)
        self._calls.append(call)
        self._should_report, self._next_call_s = False, now_s + _MIN_PERIOD_S
        call.add_done_callback(self._notify)

    def _take_answers(self) -> None:
        done = [call for call in self._calls if call.done()]
        self._calls = [call for call in self._calls if not call.done()]
        for call in done:
            error = call.exception()
            if error is None:
                self._num_failures = 0
                update = call.result()
                if update is not None:
                    self._holder.apply(update, self._clock(), self._demand.link)
            else:
                self._num_failures += 1
                backoff_s = min(_MAX_BACKOFF_S, _MIN_PERIOD_S * 2 ** min(self._num_failures, 10))
                self._next_call_s = self._clock() + backoff_s
                if self._num_failures == 1:
                    logger.warning("cannot reach the coordinator, will go on trying: %s", _first_line(error))
            self._state = replace(self._state, last_error=_first_line(error) if error else None)

    def _refresh_state(self) -> None:
        now_s, holder = self._clock(), self._holder
        allowed, had_lease = holder.allowed(now_s), self._state.has_lease
        self._state = replace(
            self._state,
            allowed=allowed,
            k_range=holder.k_range(self._demand.link, now_s),
            lease_end_s=holder.lease_end_s,
            epoch=holder.epoch,
            problem=holder.problem,
        )
        if had_lease and not self._state.has_lease:
            logger.warning("the coordinator's lease has run out: going on with %d bytes/s", allowed.link_bytes_per_s)

    def _tell(self, told: tuple[Allowance, tuple[int, int]]) -> None:
        try:
            self._on_range(*told)
        except Exception:
            logger.exception("on_range failed for %s", told)

    def _until_next_s(self) -> float | None:
        """Seconds until something is due by itself: the end of the lease, or a call that had to wait."""
        if any(call.done() for call in self._calls):  # before anybody waited to be notified
            return 0.0
        times_s = [self._holder.lease_end_s] if self._holder.lease_end_s is not None else []
        if not self._calls or (self._should_report and len(self._calls) < _MAX_CALLS):
            times_s.append(self._next_call_s)
        return max(0.0, min(times_s) - self._clock()) if times_s else None

    def _notify(self, _: Future[RangeUpdate | None]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _say_goodbye(self) -> None:
        demand = self._demand
        report = self._holder.report(demand.link, self._clock(), is_leaving=True)
        try:
            self._pool.submit(self._exchange, report, 0.0).result(timeout=_LEAVE_TIMEOUT_S)
        except Exception as error:
            logger.info("the coordinator did not hear that this replica leaves: %s", _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
