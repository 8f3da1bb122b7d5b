"""Which units are offloaded: any k of L, spaced so that the copies have equal time, or the paper's integer interval.

`among` restricts the choice to some units, of one kind for example; spacing is even over the whole step all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """Which units live only in host memory, and how many slots on the device receive them.

    `offloaded` is ascending; `num_units` is L.
    """

    offloaded: tuple[int, ...]
    num_slots: int
    num_units: int

    def __post_init__(self) -> None:
        if list(self.offloaded) != sorted(set(self.offloaded)):
            raise ValueError(f"offloaded={self.offloaded}: expected ascending, distinct units")
        if self.offloaded and not (self.offloaded[0] >= 0 and self.offloaded[-1] < self.num_units):
            raise ValueError(f"offloaded={self.offloaded}: expected units below {self.num_units}")
        if self.num_slots < 1:
            raise ValueError(f"num_slots={self.num_slots}: expected at least 1")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Asked for many times in every step."""
        return hash((self.offloaded, self.num_slots, self.num_units))

    @property
    def num_offloaded(self) -> int:
        return len(self.offloaded)

    @property
    def interval(self) -> float:
        """The offloading interval N = L / k; infinite when nothing is offloaded."""
        return self.num_units / len(self.offloaded) if self.offloaded else math.inf

    @property
    def slots_used(self) -> int:
        """Slots that hold something: never more than there are offloaded units."""
        return min(self.num_slots, len(self.offloaded))


def freed_bytes(plan: OffloadPlan, unit_bytes: Sequence[int]) -> int:
    """Bytes of device memory that a plan frees: those of its units, less the slots that receive them."""
    sizes = [unit_bytes[unit] for unit in plan.offloaded]
    return sum(sizes) - plan.slots_used * max(sizes, default=0)


def place_evenly(num_offloaded: int, costs: StepCosts, *, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """The k units whose starts are nearest to k instants evenly spaced over a whole step, the rest included.

    Spacing in time rather than by index leaves each copy the same room, also across R at the step's end and
    where units differ. O(L). Raises ValueError where there are fewer than k units to choose from.
    """
    allowed = _choice(num_offloaded, len(costs.compute_s), among)
    return _evenly(num_offloaded, allowed, [costs.starts_s[unit] for unit in allowed], costs.unloaded_s)


def place_by_index(num_offloaded: int, num_units: int, *, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """k of the units evenly spaced by their place among those allowed, the last of which is always chosen.

    Raises ValueError where there are fewer than k to choose from.
    """
    allowed = _choice(num_offloaded, num_units, among)
    return _by_index(num_offloaded, allowed)


def even_placements(costs: StepCosts, among: Sequence[int] | None = None) -> Iterator[tuple[int, ...]]:
    """Every k from 1 up of the units `among`, evenly in time and by index, as the two functions above place them."""
    allowed = _choice(0, len(costs.compute_s), among)
    starts_s = [costs.starts_s[unit] for unit in allowed]
    for num_offloaded in range(1, len(allowed) + 1):
        yield _evenly(num_offloaded, allowed, starts_s, costs.unloaded_s)
        yield _by_index(num_offloaded, allowed)


def place_integer_interval(interval: int, num_units: int) -> tuple[int, ...]:
    """The paper's layout (arXiv 2502.08182): of every `interval` consecutive units the last is offloaded."""
    if interval < 1:
        raise ValueError(f"interval={interval}: expected at least 1")
    return tuple(range(interval - 1, num_units, interval))


def best_placement(
    num_offloaded: int, num_slots: int, costs: StepCosts, link: Link, *, among: Sequence[int] | None = None
) -> OffloadPlan:
    """The faster of even spacing in time and by index, by the recurrence; ties go to time."""
    return timed_placement(num_offloaded, num_slots, costs, link, among=among)[1]


def timed_placement(
    num_offloaded: int, num_slots: int, costs: StepCosts, link: Link, *, among: Sequence[int] | None = None
) -> tuple[float, OffloadPlan]:
    """The predicted step in seconds of `best_placement`, and the plan."""
    num_units = len(costs.compute_s)
    candidates = (
        place_evenly(num_offloaded, costs, among=among),
        place_by_index(num_offloaded, num_units, among=among),
    )
    timed = [(predict_step_s(costs, units, num_slots, link), units) for units in dict.fromkeys(candidates)]
    step_s, offloaded = min(timed, key=lambda each: each[0])
    return step_s, OffloadPlan(offloaded=offloaded, num_slots=num_slots, num_units=num_units)


def best_slots(
    num_offloaded: int, max_slots: int, costs: StepCosts, link: Link, *, among: Sequence[int] | None = None
) -> OffloadPlan:
    """The placement and number of slots (1..max_slots) with the shortest predicted step; fewest slots on a tie.

    Slots that would make the offloaded units resident again (S >= k) are not considered, except S = 1.
    """
    most = max(1, min(max_slots, num_offloaded - 1))
    plans = [best_placement(num_offloaded, slots, costs, link, among=among) for slots in range(1, most + 1)]
    return min(
        plans,
        key=lambda plan: (
            round(predict_step_s(costs, plan.offloaded, plan.num_slots, link), 9),
            plan.num_slots,
        ),
    )


def nearest_plan(current: OffloadPlan, wanted: OffloadPlan) -> OffloadPlan:
    """As many units and slots as `wanted`, with the fewest units moved from where they are under `current`.

    Where fewer are to be offloaded, of those that are now each of the wanted has its nearest stay; where more, those
    of the wanted join that are farthest from those that are offloaded. Less even than `wanted`: ask the recurrence.
    """
    kept, count = list(current.offloaded), wanted.num_offloaded
    if count <= len(kept):
        chosen: list[int] = []
        for unit in wanted.offloaded:
            chosen.append(min(kept, key=lambda each: abs(each - unit)))
            kept.remove(chosen[-1])
    else:
        chosen, others = kept, [unit for unit in wanted.offloaded if unit not in kept]
        while len(chosen) < count:
            farthest = max(others, key=lambda unit: min((abs(unit - each) for each in chosen), default=0))
            others.remove(farthest)
            chosen.append(farthest)
    return OffloadPlan(offloaded=tuple(sorted(chosen)), num_slots=wanted.num_slots, num_units=wanted.num_units)


def _choice(num_offloaded: int, num_units: int, among: Sequence[int] | None) -> list[int]:
    """The units that may be offloaded, ascending."""
    allowed = list(range(num_units)) if among is None else sorted(set(among))
    if allowed and not (allowed[0] >= 0 and allowed[-1] < num_units):
        raise ValueError(f"among={among}: expected units below {num_units}")
    if not 0 <= num_offloaded <= len(allowed):
        raise ValueError(f"num_offloaded={num_offloaded}: expected 0 to {len(allowed)}")
    return allowed


def _evenly(num_offloaded: int, allowed: Sequence[int], starts_s: Sequence[float], period_s: float) -> tuple[int, ...]:
    wanted_s = [(i + 1) * period_s / num_offloaded for i in range(num_offloaded)]
    return tuple([allowed[i] for i in _nearest_distinct(wanted_s, starts_s)])


def _by_index(num_offloaded: int, allowed: Sequence[int]) -> tuple[int, ...]:
    return tuple([allowed[(i + 1) * len(allowed) // num_offloaded - 1] for i in range(num_offloaded)])


def _nearest_distinct(wanted_s: Sequence[float], starts_s: Sequence[float]) -> tuple[int, ...]:
    """For each ascending wanted time the nearest unit, moved no further than distinctness requires."""
    num_units, count = len(starts_s), len(wanted_s)
    chosen, unit = [], 0
    for i, want_s in enumerate(wanted_s):
        last_allowed = num_units - (count - i)
        while unit < last_allowed and abs(starts_s[unit + 1] - want_s) <= abs(starts_s[unit] - want_s):
            unit += 1
        chosen.append(unit)
        unit = min(unit + 1, num_units - 1)
    return tuple(chosen)
