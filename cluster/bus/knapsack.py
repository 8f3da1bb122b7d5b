"""The bounded knapsack in whole numbers: branch and bound over kinds of item, exact unless it runs out of nodes.

Kinds are ordered by value per cost. Taking as many as fit of one kind after the other is then the best for divisible
items, and the best that the rest of the kinds can add to a beginning is bounded by the same walk with the last item
cut (Dantzig). Values are whole, so the bound is rounded down, to a multiple of what divides all values. The bound
only falls as fewer of a kind are taken, so the first count whose bound is too low ends its kind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from itertools import accumulate
from math import gcd
from operator import mul


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How many of each kind; what they are worth; what no packing can exceed. Optimal where the two are equal."""

    counts: list[int]
    value: int
    bound: int


@dataclass(slots=True)
class Nodes:
    """Partial packings that may still be looked at."""

    left: int


class Knapsack:
    """Kinds of item: positive `values` and `costs`, in an order of falling value per cost (`by_efficiency`)."""

    def __init__(self, values: Sequence[int], costs: Sequence[int]) -> None:
        self._grain = gcd(*values)
        self._values = [value // self._grain for value in values]
        self._costs = list(costs)

    def pack(self, limits: Sequence[int], room: int, *, at_least: int = 0, nodes: Nodes) -> Packing | None:
        """The most valuable packing with at most `limits[i]` of kind i and a cost of at most `room`.

        None if nothing worth `at_least` was found: there is none, or `nodes`, which it uses up, were too few.
        With `at_least` the first packing worth that much is returned: enough to know that there is one.
        """
        search = _Search(self._values, self._costs, limits, room, nodes)
        wanted = -(-at_least // self._grain)
        if room < 0 or search.bound < wanted:
            return None
        search.best, search.enough = wanted - 1, (wanted or search.bound)
        search.take_greedily(room)
        if search.best < search.enough:
            search.visit(0, room, 0)
        if search.best_counts is None:
            return None
        complete = nodes.left > 0 and not at_least
        bound = search.best if complete else search.bound
        return Packing(counts=search.best_counts, value=search.best * self._grain, bound=bound * self._grain)

    def may_have(self, limits: Sequence[int], room: int, *, at_least: int) -> list[bool]:
        """Of each kind, whether a packing worth `at_least` may have one of it. False: none has; True: not ruled out."""
        search = _Search(self._values, self._costs, limits, room, Nodes(left=0))
        wanted = -(-at_least // self._grain)
        return [
            limit > 0 and cost <= room and value + search.bound_from(0, room - cost) >= wanted
            for value, cost, limit in zip(self._values, self._costs, limits, strict=True)
        ]


class _Search:
    """One search, depth first: most of the most efficient kind first."""

    def __init__(self, values: list[int], costs: list[int], limits: Sequence[int], room: int, nodes: Nodes) -> None:
        self.values, self.costs, self.limits = values, costs, limits
        self.cost_before = list(accumulate(map(mul, costs, limits), initial=0))
        self.value_before = list(accumulate(map(mul, values, limits), initial=0))
        self.counts = [0] * len(values)
        self.best_counts: list[int] | None = None
        self.best = -1
        self.nodes = nodes
        self.bound = self.enough = self.bound_from(0, room)

    def bound_from(self, kind: int, room: int) -> int:
        """What kinds from `kind` on can add at most."""
        cut = bisect_right(self.cost_before, self.cost_before[kind] + room) - 1
        value = self.value_before[cut] - self.value_before[kind]
        if cut < len(self.values):
            left = room - (self.cost_before[cut] - self.cost_before[kind])
            value += left * self.values[cut] // self.costs[cut]
        return value

    def take_greedily(self, room: int) -> None:
        """As many as fit of one kind after the other: what the search finds first, found faster."""
        cut = bisect_right(self.cost_before, room) - 1
        counts, value, room = list(self.limits[:cut]), self.value_before[cut], room - self.cost_before[cut]
        for own_value, own_cost, limit in zip(self.values[cut:], self.costs[cut:], self.limits[cut:], strict=True):
            count = room // own_cost
            if count > limit:
                count = limit
            counts.append(count)
            room -= count * own_cost
            value += count * own_value
        if value > self.best:
            self.best, self.best_counts = value, counts

    def visit(self, kind: int, room: int, value: int) -> None:
        """Completes the packing whose first `kind` counts are decided in every way that may still be better."""
        self.nodes.left -= 1
        if value > self.best:
            self.best = value
            self.best_counts = self.counts[:kind] + [0] * (len(self.counts) - kind)
        if kind == len(self.values) or self.nodes.left <= 0:
            return
        own_value, own_cost = self.values[kind], self.costs[kind]
        for count in range(min(self.limits[kind], room // own_cost), -1, -1):
            rest = room - count * own_cost
            so_far = value + count * own_value
            if so_far + self.bound_from(kind + 1, rest) <= self.best:
                return
            self.counts[kind] = count
            self.visit(kind + 1, rest, so_far)
            if self.best >= self.enough or self.nodes.left <= 0:
                return


def by_efficiency(kinds: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(value, cost) pairs by falling value per cost; the smaller ones last, where they fill what is left."""
    return sorted(kinds, key=cmp_to_key(_efficient_first))


def _efficient_first(a: tuple[int, int], b: tuple[int, int]) -> int:
    return b[0] * a[1] - a[0] * b[1] or b[1] - a[1]
