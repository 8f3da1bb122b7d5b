"""What is asked of the planner: a workload and its objectives; and the inverse questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from selectn_core.errors import Infeasible, NotMeasured, RecordRefused
from selectn_core.latency.recurrence import Link, StepCosts
from selectn_core.latency.steps import StepShape
from selectn_core.memory.memory_model import MemoryModel
from selectn_core.planning.candidates import Candidate, Objective, Pace, UnitSet, candidate_of, meets
from selectn_core.planning.search import PlanRange, least_limit_s, search

if TYPE_CHECKING:
    from selectn_core.planning.record import PerformanceRecord

TPOT, TTFT = "TPOT", "TTFT"
_LARGEST = 1 << 24


class CostModel(Protocol):
    """What a step is sure not to exceed (`latency.step_times.StepTimes` of a performance record does)."""

    def conservative(self, shape: StepShape) -> StepCosts:
        """Costs that a step of this shape does not exceed. Raises NotMeasured."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`batch` requests at a time, each of `length` tokens when it ends, and what they may take.

    Attributes:
        tpot_s: limit of a decode step of the whole batch at its longest; None: none.
        ttft_s: limit of a prompt's chunks, one after the other; waiting for a place in the batch is not in it.
        prompt: tokens of the longest prompt; None: as long as `length`.
        chunk_tokens: prefill tokens of one step at most (`batch.max_batch_tokens`).
        admitted_tokens: 0: a prompt's chunks run in steps of their own, which the TPOT of others does not count. More:
            a decode step takes along a chunk of so many tokens, which its TPOT counts, and a prompt is cut to them.
    """

    batch: int
    length: int
    tpot_s: float | None = None
    ttft_s: float | None = None
    prompt: int | None = None
    chunk_tokens: int = 256
    admitted_tokens: int = 0

    def with_limit(self, name: str, limit_s: float) -> Workload:
        """The same with another limit for TPOT or TTFT."""
        return replace(self, tpot_s=limit_s) if name == TPOT else replace(self, ttft_s=limit_s)

    def tpot_shape(self) -> StepShape:
        """The decode step, whose requests sample, with the last chunk of a prompt in it where one is let in."""
        admitted = min(self.admitted_tokens, self._prompt)
        prefills = [(admitted, self._prompt - admitted)] if admitted else []
        return StepShape.of(prefills=prefills, decodes=[self.length] * self.batch).sampling()

    def ttft_shapes(self) -> list[StepShape]:
        """The steps of a prompt's chunks; the rest of the batch decodes in them where it takes them along."""
        size = self.admitted_tokens or self.chunk_tokens
        others = [self.length] * (self.batch - 1) if self.admitted_tokens else []
        starts = range(0, self._prompt, size)
        return [StepShape.of([(min(size, self._prompt - start), start)], others).sampling() for start in starts]

    @property
    def _prompt(self) -> int:
        return self.length if self.prompt is None else min(self.prompt, self.length)


@dataclass(frozen=True, kw_only=True)
class UnitSource:
    """One granularity: its times, its memory, and by name the units of it that may be offloaded (None: all)."""

    times: CostModel
    memory: MemoryModel
    sets: Mapping[str, tuple[int, ...] | None]

    def unit_sets(self, workload: Workload) -> list[UnitSet]:
        """Each set, with this workload's objectives. Raises NotMeasured."""
        objectives = tuple(_objectives(workload, self.times))
        kv_sectors = self.memory.kv.sectors_for_batch(workload.batch, workload.length)
        return [
            UnitSet(name=name, objectives=objectives, memory=self.memory, kv_sectors=kv_sectors, among=among)
            for name, among in self.sets.items()
        ]


def _objectives(workload: Workload, times: CostModel) -> Iterator[Objective]:
    # Without a limit of its own a decode step is still predicted: the planner says what it takes.
    tpot_s = math.inf if workload.tpot_s is None else workload.tpot_s
    yield Objective(name=TPOT, limit_s=tpot_s, steps=(times.conservative(workload.tpot_shape()),))
    if workload.ttft_s is not None:
        steps = tuple(times.conservative(shape) for shape in workload.ttft_shapes())
        yield Objective(name=TTFT, limit_s=workload.ttft_s, steps=steps)


def planner_of(
    records: Sequence[PerformanceRecord],
    *,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    bytes_per_s: float | None = None,
    max_slots: int = 4,
) -> Planner:
    """A planner for one model on one machine, from a record of it per granularity (`offload.unit`).

    Memory that is None is as much as it takes; `bytes_per_s` None is the link as it was measured. Where there are
    several kinds of unit (attention and MLP blocks), those of one kind alone are offered too. Raises RecordRefused
    where the records are not of the same model and machine.
    """
    first, *others = records
    for other in others:
        if differences := replace(first.fingerprint, unit=other.fingerprint.unit).differences(other.fingerprint):
            raise RecordRefused(
                "the records are not of one model on one machine:\n  "
                + "\n  ".join(line.replace("running is", "the other") for line in differences)
            )
    slowest = min((record.link.link for record in records), key=lambda link: link.bytes_per_s)
    return Planner(
        sources=tuple(_source(record, device_bytes, host_bytes, max_slots) for record in records),
        link=slowest if bytes_per_s is None else replace(slowest, bytes_per_s=bytes_per_s),
        slowdown=max(record.link.slowdown for record in records),
    )


def _source(record: PerformanceRecord, device_bytes: int | None, host_bytes: int | None, max_slots: int) -> UnitSource:
    memory = record.memory
    return UnitSource(
        times=record.step_times(),
        memory=MemoryModel(
            resident_bytes=memory.resident_bytes,
            kv=memory.geometry,
            num_reserved_sectors=memory.num_reserved_sectors,
            workspace=memory.workspace,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            host_store_bytes=sum(record.unit_bytes) + memory.resident_bytes,
            max_slots=max_slots,
        ),
        sets=offloadable_sets([record.kinds[kind].name for kind in record.unit_kinds], record.fingerprint.unit),
    )


def offloadable_sets(kind_names: Sequence[str], granularity: str) -> dict[str, tuple[int, ...] | None]:
    """All units, and those of each class of module where there are several: "LlamaMLP", of "LlamaMLP/sliding#2" too."""
    classes = [name.split("/")[0].split("#")[0] for name in kind_names]
    sets: dict[str, tuple[int, ...] | None] = {f"every {granularity}": None}
    if len(set(classes)) > 1:
        for wanted in dict.fromkeys(classes):
            sets[f"every {wanted}"] = tuple(unit for unit, name in enumerate(classes) if name == wanted)
    return sets


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest value that is feasible, the plan there, and what stands in the way of one more."""

    value: int
    plan: PlanRange
    stopped_by: str


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Answers for one model on one machine. Every answer raises Infeasible, or NotMeasured outside of what was."""

    sources: Sequence[UnitSource]
    link: Link
    slowdown: float = 0.0

    def plan(self, workload: Workload) -> PlanRange:
        """The interval range and the choice for this workload."""
        return search(self._unit_sets(workload), self.link, slowdown=self.slowdown)

    def largest_batch(self, workload: Workload) -> Largest:
        """The most requests at a time; `workload.batch` is not looked at."""
        return self._largest(lambda batch: replace(workload, batch=batch))

    def longest_input(self, workload: Workload) -> Largest:
        """The most tokens that every request of the batch may have, its prompt included."""
        return self._largest(lambda length: replace(workload, length=length))

    def tightest(self, workload: Workload, name: str) -> tuple[float, PlanRange]:
        """The smallest TPOT or TTFT, in seconds, that is feasible beside the other objective; and the plan there."""
        without = self._unit_sets(workload.with_limit(name, math.inf))
        limit_s = least_limit_s(without, self.link, name, slowdown=self.slowdown)
        return limit_s, self.plan(workload.with_limit(name, limit_s))

    def candidate(self, workload: Workload, offloaded: tuple[int, ...], num_slots: int) -> Candidate:
        """A plan that was not searched for, of the first source's units: whether it `fits`, and what it takes."""
        return candidate_of(self.sources[0].unit_sets(workload)[0], offloaded, num_slots)

    def meets(self, candidate: Candidate) -> bool:
        """Whether a plan meets every objective that it was made with, fit or not."""
        return meets(candidate, candidate.units.objectives, Pace(link=self.link, slowdown=self.slowdown))

    def _unit_sets(self, workload: Workload) -> list[UnitSet]:
        return [units for source in self.sources for units in source.unit_sets(workload)]

    def _largest(self, workload_of: Callable[[int], Workload]) -> Largest:
        """Doubles while it is feasible, then halves the gap: feasible for one means feasible for fewer."""
        plan, low, high, stopped_by = self.plan(workload_of(1)), 1, _LARGEST, "nothing up to there"
        step = 1
        while low < high:
            middle = min(low + step, high) if high == _LARGEST else (low + high + 1) // 2
            step *= 2
            try:
                plan, low = self.plan(workload_of(middle)), middle
            except (Infeasible, NotMeasured) as error:
                stopped_by = error.limiting if isinstance(error, Infeasible) else str(error)
                high = middle - 1
        return Largest(value=low, plan=plan, stopped_by=stopped_by)
