"""The nearest plan that a server can follow which knows layers by groups only: of every N the last M are offloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from selectn_core.latency.placement import OffloadPlan


@dataclass(frozen=True, kw_only=True)
class Group:
    """Of every `size` consecutive layers the last `num_in_group` are offloaded, and `step` of these are copied ahead.

    `step` counts offloaded layers. It is at least `num_in_group`: those of one group follow each other, so with a
    smaller step all but the first would be copied while nothing computes.
    """

    size: int
    num_in_group: int
    step: int

    def offloaded(self, num_layers: int) -> tuple[int, ...]:
        """The layers that are offloaded, ascending."""
        return tuple(layer for layer in range(num_layers) if layer % self.size >= self.size - self.num_in_group)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A group, and what is true of it: within memory, within the objectives."""

    group: Group
    fits: bool
    meets: bool


def nearest_group(
    plan: OffloadPlan,
    max_step: int,
    *,
    fits: Callable[[Group], bool],
    meets: Callable[[Group], bool],
) -> Choice:
    """The group that is nearest to a plan that offloads two or more layers; `step` is at most `max_step`.

    What counts, in this order: that it fits memory; that it meets the objectives; that it offloads no more layers than
    the plan; how many fewer or more; that `step` divides their number, so that a buffer's next layer is always the
    one that it is free for; few neighbours; a `step` near to the plan's slots. So fewer are offloaded than in the plan
    only where memory allows, and more only where no fewer do (or where there are less than four layers in all).

    Raises ValueError for a plan of fewer than two layers, which frees nothing.
    """
    if plan.num_offloaded < 2:
        raise ValueError(f"num_offloaded={plan.num_offloaded}: expected two or more")
    groups = sorted(_groups(plan.num_units, max_step), key=lambda group: _order(group, plan))
    within = [group for group in groups if fits(group)]
    for group in within:
        if meets(group):
            return Choice(group=group, fits=True, meets=True)
    return Choice(group=(within or groups)[0], fits=bool(within), meets=False)


def _order(group: Group, plan: OffloadPlan) -> tuple[bool, int, bool, int, int]:
    count = len(group.offloaded(plan.num_units))
    return (
        count > plan.num_offloaded,
        abs(count - plan.num_offloaded),
        count % group.step != 0,
        group.num_in_group,
        abs(group.step - plan.num_slots),
    )


def _groups(num_layers: int, max_step: int) -> Iterator[Group]:
    """Every number of layers that groups can offload, by the most even groups that do; buffers for fewer than all."""
    for num_in_group in range(1, max_step + 1):
        evenest: dict[int, Group] = {}
        for size in range(num_in_group, num_layers + 1):
            group = Group(size=size, num_in_group=num_in_group, step=num_in_group)
            count = len(group.offloaded(num_layers))
            known = evenest.get(count)
            if known is None or _unevenness(group, count, num_layers) < _unevenness(known, count, num_layers):
                evenest[count] = group
        for count, group in evenest.items():
            for step in range(num_in_group, min(max_step, count - 1) + 1):
                yield replace(group, step=step)


def _unevenness(group: Group, count: int, num_layers: int) -> float:
    """How far the groups are from sharing all layers evenly."""
    return abs(group.size * count / group.num_in_group - num_layers)
