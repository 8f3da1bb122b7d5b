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
    return homes + plan.slots_used * round_up(slot_bytes(units))


def slot_bytes(units: Sequence[Unit]) -> int:
    """Bytes of one slot: the largest unit fits."""
    return max(unit.num_bytes for unit in units)


def most_bytes(units: Sequence[Unit], round_up: RoundUp = align_up) -> int:
    """Device bytes that no plan exceeds: every unit at home, and slots larger than the smallest units they replace."""
    sizes = [round_up(unit.num_bytes) for unit in units]
    return sum(sizes) + min(MAX_SLOTS, len(sizes)) * (max(sizes) - min(sizes))


def unmeasured_plan(units: Sequence[Unit], num_offloaded: int, num_slots: int) -> OffloadPlan:
    """Placement before anything was measured: compute in proportion to bytes, a link as fast as the compute."""
    sizes = tuple(unit.num_bytes for unit in units)
    costs = StepCosts(compute_s=tuple(size / max(sizes) for size in sizes), unit_bytes=sizes, rest_s=len(sizes) / 10)
    return best_placement(num_offloaded, num_slots, costs, Link(bytes_per_s=float(max(sizes))))


def fewest_offloaded(
    units: Sequence[Unit], num_slots: int, budget_bytes: int, *, at_least: int = 0, round_up: RoundUp = align_up
) -> OffloadPlan | None:
    """k_min: the plan with the fewest units offloaded, `at_least` or more, that fits `budget_bytes`; None if none."""
    for num_offloaded in range(at_least, len(units) + 1):
        plan = unmeasured_plan(units, num_offloaded, num_slots)
        if plan_bytes(units, plan, round_up) <= budget_bytes:
            return plan
    return None
