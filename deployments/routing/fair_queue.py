"""A bounded queue that is fair by tokens: between priorities by weight, between API keys equally, first come within.

Start-time fair queueing, twice: a class (priority) and a key each have a virtual time that grows by the tokens they are
served; the one that is least far comes next. Weights instead of strict priorities, so that nobody waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Protocol, TypeVar, get_args

from deployments.messages import Priority

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
WEIGHTS: dict[Priority, int] = {"high": 16, "normal": 4, "low": 1}
# What a key that has nothing waiting is owed at most, in requests of the size it comes back with.
MOST_OWED = 2

Flow = tuple[Priority, str]  # a priority and a key


class QueueFull(Exception):
    """The queue is full, and nobody in it has more of it than the one who came."""


class Entry(Protocol):
    """What the queue knows of one that waits in it: whose it is and how large."""

    @property
    def key(self) -> str: ...

    @property
    def priority(self) -> Priority: ...

    @property
    def tokens(self) -> int: ...


T = TypeVar("T", bound=Entry)  # compared by identity


@dataclass(kw_only=True)
class _Flow(Generic[T]):
    """One key's entries of one priority. `served` is its virtual time: tokens."""

    served: float
    entries: deque[T] = field(default_factory=deque)


@dataclass(kw_only=True)
class _Class(Generic[T]):
    """One priority: flows of keys that wait, and how far the others were when they last waited."""

    served: float = 0.0
    now: float = 0.0
    flows: dict[str, _Flow[T]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    count: int = 0  # of all flows' entries, and their tokens
    tokens: int = 0

    def start(self, key: str, tokens: int) -> float:
        """The virtual time at which a key begins that has nothing waiting.

        A key that was ahead still is. One that was behind is owed no more than `MOST_OWED` requests of `tokens`: where
        few may wait a key that comes seldom is often away, or refused, when its turn comes.
        """
        return max(self.left.get(key, self.now), self.now - MOST_OWED * tokens)

    def counts(self, entry: T, sign: int) -> None:
        """The entry has come (1) or gone (-1)."""
        self.count += sign
        self.tokens += sign * entry.tokens


class FairQueue(Generic[T]):
    """At most `capacity` entries."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._classes: dict[Priority, _Class[T]] = {priority: _Class() for priority in PRIORITIES}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(each.count for each in self._classes.values())

    @property
    def num_tokens(self) -> int:
        return sum(each.tokens for each in self._classes.values())

    def push(self, entry: T, *, front: bool = False) -> T | None:
        """Adds an entry, at the `front` of its own flow if it has waited before.

        Raises QueueFull, or returns the entry that had to go: the newest of a lower priority that has more than its
        weight's share of the queue, or of the key of the same priority that has most in it.
        """
        victim = None
        if len(self) >= self._capacity and not front:
            victim = self._victim(entry)
            if victim is None:
                raise QueueFull
            self.discard(victim)
        flow = self._flow_of(entry)
        if front:
            flow.entries.appendleft(entry)
        else:
            flow.entries.append(entry)
        self._classes[entry.priority].counts(entry, 1)
        return victim

    def head(self, below_tokens: float = inf) -> T | None:
        """The next entry, or None: of the next key's own the first that has fewer tokens than `below_tokens`.

        Only its own may pass: who has most requests always has a small one, and would be served more than others.
        """
        waiting = [priority for priority in PRIORITIES if self._classes[priority].flows]
        if not waiting:
            return None
        priority = min(waiting, key=lambda each: self._classes[each].served)  # of equals the first: the higher
        flow = min(self._classes[priority].flows.values(), key=lambda flow: flow.served)
        return next((entry for entry in flow.entries if entry.tokens < below_tokens), None)

    def pop(self) -> T:
        """Removes the head, which counts as served. Raises IndexError where there is none."""
        entry = self.head()
        if entry is None:
            raise IndexError("the queue is empty")
        self.serve(entry)
        return entry

    def serve(self, entry: T) -> None:
        """Removes an entry, which counts as served. One that is not the head has passed those that stay."""
        each = self._classes[entry.priority]
        flow = each.flows[entry.key]
        # The present is how far the least served is: who passes others does not take it along.
        self._now = max(self._now, min(one.served for one in self._classes.values() if one.flows))
        each.now = max(each.now, min(one.served for one in each.flows.values()))
        each.served += entry.tokens / WEIGHTS[entry.priority]
        flow.served += entry.tokens
        flow.entries.remove(entry)
        each.counts(entry, -1)
        self._drop_if_empty(each, entry.key)

    def refund(self, entry: T) -> None:
        """Takes back what a served entry has cost its key and priority: nothing came of its place.

        Those that wait come to no more credit by it than those that were away have (`_flow_of`, `_Class.start`).
        """
        each = self._classes[entry.priority]
        served = each.served - entry.tokens / WEIGHTS[entry.priority]
        each.served = max(served, min(each.served, self._now)) if each.flows else served
        flow = each.flows.get(entry.key)
        if flow is not None:
            most_owed = each.now - MOST_OWED * entry.tokens
            flow.served = max(flow.served - entry.tokens, min(flow.served, most_owed))
            if len(each.flows) == 1:  # it alone was how far the least served is, and has not come so far
                each.now = min(each.now, flow.served)
        elif entry.key in each.left:
            each.left[entry.key] -= entry.tokens

    def discard(self, entry: T) -> None:
        """Removes an entry unserved; does nothing if it is not there."""
        each = self._classes[entry.priority]
        flow = each.flows.get(entry.key)
        if flow is not None and entry in flow.entries:
            flow.entries.remove(entry)
            each.counts(entry, -1)
            self._drop_if_empty(each, entry.key)

    def tokens_before(self, entry: T, coming: Mapping[Flow, float]) -> float:
        """About how many tokens are served before `entry`, the newest of its key, if as many come as `coming` says.

        Who comes later may still be served sooner, but only until it is as far as `entry` will be by then: so the
        weights bound what each other key and priority can take meanwhile.
        """
        own, each = self._classes[entry.priority], self._classes[entry.priority].flows[entry.key]
        before = float(sum(other.tokens for other in each.entries if other is not entry))
        reaches = each.served + before
        names = {*own.flows, *own.left, *(key for priority, key in coming if priority == entry.priority)}
        tokens = before + sum(
            self._before_in_class(own, key, reaches, coming.get((entry.priority, key), 0.0), entry.tokens)
            for key in names - {entry.key}
        )
        class_reaches = own.served + tokens / WEIGHTS[entry.priority]
        for priority in PRIORITIES:
            if priority != entry.priority:
                more = sum(amount for (other, _), amount in coming.items() if other == priority)
                tokens += self._before_class(priority, entry.priority, class_reaches, more)
        return tokens

    def _before_in_class(self, own: _Class[T], key: str, reaches: float, coming: float, size: int) -> float:
        """Tokens of another key of the class until its virtual time has reached this; it comes with about `size`."""
        flow = own.flows.get(key)
        served = flow.served if flow is not None else own.start(key, size)
        tokens = 0.0
        for entry in flow.entries if flow is not None else ():
            if served + tokens > reaches:
                return tokens
            tokens += entry.tokens
        return tokens + min(coming, max(0.0, reaches - served - tokens))

    def _before_class(self, priority: Priority, before: Priority, reaches: float, coming: float) -> float:
        """Tokens of another class until its virtual time has reached this, the one begun last to its end."""
        each = self._classes[priority]
        served = each.served if each.flows else max(each.served, self._now)
        is_first_of_equals = PRIORITIES.index(priority) < PRIORITIES.index(before)
        if served > reaches or (served == reaches and not is_first_of_equals):
            return 0.0
        waiting, count = each.tokens, each.count
        begun_last = waiting / count if count else 0.0
        return min(waiting + coming, (reaches - served) * WEIGHTS[priority] + begun_last)

    def _flow_of(self, entry: T) -> _Flow[T]:
        each = self._classes[entry.priority]
        if not each.flows:  # it has not waited until now: no credit for that
            each.served = max(each.served, self._now)
        flow = each.flows.get(entry.key)
        if flow is None:
            flow = each.flows[entry.key] = _Flow(served=each.start(entry.key, entry.tokens))
            each.left.pop(entry.key, None)
        return flow

    def _drop_if_empty(self, each: _Class[T], key: str) -> None:
        flow = each.flows[key]
        if flow.entries:
            return
        del each.flows[key]
        each.left[key] = flow.served
        if len(each.left) > self._capacity:
            del each.left[next(iter(each.left))]  # who has been away for longest

    def _victim(self, entry: T) -> T | None:
        lower = PRIORITIES[PRIORITIES.index(entry.priority) + 1 :]
        for priority in reversed(lower):
            each = self._classes[priority]
            if each.count > self._share(priority):
                return max(each.flows.values(), key=lambda flow: len(flow.entries)).entries[-1]
        flows = self._classes[entry.priority].flows
        if not flows:
            return None
        largest = max(flows.values(), key=lambda flow: len(flow.entries))
        own = len(flows[entry.key].entries) if entry.key in flows else 0
        return largest.entries[-1] if len(largest.entries) > own + 1 else None

    def _share(self, priority: Priority) -> int:
        """Entries of a priority that no other pushes out."""
        return max(1, self._capacity * WEIGHTS[priority] // sum(WEIGHTS.values()))
