"""Every plan there is for some units: what it takes of memory, and, when somebody asks, of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from selectn_core.latency.placement import OffloadPlan, place_by_index, place_evenly
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.latency.step_times import scaled, while_copying
from selectn_core.memory.memory_model import MemoryModel
from selectn_core.planning.unit_sets import size_sets, unequal_few

_ROUNDING = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`steps`, one after the other, may take `limit_s` seconds: one decode step (TPOT), a prompt's chunks (TTFT)."""

    name: str
    limit_s: float
    steps: tuple[StepCosts, ...]

    @cached_property
    def distinct_steps(self) -> tuple[tuple[StepCosts, int], ...]:
        """Each different step, and how many there are of it."""
        return tuple(Counter(self.steps).items())

    @cached_property
    def unloaded_s(self) -> float:
        return sum(costs.unloaded_s for costs in self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitSet:
    """Units of one granularity that may be offloaded, what steps of them cost, and the memory that they must fit.

    Attributes:
        name: for people: "LlamaDecoderLayer", "LlamaMLP".
        objectives: at least one; all their costs describe the same units.
        memory: what there is; `resident_bytes` is what belongs to no unit of this granularity.
        kv_sectors: what the KV cache must hold.
        among: the units that may be offloaded; None: any.
    """

    name: str
    objectives: tuple[Objective, ...]
    memory: MemoryModel
    kv_sectors: int = 0
    among: tuple[int, ...] | None = None

    @property
    def unit_bytes(self) -> tuple[int, ...]:
        return self.objectives[0].steps[0].unit_bytes

    @cached_property
    def longest_steps(self) -> tuple[StepCosts, ...]:
        """Of each objective's steps the longest."""
        return tuple(max(each.steps, key=lambda costs: costs.unloaded_s) for each in self.objectives)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What predictions count on: a link, by how much a busy one slows compute, and a factor on the speed of compute."""

    link: Link
    slowdown: float = 0.0
    speedup: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A plan, and what it takes whatever the time: sectors, bytes on the host, the smallest device."""

    units: UnitSet
    offloaded: tuple[int, ...]
    num_slots: int
    home_sectors: int
    slot_sectors: int
    offloaded_bytes: int
    device_bytes: int

    @property
    def plan(self) -> OffloadPlan:
        num_units = len(self.units.unit_bytes)
        return OffloadPlan(offloaded=self.offloaded, num_slots=self.num_slots, num_units=num_units)

    @property
    def fits_device(self) -> bool:
        capacity = self.units.memory.device_bytes
        return capacity is None or self.device_bytes <= capacity

    @property
    def host_bytes(self) -> int:
        return self.units.memory.host_bytes_for(self.offloaded_bytes)

    @property
    def fits_host(self) -> bool:
        limit = self.units.memory.host_bytes
        return limit is None or self.host_bytes <= limit

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def with_size_sets(unit_sets: Sequence[UnitSet]) -> list[UnitSet]:
    """The sets, and for each of all units those by size (`size_sets`) that are not among them."""
    known, sets = {(units.unit_bytes, units.among) for units in unit_sets}, list(unit_sets)
    for units in unit_sets:
        everything = tuple(range(len(units.unit_bytes)))
        for among in size_sets(units.unit_bytes) if units.among is None else ():
            if among != everything and (units.unit_bytes, among) not in known:
                known.add((units.unit_bytes, among))
                sizes = [units.unit_bytes[unit] for unit in among]
                extent = dict.fromkeys(f"{size:,}" for size in (min(sizes), max(sizes)))
                name = f"{units.name} of {' to '.join(extent)} bytes"
                sets.append(replace(units, name=name, among=among))
    return sets


def candidates_of(units: UnitSet) -> Iterator[Candidate]:
    """Nothing offloaded, and every k, placement and number of slots below k: with k slots nothing would be freed.

    Where units are unequal and any of them may be offloaded, few at a time too (`unequal_few`). Which there are depends
    on neither link, limits nor memory, so none is lost where one of these grows.
    """
    yield candidate_of(units, (), 1)
    for offloaded in _few(units):
        yield from _through_slots(units, offloaded)
    allowed = len(units.unit_bytes) if units.among is None else len(units.among)
    for num_offloaded in range(2, allowed + 1):
        for offloaded in _placements(units, num_offloaded):
            yield from _through_slots(units, offloaded)


def _through_slots(units: UnitSet, offloaded: tuple[int, ...]) -> Iterator[Candidate]:
    for num_slots in range(1, min(units.memory.max_slots, len(offloaded) - 1) + 1):
        yield candidate_of(units, offloaded, num_slots)


def _placements(units: UnitSet, num_offloaded: int) -> list[tuple[int, ...]]:
    """Even in the time of each objective's longest step, and even by index."""
    evenly = [place_evenly(num_offloaded, costs, among=units.among) for costs in units.longest_steps]
    by_index = place_by_index(num_offloaded, len(units.unit_bytes), among=units.among)
    return list(dict.fromkeys([*evenly, by_index]))


def _few(units: UnitSet) -> list[tuple[int, ...]]:
    if units.among is not None:
        return []
    return list(dict.fromkeys(few for costs in units.longest_steps for few in unequal_few(costs)))


def candidate_of(units: UnitSet, offloaded: tuple[int, ...], num_slots: int) -> Candidate:
    """The plan that offloads these units, ascending, through so many slots, and what it takes of memory."""
    sizes, memory = units.unit_bytes, units.memory
    sectors = memory.unit_sectors(sizes)
    away = [sectors[unit] for unit in offloaded]
    home_sectors, slot_sectors = sum(sectors) - sum(away), min(num_slots, len(away)) * max(away, default=0)
    return Candidate(
        units=units,
        offloaded=offloaded,
        num_slots=num_slots,
        home_sectors=home_sectors,
        slot_sectors=slot_sectors,
        offloaded_bytes=sum(sizes[unit] for unit in offloaded),
        device_bytes=memory.device_bytes_for(home_sectors + slot_sectors + units.kv_sectors),
    )


def meets(candidate: Candidate, objectives: Iterable[Objective], pace: Pace) -> bool:
    """Whether every one of these objectives is met at this pace. What T_bound rules out is not simulated."""
    objectives = list(objectives)
    if any(objective_bound_s(o, candidate, pace) > o.limit_s * _ROUNDING for o in objectives):
        return False
    return all(predicted_s(o, candidate, pace) <= o.limit_s * _ROUNDING for o in objectives)


def predicted_s(objective: Objective, candidate: Candidate, pace: Pace) -> float:
    """Seconds of the objective's steps under the plan, by the recurrence."""
    total_s = 0.0
    for costs, count in objective.distinct_steps:
        costs = while_copying(scaled(costs, 1 / pace.speedup), candidate.offloaded_bytes, pace.link, pace.slowdown)
        total_s += count * predict_step_s(costs, candidate.offloaded, candidate.num_slots, pace.link)
    return total_s


def objective_bound_s(objective: Objective, candidate: Candidate, pace: Pace) -> float:
    """T_bound of these steps (`latency.bound_s`), with what a busy link adds to compute left out."""
    link = pace.link
    copies_s = candidate.offloaded_bytes / link.bytes_per_s + len(candidate.offloaded) * link.copy_s
    return sum(n * max(costs.unloaded_s / pace.speedup, copies_s) for costs, n in objective.distinct_steps)
