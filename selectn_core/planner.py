"""Which plans fit a device, and which of them to run: the offline stage's choice."""

from __future__ import annotations

from collections.abc import Sequence

from selectn_core.device import align_up
from selectn_core.latency import Link, StepCosts
from selectn_core.placement import OffloadPlan, best_placement
from selectn_core.units import Unit


def plan_bytes(units: Sequence[Unit], plan: OffloadPlan) -> int:
    """Device bytes of the units under `plan`: a home for each resident one, and the slots."""
    away = set(plan.offloaded)
    homes = sum(align_up(unit.num_bytes) for unit in units if unit.index not in away)
    return homes + plan.slots_used * slot_bytes(units)


def slot_bytes(units: Sequence[Unit]) -> int:
    """Device bytes of one slot: the largest unit fits."""
    return align_up(max(unit.num_bytes for unit in units))


def unmeasured_plan(units: Sequence[Unit], num_offloaded: int, num_slots: int) -> OffloadPlan:
    """Placement before anything was measured: compute in proportion to bytes, a link as fast as the compute."""
    sizes = tuple(unit.num_bytes for unit in units)
    costs = StepCosts(compute_s=tuple(size / max(sizes) for size in sizes), unit_bytes=sizes, rest_s=len(sizes) / 10)
    return best_placement(num_offloaded, num_slots, costs, Link(bytes_per_s=float(max(sizes))))


def fewest_offloaded(units: Sequence[Unit], num_slots: int, budget_bytes: int) -> OffloadPlan | None:
    """k_min: the plan that offloads the fewest units of those that fit `budget_bytes`; None if none does."""
    for num_offloaded in range(len(units) + 1):
        plan = unmeasured_plan(units, num_offloaded, num_slots)
        if plan_bytes(units, plan) <= budget_bytes:
            return plan
    return None
