"""Which plans fit a device, and which of them to run: the offline stage's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selectn_core.config import MAX_SLOTS
from selectn_core.device import align_up
from selectn_core.latency import Link, StepCosts
from selectn_core.placement import OffloadPlan, best_placement
from selectn_core.units import Unit

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
    among: Sequence[int] | None = None,
    round_up: RoundUp = align_up,
) -> OffloadPlan | None:
    """k_min: the plan with the fewest units offloaded, `at_least` or more, that fits `budget_bytes`; None if none.

    Only units `among` are offloaded; a budget that needs others has no plan.
    """
    most = len(units) if among is None else len(set(among))
    for num_offloaded in range(at_least, most + 1):
        plan = unmeasured_plan(units, num_offloaded, num_slots, among=among)
        if plan_bytes(units, plan, round_up) <= budget_bytes:
            return plan
    return None
