"""Which plans fit a device, and which of them to run: the offline stage's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from selectn_core.config import MAX_SLOTS
from selectn_core.device import align_up
from selectn_core.latency.placement import OffloadPlan, best_placement
from selectn_core.latency.recurrence import Link, StepCosts

if TYPE_CHECKING:  # the planner runs without torch
    from selectn_core.weights.units import Unit

RoundUp = Callable[[int], int]


def plan_bytes(units: Sequence[Unit], plan: OffloadPlan, round_up: RoundUp = align_up) -> int:
    """Device bytes of the units under `plan`: a home for each resident one, and the slots.

    `round_up` gives what the device's memory takes for a number of bytes.
    """
    away = set(plan.offloaded)
    homes = sum(round_up(unit.num_bytes) for unit in units if unit.index not in away)
    return homes + plan.slots_used * round_up(slot_bytes(units, plan))


def slot_bytes(units: Sequence[Unit], plan: OffloadPlan) -> int:
    """Bytes of one slot under `plan`: the largest unit that it offloads fits. 0 where it offloads none."""
    return max((units[index].num_bytes for index in plan.offloaded), default=0)


def most_bytes(units: Sequence[Unit], round_up: RoundUp = align_up) -> int:
    """Device bytes of the most expensive plan: slots for the largest unit, in place of it and the smallest others."""
    *others, largest = sorted(round_up(unit.num_bytes) for unit in units)
    return sum(others) + largest + sum(largest - size for size in others[: MAX_SLOTS - 1])


def unmeasured_plan(
    units: Sequence[Unit], num_offloaded: int, num_slots: int, *, among: Sequence[int] | None = None
) -> OffloadPlan:
    """Placement before anything was measured: compute in proportion to bytes, a link as fast as the compute."""
    sizes = tuple(unit.num_bytes for unit in units)
    costs = StepCosts(compute_s=tuple(size / max(sizes) for size in sizes), unit_bytes=sizes, rest_s=len(sizes) / 10)
    return best_placement(num_offloaded, num_slots, costs, Link(bytes_per_s=float(max(sizes))), among=among)


def fewest_offloaded(
    units: Sequence[Unit],
    num_slots: int,
    budget_bytes: int,
    *,
    at_least: int = 0,
    round_up: RoundUp = align_up,
) -> OffloadPlan | None:
    """k_min: the plan with the fewest units offloaded, `at_least` or more, that fits `budget_bytes`; None if none."""
    return UnmeasuredPlans(units, round_up).fewest(num_slots, budget_bytes, at_least=at_least)


class UnmeasuredPlans:
    """Every `unmeasured_plan` of one model, and what plans take of its device: each is worked out once.

    Requests ask at every step and from every thread. Nothing that these plans depend on ever changes.
    """

    def __init__(self, units: Sequence[Unit], round_up: RoundUp = align_up) -> None:
        self._units = units
        self._homes = [round_up(unit.num_bytes) for unit in units]
        self._plans: dict[tuple[int, int], tuple[OffloadPlan, int]] = {}  # by k and slots, with its device bytes

    def plan(self, num_offloaded: int, num_slots: int) -> OffloadPlan:
        """`unmeasured_plan` of so many of the units."""
        return self._known(num_offloaded, num_slots)[0]

    def bytes_for(self, plan: OffloadPlan) -> int:
        """As `plan_bytes`."""
        away = [self._homes[unit] for unit in plan.offloaded]
        return sum(self._homes) - sum(away) + plan.slots_used * max(away, default=0)

    def offloaded_bytes(self, plan: OffloadPlan) -> int:
        """Bytes of the units that it offloads: what every step copies where they are more than the slots."""
        return sum(self._units[unit].num_bytes for unit in plan.offloaded)

    def fewest(self, num_slots: int, budget_bytes: int, *, at_least: int = 0) -> OffloadPlan | None:
        """The one with the fewest units offloaded, `at_least` or more, that fits `budget_bytes`; None if none does."""
        for num_offloaded in range(at_least, len(self._units) + 1):
            plan, num_bytes = self._known(num_offloaded, num_slots)
            if num_bytes <= budget_bytes:
                return plan
        return None

    def most_within(self, num_slots: int, most_bytes: float) -> OffloadPlan:
        """The one with the most units offloaded that together have no more than `most_bytes`."""
        for num_offloaded in range(len(self._units), 0, -1):
            plan = self.plan(num_offloaded, num_slots)
            if self.offloaded_bytes(plan) <= most_bytes:
                return plan
        return self.plan(0, num_slots)

    def _known(self, num_offloaded: int, num_slots: int) -> tuple[OffloadPlan, int]:
        key = (num_offloaded, num_slots)
        if key not in self._plans:
            plan = unmeasured_plan(self._units, num_offloaded, num_slots)
            self._plans[key] = plan, self.bytes_for(plan)
        return self._plans[key]
