"""Every plan that competes for a step, and which of them frees most in the time that the step may take.

All bytes are those of the plans themselves: units may be unequal. What a plan's step takes is remembered as by how much
it exceeds the plan's bound, for all situations that are alike (`prediction_cache.alike`), and is simulated only where
the bound does not rule the plan out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selectn_core.latency.placement import OffloadPlan, even_placements, place_integer_interval
from selectn_core.latency.prediction_cache import Remembered, alike, alike_in_time
from selectn_core.latency.recurrence import Link, StepCosts, bound_s, predict_step_s
from selectn_core.planning.unit_sets import size_sets, unequal_few

MOST_SLOTS = 4
_ROUNDING = 1e-9
# Placements follow the units' times, and what is known of their steps the link's too.
_MOST_LAYOUTS, _MOST_SITUATIONS, _MOST_LINKS = 16, 64, 8
# Of plans alike in bytes the fastest is taken, of so many at most.
_MOST_ALIKE = 4


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One step to be planned: its costs, the link, the seconds it may take, and how much may and must be offloaded.

    `min_freed_bytes` is what device memory lacks to hold every unit; `max_offloaded_bytes` None: as much as fits.
    """

    costs: StepCosts
    link: Link
    limit_s: float
    min_freed_bytes: int = 0
    max_offloaded_bytes: float | None = None

    @property
    def most_s(self) -> float:
        """The limit, as times are compared with it."""
        return self.limit_s * (1 + _ROUNDING)


class Frontier:
    """Every candidate plan and what its step takes, from the most device memory freed down."""

    def __init__(
        self, unit_bytes: Sequence[int], sets: Sequence[Sequence[int]] = (), max_slots: int = MOST_SLOTS
    ) -> None:
        """`sets`: units of which a plan offloads some and no others, e.g. all MLP blocks. `size_sets` are too."""
        self._unit_bytes, self._max_slots = tuple(unit_bytes), max_slots
        self._sets = list(dict.fromkeys([*size_sets(unit_bytes), *map(tuple, sets)]))
        nothing: tuple[int, ...] = ()
        num_units = len(unit_bytes)
        self._intervals = [place_integer_interval(n, num_units) for n in range(1, num_units + 1)]
        self._integer_intervals = _Candidates([*self._intervals, nothing], self._unit_bytes, max_slots=1)
        self.layouts = Remembered(_MOST_LAYOUTS)

    def freest(self, situation: Situation) -> OffloadPlan:
        """What frees most within the limit and the range; what copies least and frees enough where nothing does."""
        costs = situation.costs
        return self.layouts.get(alike_in_time(costs), lambda: self._layout(costs)).choose(situation)

    def largest_interval(self, situation: Situation) -> OffloadPlan:
        """As `freest`, of the paper's integer intervals through one slot."""
        return self._integer_intervals.choose(situation)

    def _layout(self, costs: StepCosts) -> _Candidates:
        """Even placements in every set, the paper's intervals, and any few where units are unequal."""
        placements = [placed for among in self._sets for placed in even_placements(costs, among)]
        placements += [*self._intervals, *unequal_few(costs), ()]
        return _Candidates(placements, self._unit_bytes, self._max_slots)


class _Candidates:
    """Placements, each through every number of slots that competes, from the most memory freed down.

    Of those that free as much the one with most on the host comes first. A plan is known by its place in this order.
    """

    def __init__(
        self, placements: Sequence[tuple[int, ...]], unit_bytes: tuple[int, ...], max_slots: int = MOST_SLOTS
    ) -> None:
        self.num_units = len(unit_bytes)
        self.known = Remembered(_MOST_SITUATIONS)
        self.placements = list(dict.fromkeys(placements))
        sizes = [[unit_bytes[unit] for unit in placed] for placed in self.placements]
        count = np.array([len(each) for each in sizes])
        total, largest = np.array([sum(each) for each in sizes]), np.array([max(each, default=0) for each in sizes])
        slots = np.arange(1, max_slots + 1)[None, :]
        freed = total[:, None] - np.minimum(slots, count[:, None]) * largest[:, None]  # [placements, slots]
        # With as many slots as units nothing is copied and nothing freed; one of one is as good as none.
        competes = (slots < count[:, None]) | (slots == 1)
        placement, slot = np.nonzero(competes)
        order = np.lexsort((-total[placement], -freed[competes]))
        self.placement, self.num_slots = placement[order], slot[order] + 1
        self.freed_bytes, self.bytes = freed[competes][order], total[self.placement]
        freed_bytes, num_bytes, count = freed[competes][order], total[self.placement], count[self.placement]
        is_copied = count > self.num_slots
        self._copied_bytes, self._num_copies = num_bytes * is_copied, count * is_copied
        # Lists, as few of them are read for a choice: arrays would be read whole, after a step has emptied the caches.
        self.freed_bytes, self.bytes = freed_bytes.tolist(), num_bytes.tolist()
        self._less_freed = (-freed_bytes).tolist()
        self._by_bytes = np.lexsort((-freed_bytes, num_bytes)).tolist()
        place = np.zeros((len(self.placements), max_slots), dtype=np.intp)  # of each plan in the order
        place[self.placement, self.num_slots - 1] = np.arange(len(order))
        self.roomiest = np.take_along_axis(place, competes.sum(axis=1)[:, None] - 1, axis=1)[self.placement, 0].tolist()
        self._link_bytes = Remembered(_MOST_LINKS)

    def choose(self, situation: Situation) -> OffloadPlan:
        """As `Frontier.freest`, of these."""
        excess = self.known.get(alike(situation.costs, situation.link), lambda: _Excess(self, situation))
        chosen = excess.freest(situation)
        return self.plan(chosen if chosen is not None else self._least(situation, excess))

    def plan(self, i: int) -> OffloadPlan:
        return OffloadPlan(
            offloaded=self.placements[self.placement[i]],
            num_slots=int(self.num_slots[i]),
            num_units=self.num_units,
        )

    def link_bytes(self, link: Link) -> tuple[list[float], list[float]]:
        """Of each what its copies take of the link, in bytes; and the least of all up to it, with the sign changed."""
        copy_bytes = round(link.copy_s * link.bytes_per_s)
        return self._link_bytes.get(copy_bytes, lambda: self._link_bytes_with(copy_bytes))

    def _link_bytes_with(self, copy_bytes: int) -> tuple[list[float], list[float]]:
        taken = self._copied_bytes + self._num_copies * float(copy_bytes)
        return taken.tolist(), (-np.minimum.accumulate(taken)).tolist()

    def first_within(self, most_bytes: float, link: Link) -> int:
        """Before it none whose copies take the link for no longer."""
        return bisect_left(self.link_bytes(link)[1], -most_bytes)

    def end_of(self, min_freed_bytes: float) -> int:
        """From it on none that frees so much."""
        return bisect_right(self._less_freed, -min_freed_bytes)

    def alike(self, i: int) -> range:
        """The few plans from `i` on that offload and free as many bytes."""
        end = i + 1
        while end < min(len(self.bytes), i + _MOST_ALIKE) and (
            self.freed_bytes[end] == self.freed_bytes[i] and self.bytes[end] == self.bytes[i]
        ):
            end += 1
        return range(i, end)

    def _least(self, situation: Situation, excess: _Excess) -> int:
        """What offloads least and frees enough, the fastest of those alike; what frees most where nothing does."""
        num_enough = self.end_of(situation.min_freed_bytes)
        if not num_enough:
            return 0
        chosen = next(i for i in self._by_bytes if i < num_enough)
        return min(self.alike(chosen), key=excess.of)


class _Excess:
    """By how much steps of candidates exceed their bounds, in situations like one: known, or not below."""

    def __init__(self, candidates: _Candidates, like: Situation) -> None:
        self._candidates, self._costs, self._link = candidates, like.costs, like.link
        self._least: dict[int, float] = {}  # 1 for the others
        self._known: dict[int, float] = {}

    def freest(self, situation: Situation) -> int | None:
        """The first candidate that is within range and limit; the fastest of those alike."""
        candidates, link, most_s = self._candidates, situation.link, situation.most_s
        unloaded_s = situation.costs.unloaded_s
        if unloaded_s > most_s:
            return None
        first = candidates.first_within(most_s * link.bytes_per_s, link)
        end = candidates.end_of(situation.min_freed_bytes)
        most_bytes = math.inf if situation.max_offloaded_bytes is None else situation.max_offloaded_bytes
        taken_bytes = candidates.link_bytes(link)[0]

        def is_within(i: int) -> bool:
            if candidates.bytes[i] > most_bytes:
                return False
            return self._is_within(i, max(unloaded_s, taken_bytes[i] / link.bytes_per_s), most_s)

        for i in range(first, end):
            if is_within(i):
                return min((j for j in candidates.alike(i) if is_within(j)), key=self.of)
        return None

    def _is_within(self, i: int, bound_s: float, most_s: float) -> bool:
        """Slots make no step longer: what is too slow with the most of them is simulated once, not for each number."""
        if bound_s * self._least.get(i, 1.0) > most_s:
            return False
        if i not in self._known:
            least = self._least[i] = self.of(self._candidates.roomiest[i])
            if bound_s * least > most_s:
                return False
        return bound_s * self.of(i) <= most_s

    def of(self, i: int) -> float:
        """The step's time over its bound, simulated once."""
        if i not in self._known:
            candidates = self._candidates
            offloaded, num_slots = candidates.placements[candidates.placement[i]], int(candidates.num_slots[i])
            step_s = predict_step_s(self._costs, offloaded, num_slots, self._link)
            self._known[i] = self._least[i] = step_s / bound_s(self._costs, offloaded, num_slots, self._link)
        return self._known[i]
