"""Who decides what is offloaded: Select-N's own policy, and the ones it is compared with, on one executor.

A policy sees what a step costs now, the link it may use and the time the step may take, and names a plan. All else
(batching, chunked prefill within the objectives, KV cache, copies) is the same for every policy.

| name | whose way | plan |
|---|---|---|
| `select-n` | ours, the default | any k and S, every iteration: the most device memory freed within the limit |
| `paper` | Select-N, arXiv 2502.08182 | the smallest integer interval N within the limit, one slot, every iteration |
| `static` | FlexGen, arXiv 2303.06865, as that paper adapted it | fixed: the most that meets the objective at worst |
| `group` | vLLM's prefetch offloader | fixed: of every N layers the last, N by hand |
| `all` | DeepSpeed ZeRO-Inference, arXiv 2207.00032 | fixed: every layer, one ahead |
| `none` | no offloading | fixed: as little as memory allows |
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from selectn_core.control.frontier import MOST_SLOTS, Frontier, Situation
from selectn_core.latency.placement import OffloadPlan, place_integer_interval, timed_placement
from selectn_core.latency.recurrence import Link, StepCosts

__all__ = [
    "MOST_SLOTS",
    "Fixed",
    "Frontier",
    "Paper",
    "Policy",
    "SelectN",
    "Situation",
    "every_unit_one_ahead",
    "last_of_every_group",
    "worst_case_share",
]


class Policy(ABC):
    """Names the plan for a step.

    `adapts` is False for those that never change it. With `any_units` others that free as much do as well: those that
    are offloaded already are kept where they can be.
    """

    name: str
    adapts: bool = False
    any_units: bool = False

    @abstractmethod
    def choose(self, situation: Situation) -> OffloadPlan:
        """The plan to go to."""


class Fixed(Policy):
    """One plan, whatever happens: `none`, `all`, `group` and `static` differ in how it was found."""

    def __init__(self, name: str, plan: OffloadPlan) -> None:
        self.name, self.plan = name, plan

    def choose(self, situation: Situation) -> OffloadPlan:
        return self.plan


class Paper(Policy):
    """The smallest integer interval whose step stays within the limit, through one slot."""

    name, adapts = "paper", True

    def __init__(self, steps: Frontier) -> None:
        self._steps = steps

    def choose(self, situation: Situation) -> OffloadPlan:
        return self._steps.largest_interval(situation)


class SelectN(Policy):
    """The k and S that free the most device memory within the limit; placed so that the fewest units have to move."""

    name, adapts, any_units = "select-n", True, True

    def __init__(self, steps: Frontier) -> None:
        self._steps = steps

    def choose(self, situation: Situation) -> OffloadPlan:
        return self._steps.freest(situation)


def every_unit_one_ahead(num_units: int) -> OffloadPlan:
    """ZeRO-Inference: every layer is fetched for every step, the next one while one computes."""
    return OffloadPlan(offloaded=tuple(range(num_units)), num_slots=2 if num_units > 1 else 1, num_units=num_units)


def last_of_every_group(interval: int, num_units: int) -> OffloadPlan:
    """vLLM's prefetch offloader with a group of `interval` layers, one offloaded in each, prefetched one ahead."""
    return OffloadPlan(offloaded=place_integer_interval(interval, num_units), num_slots=1, num_units=num_units)


def worst_case_share(costs: StepCosts, link: Link, num_sharing: int, limit_s: float) -> OffloadPlan:
    """FlexGen's share as arXiv 2502.08182 adapted it: fixed offline, for the worst bandwidth there may be.

    That is a bus which `num_sharing` replicas use, all of them copying. `costs` are those of the largest decode step.
    The most layers whose step meets `limit_s` so; the next one is fetched while one computes, which takes two slots.
    """
    worst, num_units = Link(bytes_per_s=link.bytes_per_s / num_sharing, copy_s=link.copy_s), len(costs.compute_s)
    best = OffloadPlan(offloaded=(), num_slots=1, num_units=num_units)
    for k in range(1, num_units + 1):
        step_s, plan = timed_placement(k, min(2, k), costs, worst)
        if step_s <= limit_s:
            best = plan
    return best
