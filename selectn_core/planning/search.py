"""The offline stage: of all plans that meet the objectives and fit memory, the interval range and what frees most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from selectn_core.errors import Change, Infeasible
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link
from selectn_core.memory.memory_model import DeviceNeed
from selectn_core.planning.candidates import (
    Candidate,
    Objective,
    Pace,
    UnitSet,
    candidates_of,
    meets,
    objective_bound_s,
    predicted_s,
    with_size_sets,
)

DEVICE_MEMORY, HOST_MEMORY, LINK, COMPUTE = "device memory", "host memory", "link bandwidth", "compute"
MOST_FACTOR = 2.0**20  # of bandwidth or compute that is tried: what needs more is as good as impossible
_FACTOR_STEP = 1.001


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one objective's steps take under a plan; seconds."""

    name: str
    predicted_s: float
    limit_s: float

    @property
    def spare_s(self) -> float:
        return self.limit_s - self.predicted_s


@dataclass(frozen=True, kw_only=True)
class PlanRange:
    """Between `k_min` and `k_max` units may be offloaded, and `plan` is the choice among them.

    `k_min` and `k_max` are the fewest and the most units of `unit_set` for which some placement and number of slots
    meet every objective and fit memory. `freed_bytes` is the device memory that `plan` has over one that offloads
    nothing; `device_bytes` the smallest device on which it runs, activations and KV included.
    """

    unit_set: str
    k_min: int
    k_max: int
    plan: OffloadPlan
    freed_bytes: int
    offloaded_bytes: int
    host_bytes: int
    device_bytes: int
    need: DeviceNeed
    predictions: tuple[Prediction, ...]

    @property
    def interval_range(self) -> tuple[float, float]:
        """[L / k_max, L / k_min]: the smallest interval allowed, and the largest (infinite where k_min is 0)."""
        smallest, largest = (self.plan.num_units / k if k else math.inf for k in (self.k_max, self.k_min))
        return smallest, largest


def search(unit_sets: Sequence[UnitSet], link: Link, *, slowdown: float = 0.0) -> PlanRange:
    """The plan that needs the least device memory within every objective; of equal ones the one with most on the host.

    All k, every number of slots below k, both placements (`placement.py`), all `unit_sets` and, where units are
    unequal, those of some sizes only and any few (`unit_sets.py`) compete, as in an exhaustive search. Most need no
    simulation: plans are tried from the least memory up, and what T_bound already rules out is never simulated. Among
    plans alike in memory the shortest predicted steps win. `slowdown` as in `while_copying`. All `unit_sets` name the
    same objectives and differ in memory only by what is resident.

    Raises Infeasible where no plan meets every objective and fits.
    """
    plans = _Plans(unit_sets, Pace(link=link, slowdown=slowdown))
    best = plans.best()
    if best is None:
        raise plans.infeasible()
    return plans.describe(best)


def least_limit_s(unit_sets: Sequence[UnitSet], link: Link, name: str, *, slowdown: float = 0.0) -> float:
    """The tightest limit of objective `name` that is feasible, the others being as they are; Infeasible if none is."""
    plans = _Plans(unit_sets, Pace(link=link, slowdown=slowdown))
    limit_s = plans.least_limit_s(name)
    if limit_s is None:
        raise plans.infeasible()
    return limit_s


class _Plans:
    """Every plan there is for some units, from the least device memory up, of equal ones the most on the host first."""

    def __init__(self, unit_sets: Sequence[UnitSet], pace: Pace) -> None:
        self.unit_sets, self.pace = with_size_sets(unit_sets), pace
        self.candidates = sorted((c for units in self.unit_sets for c in candidates_of(units)), key=_order)
        self._known: dict[Candidate, bool] = {}

    def meets(self, candidate: Candidate) -> bool:
        """Whether the plan meets every objective."""
        if candidate not in self._known:
            self._known[candidate] = meets(candidate, candidate.units.objectives, self.pace)
        return self._known[candidate]

    def best(self) -> Candidate | None:
        """The first that fits and meets the objectives; the fastest of those that are alike in memory."""
        first = next((c for c in self.candidates if c.fits and self.meets(c)), None)
        if first is None:
            return None
        alike = [c for c in self.candidates if _order(c) == _order(first) and c.fits and self.meets(c)]
        return min(alike, key=self._times_s)

    def _times_s(self, candidate: Candidate) -> tuple[float, ...]:
        return tuple(predicted_s(objective, candidate, self.pace) for objective in candidate.units.objectives)

    def describe(self, best: Candidate) -> PlanRange:
        """What people and controllers want to know of `best`, and the range around it."""
        units, memory = best.units, best.units.memory
        mine = sorted((c for c in self.candidates if c.units is units), key=lambda c: len(c.offloaded))
        freed_sectors = mine[0].home_sectors - best.home_sectors - best.slot_sectors
        need = memory.need(home_sectors=best.home_sectors, slot_sectors=best.slot_sectors, kv_sectors=units.kv_sectors)
        return PlanRange(
            unit_set=units.name,
            k_min=self._first_k(mine),
            k_max=self._first_k(reversed(mine)),
            plan=best.plan,
            freed_bytes=freed_sectors * memory.kv.sector_bytes,
            offloaded_bytes=best.offloaded_bytes,
            host_bytes=best.host_bytes,
            device_bytes=best.device_bytes,
            need=need,
            predictions=tuple(
                Prediction(name=objective.name, predicted_s=time_s, limit_s=objective.limit_s)
                for objective, time_s in zip(units.objectives, self._times_s(best), strict=True)
            ),
        )

    def _first_k(self, candidates: Iterable[Candidate]) -> int:
        return next(len(c.offloaded) for c in candidates if c.fits and self.meets(c))

    # -- where none is feasible ----------------------------------------------------------------------------------

    def infeasible(self) -> Infeasible:
        """What limits, and what would help."""
        return Infeasible(limiting=self.limiting(), changes=self.changes())

    def limiting(self) -> str:
        """The quantity without which, however much there were of those after it, nothing would be feasible."""
        if not any(all(o.unloaded_s <= o.limit_s for o in units.objectives) for units in self.unit_sets):
            return COMPUTE
        if not any(c.fits_device for c in self.candidates):
            return DEVICE_MEMORY
        return LINK if any(c.fits for c in self.candidates) else HOST_MEMORY

    def changes(self) -> list[Change]:
        """For each quantity the value nearest to what it is now that makes a plan feasible, all others kept."""
        memory, link = self.unit_sets[0].memory, self.pace.link
        wider = self._least_factor(lambda x: replace(self.pace, link=replace(link, bytes_per_s=link.bytes_per_s * x)))
        faster = self._least_factor(lambda x: replace(self.pace, speedup=x))
        needed_bytes_per_s = None if wider is None else link.bytes_per_s * wider
        changes = [
            Change(quantity=DEVICE_MEMORY, unit="bytes", now=memory.device_bytes, needed=self._least_device_bytes()),
            Change(quantity=HOST_MEMORY, unit="bytes", now=memory.host_bytes, needed=self._least_host_bytes()),
            Change(quantity=LINK, unit="bytes/s", now=link.bytes_per_s, needed=needed_bytes_per_s),
            Change(quantity=COMPUTE, unit="x", now=1.0, needed=faster),
            *(
                Change(quantity=o.name, unit="s", now=o.limit_s, needed=self.least_limit_s(o.name))
                for o in self.unit_sets[0].objectives
            ),
        ]
        return [change for change in changes if change.now is not None and math.isfinite(change.now)]

    def _least_device_bytes(self) -> int | None:
        return next((c.device_bytes for c in self.candidates if c.fits_host and self.meets(c)), None)

    def _least_host_bytes(self) -> int | None:
        by_host = sorted((c for c in self.candidates if c.fits_device), key=lambda c: c.host_bytes)
        return next((c.host_bytes for c in by_host if self.meets(c)), None)

    def least_limit_s(self, name: str) -> float | None:
        """The shortest that this objective's steps take under any plan that fits and meets the others."""
        least_s = math.inf
        for candidate in (c for c in self.candidates if c.fits):
            objective, others = _split(candidate.units.objectives, name)
            if objective_bound_s(objective, candidate, self.pace) < least_s and meets(candidate, others, self.pace):
                least_s = min(least_s, predicted_s(objective, candidate, self.pace))
        return None if math.isinf(least_s) else least_s

    def _least_factor(self, pace_at: Callable[[float], Pace]) -> float | None:
        """The smallest factor from 1 up, to 0.1 %, at which some plan that fits is fast enough.

        None where none is at `MOST_FACTOR`.
        """
        least: float | None = None
        for candidate in sorted((c for c in self.candidates if c.fits), key=lambda c: c.offloaded_bytes):
            objectives = candidate.units.objectives
            low, high = 1.0, least / _FACTOR_STEP if least else MOST_FACTOR
            if not meets(candidate, objectives, pace_at(high)):
                continue
            while high > low * _FACTOR_STEP:
                middle = math.sqrt(low * high)
                low, high = (low, middle) if meets(candidate, objectives, pace_at(middle)) else (middle, high)
            least = high
        return least


def _order(candidate: Candidate) -> tuple[int, int]:
    return candidate.device_bytes, -candidate.offloaded_bytes


def _split(objectives: Sequence[Objective], name: str) -> tuple[Objective, list[Objective]]:
    """The objective of that name, and the others."""
    return next(o for o in objectives if o.name == name), [o for o in objectives if o.name != name]
