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
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from selectn_core.latency import Link, StepCosts, predict_step_s
from selectn_core.placement import OffloadPlan, freed_bytes, place_integer_interval, timed_placement
from selectn_core.remembered import Remembered, alike

MOST_SLOTS = 4
_ROUNDING = 1e-9


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


class Policy(ABC):
    """Names the plan for a step. `adapts` is False for those that never change it."""

    name: str
    adapts: bool = False

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
        return self._steps.largest(situation, self._steps.integer_intervals)


class SelectN(Policy):
    """The k and S that free the most device memory within the limit; placed so that the fewest units have to move."""

    name, adapts = "select-n", True

    def __init__(self, steps: Frontier) -> None:
        self._steps = steps

    def choose(self, situation: Situation) -> OffloadPlan:
        return self._steps.largest(situation, self._steps.every_plan)


class Frontier:
    """Every candidate plan and what its step takes, from the most device memory freed down."""

    def __init__(
        self, unit_bytes: Sequence[int], sets: Sequence[Sequence[int]] = (), max_slots: int = MOST_SLOTS
    ) -> None:
        """`sets`: units of which a plan offloads some and no others, e.g. all MLP blocks; all units are one too."""
        self.num_units, self._unit_bytes = len(unit_bytes), unit_bytes
        everything = tuple(range(self.num_units))
        self._remembered = Remembered()
        nothing = _Candidate(
            among=everything, num_offloaded=0, num_slots=1, interval=None, offloaded_bytes=0, freed_bytes=0
        )
        intervals = _integer_intervals(unit_bytes)
        self.integer_intervals = _Candidates([*intervals, nothing])
        even = [each for among in (everything, *sets) for each in _even(tuple(among), unit_bytes, max_slots)]
        # The most memory freed first; of equals those with most on the host.
        most_first = sorted([*even, *intervals], key=lambda c: (c.freed_bytes, c.num_offloaded), reverse=True)
        self.every_plan = _Candidates([*most_first, nothing])

    def largest(self, situation: Situation, candidates: _Candidates) -> OffloadPlan:
        """What frees most within the limit and the range; the one with the fewest in the range if nothing is."""
        low, high = situation.min_freed_bytes, situation.max_offloaded_bytes
        costs, link, limit_s = situation.costs, situation.link, situation.limit_s * (1 + _ROUNDING)
        key = alike(costs, link)
        most_bytes = limit_s * link.bytes_per_s  # at least what is freed is copied
        first = bisect_left(candidates.by_freed, -most_bytes, key=lambda c: -c.freed_bytes)
        for candidate in candidates.by_freed[first:] if costs.unloaded_s <= limit_s else ():
            if not candidate.is_within(low, high):
                continue
            bound_s = candidate.bound_s(costs, link)
            if bound_s > limit_s:
                continue
            # Slots make no step longer: what is too slow with the most of them is asked once, not once for each number.
            if candidate.roomiest and self._excess(candidate.roomiest, key, costs, link)[0] * bound_s > limit_s:
                continue
            excess, plan = self._excess(candidate, key, costs, link)
            if excess * bound_s <= limit_s and self._is_enough(plan, low):
                return plan
        # Nothing is fast enough: as little as memory allows.
        plans = (self._excess(c, key, costs, link)[1] for c in candidates.by_offloaded if c.is_within(low, None))
        most = candidates.by_freed[0]
        return next((p for p in plans if self._is_enough(p, low)), None) or self._excess(most, key, costs, link)[1]

    def _is_enough(self, plan: OffloadPlan, min_freed_bytes: float) -> bool:
        """Whether it frees so much in truth: a candidate counts average units, and blocks are unequal."""
        return freed_bytes(plan, self._unit_bytes) >= min_freed_bytes

    def _excess(self, candidate: _Candidate, key: Hashable, costs: StepCosts, link: Link) -> tuple[float, OffloadPlan]:
        return self._remembered.get((id(candidate), key), partial(self._step, candidate, costs, link))

    def _step(self, candidate: _Candidate, costs: StepCosts, link: Link) -> tuple[float, OffloadPlan]:
        """The step's time over its bound, and the plan."""
        if candidate.interval is None:
            step_s, plan = timed_placement(
                candidate.num_offloaded, candidate.num_slots, costs, link, among=candidate.among
            )
        else:
            chosen = place_integer_interval(candidate.interval, self.num_units)
            plan = OffloadPlan(offloaded=chosen, num_slots=candidate.num_slots, num_units=self.num_units)
            step_s = predict_step_s(costs, chosen, plan.num_slots, link)
        return step_s / candidate.bound_s(costs, link), plan


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """k of the units in `among` through S slots: evenly placed, or of every `interval` units the last.

    The bytes are exact where units of one set are alike; otherwise averages.
    """

    among: tuple[int, ...]
    num_offloaded: int
    num_slots: int
    interval: int | None
    offloaded_bytes: float
    freed_bytes: float
    roomiest: _Candidate | None = None  # the same with more slots, the most that compete

    def bound_s(self, costs: StepCosts, link: Link) -> float:
        """T_bound, of average units."""
        if self.num_offloaded <= self.num_slots:
            return costs.unloaded_s
        return max(costs.unloaded_s, self.offloaded_bytes / link.bytes_per_s + self.num_offloaded * link.copy_s)

    def is_within(self, min_freed_bytes: float, max_offloaded_bytes: float | None) -> bool:
        most = max_offloaded_bytes
        return self.freed_bytes >= min_freed_bytes and (most is None or self.offloaded_bytes <= most)


class _Candidates:
    """Plans from the most device memory freed down, in the order given, and from the fewest bytes offloaded up."""

    def __init__(self, by_freed: Sequence[_Candidate]) -> None:
        self.by_freed = by_freed
        self.by_offloaded = sorted(by_freed, key=lambda c: (c.offloaded_bytes, -c.freed_bytes))


def _even(among: tuple[int, ...], unit_bytes: Sequence[int], max_slots: int) -> list[_Candidate]:
    sizes = [unit_bytes[unit] for unit in among]
    average, largest = sum(sizes) / len(sizes), max(sizes)
    candidates = []
    for k in range(1, len(among) + 1):
        roomiest = None
        for num_slots in range(max(1, min(max_slots, k - 1)), 0, -1):
            candidate = _Candidate(
                among=among,
                num_offloaded=k,
                num_slots=num_slots,
                interval=None,
                offloaded_bytes=k * average,
                freed_bytes=k * average - num_slots * largest,
                roomiest=roomiest,
            )
            candidates.append(candidate)
            roomiest = roomiest or candidate
    return candidates


def _integer_intervals(unit_bytes: Sequence[int]) -> list[_Candidate]:
    num_units, average = len(unit_bytes), sum(unit_bytes) / len(unit_bytes)
    return [
        _Candidate(
            among=tuple(range(num_units)),
            num_offloaded=num_units // n,
            num_slots=1,
            interval=n,
            offloaded_bytes=num_units // n * average,
            freed_bytes=num_units // n * average - max(unit_bytes),
        )
        for n in range(1, num_units + 1)
    ]


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
