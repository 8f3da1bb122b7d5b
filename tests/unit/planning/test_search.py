"""The planner equals an exhaustive search through the recurrence, is monotone, and says truly what would help."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.errors import Infeasible
from selectn_core.latency.placement import place_by_index, place_evenly
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.latency.step_times import scaled, while_copying
from selectn_core.memory.kv_geometry import weight_sectors
from selectn_core.memory.memory_model import MemoryModel, kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.candidates import (
    Objective,
    Pace,
    UnitSet,
    candidates_of,
    objective_bound_s,
    predicted_s,
    with_size_sets,
)
from selectn_core.planning.search import (
    COMPUTE,
    DEVICE_MEMORY,
    HOST_MEMORY,
    LINK,
    MOST_FACTOR,
    PlanRange,
    least_limit_s,
    search,
)
from selectn_core.planning.unit_sets import unequal_few

SECTOR = 256
PLENTY = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question to the planner."""

    unit_sets: tuple[UnitSet, ...]
    link: Link
    slowdown: float

    def search(self) -> PlanRange:
        return search(self.unit_sets, self.link, slowdown=self.slowdown)

    def with_memory(self, **changes) -> Case:
        sets = tuple(replace(units, memory=replace(units.memory, **changes)) for units in self.unit_sets)
        return replace(self, unit_sets=sets)

    def with_limit(self, name, limit_s) -> Case:
        def relaxed(units):
            objectives = (replace(o, limit_s=limit_s) if o.name == name else o for o in units.objectives)
            return replace(units, objectives=tuple(objectives))

        return replace(self, unit_sets=tuple(map(relaxed, self.unit_sets)))

    def with_link(self, factor) -> Case:
        return replace(self, link=replace(self.link, bytes_per_s=self.link.bytes_per_s * factor))

    def with_compute(self, factor) -> Case:
        def changed(units):
            objectives = (
                replace(o, steps=tuple(scaled(costs, 1 / factor) for costs in o.steps)) for o in units.objectives
            )
            return replace(units, objectives=tuple(objectives))

        return replace(self, unit_sets=tuple(map(changed, self.unit_sets)))


@st.composite
def cases(draw):
    """One or two sets of unequal units, one or two objectives of one or three steps; limits around where they bind."""
    shape = draw(st.sampled_from([((1.0,),), ((1.0,), (3.0,)), ((1.0,), (3.0, 3.0, 2.0))]))
    units = [draw(unit_costs()) for _ in range(draw(st.integers(1, 2)))]
    total_bytes, unloaded_s = sum(units[0].unit_bytes), units[0].unloaded_s
    kv_sectors = draw(st.integers(0, 12))
    device_share = draw(st.one_of(st.none(), st.floats(0.1, 1.3)))
    host_share = draw(st.one_of(st.none(), st.floats(0.0, 1.2)))
    memory = MemoryModel(
        resident_bytes=draw(st.integers(0, 900)),
        kv=kv_of_tokens(SECTOR // 16),
        workspace=Workspace(
            step_bytes=draw(st.integers(0, 500)), bytes_per_sector=draw(st.sampled_from([0.0, 0.3, 7.5]))
        ),
        device_bytes=device_share and int(device_share * total_bytes) + (kv_sectors + 8) * SECTOR,
        host_bytes=host_share and int(host_share * total_bytes),
        host_store_bytes=draw(st.sampled_from([0, 0, 0, 3000])),
        max_slots=draw(st.integers(1, 4)),
    )
    limits = [draw(st.sampled_from([0.95, 1.0, 1.02, 1.1, 1.3, 2.0, 5.0])) for _ in shape]
    ratio = draw(st.sampled_from([0.3, 0.7, 1.0, 1.5, 3.0]))  # of the time to copy everything to the time to compute it
    return Case(
        unit_sets=tuple(
            UnitSet(
                name=str(number),
                objectives=tuple(
                    Objective(
                        name=f"objective {i}",
                        limit_s=limit * sum(scales) * unloaded_s,
                        steps=tuple(scaled(costs, scale) for scale in scales),
                    )
                    for i, (scales, limit) in enumerate(zip(shape, limits, strict=True))
                ),
                memory=memory,
                kv_sectors=kv_sectors,
                among=draw(subsets(len(costs.unit_bytes))),
            )
            for number, costs in enumerate(units)
        ),
        link=Link(bytes_per_s=total_bytes / unloaded_s / ratio, copy_s=draw(st.sampled_from([0.0, 0.01]))),
        slowdown=draw(st.sampled_from([0.0, 0.05])),
    )


@st.composite
def unit_costs(draw):
    num_units = draw(st.integers(1, 9))
    are_alike = draw(st.booleans())
    sizes = [draw(st.integers(1, 2000)) for _ in range(1 if are_alike else num_units)]
    compute_s = [draw(st.integers(1, 20)) / 4 for _ in sizes]
    times = num_units // len(sizes)
    return StepCosts(
        compute_s=tuple(compute_s * times), unit_bytes=tuple(sizes * times), rest_s=draw(st.integers(0, 20)) / 4
    )


def subsets(num_units):
    some = st.sets(st.integers(0, num_units - 1)).map(lambda units: tuple(sorted(units)))
    return st.one_of(st.none(), st.none(), some)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One plan of the exhaustive search."""

    units: UnitSet
    k: int
    need_bytes: int
    offloaded_bytes: int
    fits: bool
    times_s: tuple[float, ...]

    @property
    def meets(self) -> bool:
        return all(t <= o.limit_s * (1 + 1e-9) for t, o in zip(self.times_s, self.units.objectives, strict=True))


def every_plan(case: Case) -> list[Tried]:
    """Every k of every set, both placements of every step, few at a time, every S below k; nothing shared or pruned."""
    tried = []
    for units in with_size_sets(case.unit_sets):
        sizes, memory = units.unit_bytes, units.memory
        allowed = range(len(sizes)) if units.among is None else units.among
        for k in range(len(allowed) + 1):
            placements: set[tuple[int, ...]] = {()}
            if k:
                longest = [max(o.steps, key=lambda costs: costs.unloaded_s) for o in units.objectives]
                placements = {place_evenly(k, costs, among=units.among) for costs in longest}
                placements |= {place_by_index(k, len(sizes), among=units.among)}
                if units.among is None:
                    placements |= {few for costs in longest for few in unequal_few(costs) if len(few) == k}
            for offloaded in placements:
                for slots in range(1, memory.max_slots + 1):
                    if k == 0 or slots < k:
                        tried.append(one_plan(case, units, offloaded, slots))
    return tried


def one_plan(case: Case, units: UnitSet, offloaded, slots) -> Tried:
    sizes, memory = units.unit_bytes, units.memory
    homes = sum(weight_sectors(size, SECTOR) for unit, size in enumerate(sizes) if unit not in offloaded)
    slot = max((weight_sectors(sizes[unit], SECTOR) for unit in offloaded), default=0)
    num_sectors = homes + (slots * slot if offloaded else 0)
    moved = sum(sizes[unit] for unit in offloaded)
    free_bytes = (memory.device_bytes or PLENTY) - -(-memory.resident_bytes // 256) * 256
    room = memory.workspace.most_sectors(free_bytes, SECTOR) - 2 - units.kv_sectors
    host_bytes = max(moved, memory.host_store_bytes)
    return Tried(
        units=units,
        k=len(offloaded),
        need_bytes=num_sectors * SECTOR,
        offloaded_bytes=moved,
        fits=num_sectors <= room and host_bytes <= (PLENTY if memory.host_bytes is None else memory.host_bytes),
        times_s=tuple(
            sum(
                predict_step_s(while_copying(costs, moved, case.link, case.slowdown), offloaded, slots, case.link)
                for costs in objective.steps
            )
            for objective in units.objectives
        ),
    )


@given(cases())
def test_equals_exhaustive_search_through_the_recurrence(case) -> None:
    allowed = [plan for plan in every_plan(case) if plan.fits and plan.meets]
    if not allowed:
        with pytest.raises(Infeasible):
            case.search()
        return
    found = case.search()
    best = min(allowed, key=lambda plan: (plan.need_bytes, -plan.offloaded_bytes, plan.times_s))
    assert found.need.homes_bytes + found.need.slots_bytes == best.need_bytes
    assert found.offloaded_bytes == best.offloaded_bytes
    assert [p.predicted_s for p in found.predictions] == pytest.approx(best.times_s)
    mine = [plan.k for plan in allowed if plan.units.name == found.unit_set]
    assert (found.k_min, found.k_max) == (min(mine), max(mine))
    assert found.k_min <= found.plan.num_offloaded <= found.k_max
    num_units = found.plan.num_units
    assert found.interval_range == (
        num_units / max(mine) if max(mine) else math.inf,
        num_units / min(mine) if min(mine) else math.inf,
    )


@given(cases())
def test_what_is_emitted_fits_and_is_fast_enough(case) -> None:
    try:
        found = case.search()
    except Infeasible:
        return
    memory = case.unit_sets[0].memory
    assert max(found.need.total_bytes, found.device_bytes) <= (memory.device_bytes or PLENTY)
    assert memory.host_bytes is None or found.offloaded_bytes <= found.host_bytes <= memory.host_bytes
    assert all(prediction.spare_s >= -1e-9 * prediction.limit_s for prediction in found.predictions)
    assert found.freed_bytes >= 0


@given(cases(), st.data())
def test_more_of_anything_never_frees_less(case, data) -> None:
    """A looser objective, a faster link, more device or host memory, more slots: monotone, feasibility included."""
    memory = case.unit_sets[0].memory
    kinds = ["objective", "link", "slots"]
    kinds += ["device"] * (memory.device_bytes is not None) + ["host"] * (memory.host_bytes is not None)
    kind, factor = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from([1.05, 1.5, 4.0]))
    more = {
        "objective": lambda: case.with_limit("objective 0", case.unit_sets[0].objectives[0].limit_s * factor),
        "link": lambda: case.with_link(factor),
        "slots": lambda: case.with_memory(max_slots=memory.max_slots + 1),
        "device": lambda: case.with_memory(device_bytes=int(memory.device_bytes * factor)),
        "host": lambda: case.with_memory(host_bytes=int(memory.host_bytes * factor)),
    }[kind]()
    try:
        before = case.search()
    except Infeasible:
        return
    assert more.search().device_bytes <= before.device_bytes


@given(cases())
def test_what_the_bound_rules_out_is_too_slow(case) -> None:
    pace = Pace(link=replace(case.link, copy_s=0.5), slowdown=case.slowdown)
    for units in with_size_sets(case.unit_sets):
        for candidate in candidates_of(units):
            for objective in units.objectives:
                step_s = predicted_s(objective, candidate, pace)
                assert objective_bound_s(objective, candidate, pace) <= step_s * (1 + 1e-9)


def test_of_plans_alike_in_memory_the_fastest_is_taken() -> None:
    """Three of six layers through one slot: even gaps are faster than those of the other placement."""
    costs = StepCosts(compute_s=(1.0,) * 6, unit_bytes=(1024,) * 6)
    memory = MemoryModel(resident_bytes=0, kv=kv_of_tokens(16), workspace=Workspace(), max_slots=1)
    objective = Objective(name="TPOT", limit_s=1.2 * costs.unloaded_s, steps=(costs,))
    found = search([UnitSet(name="layers", objectives=(objective,), memory=memory)], Link(bytes_per_s=1024.0))
    slower = predict_step_s(costs, place_evenly(3, costs), 1, Link(bytes_per_s=1024.0))
    assert found.predictions[0].predicted_s < slower <= objective.limit_s
    assert found.plan.offloaded == place_by_index(3, 6)


def is_feasible(case: Case) -> bool:
    try:
        case.search()
    except Infeasible:
        return False
    return True


def changed(case: Case, quantity: str, value: float) -> Case:
    if quantity == DEVICE_MEMORY:
        return case.with_memory(device_bytes=math.floor(value))
    if quantity == HOST_MEMORY:
        return case.with_memory(host_bytes=math.floor(value))
    if quantity == LINK:
        return case.with_link(value / case.link.bytes_per_s)
    if quantity == COMPUTE:
        return case.with_compute(value)
    return case.with_limit(quantity, value)


@given(cases())
def test_an_infeasible_question_says_the_smallest_change_that_helps(case) -> None:
    try:
        case.search()
        return
    except Infeasible as error:
        infeasible = error
    assert infeasible.limiting in {DEVICE_MEMORY, HOST_MEMORY, LINK, COMPUTE}
    for change in infeasible.changes:
        if change.needed is None:  # no amount of it: none of these either
            fastest = {LINK: case.link.bytes_per_s * MOST_FACTOR, COMPUTE: MOST_FACTOR}
            most = {DEVICE_MEMORY: PLENTY, HOST_MEMORY: PLENTY, **fastest}.get(change.quantity, 1e9)
            assert not is_feasible(changed(case, change.quantity, most))
            continue
        assert is_feasible(changed(case, change.quantity, change.needed * (1 + 1e-8)))
        is_bytes = change.unit == "bytes"
        less = change.needed - 1 if is_bytes else change.needed * (0.998 if change.unit != "s" else 1 - 1e-6)
        assert not is_feasible(changed(case, change.quantity, less))


@given(cases())
def test_the_tightest_objective_is_the_fastest_plan_that_fits(case) -> None:
    name = case.unit_sets[0].objectives[0].name
    open_ended = case.with_limit(name, math.inf)
    allowed = [plan.times_s[0] for plan in every_plan(open_ended) if plan.fits and plan.meets]
    if not allowed:
        with pytest.raises(Infeasible):
            least_limit_s(open_ended.unit_sets, case.link, name, slowdown=case.slowdown)
        return
    limit_s = least_limit_s(open_ended.unit_sets, case.link, name, slowdown=case.slowdown)
    assert limit_s == pytest.approx(min(allowed))
    assert is_feasible(case.with_limit(name, limit_s))


def simple_case(*, limit=1.1, device=None, host=None, bytes_per_s=1000.0, blocks=False) -> Case:
    """32 equal layers of 1000 bytes and a second each; as blocks, a third attention and two thirds MLP."""
    parts = (1 / 3, 2 / 3) if blocks else (1.0,)
    costs = StepCosts(
        compute_s=tuple(part for _ in range(32) for part in parts),
        unit_bytes=tuple(int(3072 * part) for _ in range(32) for part in parts),
    )
    memory = MemoryModel(
        resident_bytes=0, kv=kv_of_tokens(16), workspace=Workspace(), device_bytes=device, host_bytes=host
    )
    objectives = (Objective(name="TPOT", limit_s=limit * costs.unloaded_s, steps=(costs,)),)
    sets: dict[str, tuple[int, ...] | None] = {"layers": None}
    if blocks:
        sets = {"blocks": None, "attention": tuple(range(0, 64, 2)), "MLP": tuple(range(1, 64, 2))}
    return Case(
        unit_sets=tuple(
            UnitSet(name=name, objectives=objectives, memory=memory, among=among) for name, among in sets.items()
        ),
        link=Link(bytes_per_s=bytes_per_s),
        slowdown=0.0,
    )


@pytest.mark.parametrize(
    ("arguments", "limiting"),
    [
        ({"limit": 0.9}, COMPUTE),
        ({"device": 3000}, DEVICE_MEMORY),
        ({"device": 60_000, "host": 20_000}, HOST_MEMORY),
        ({"device": 60_000}, LINK),
    ],
)
def test_what_limits_is_named(arguments, limiting) -> None:
    with pytest.raises(Infeasible, match=f"the limit is {limiting}") as caught:
        simple_case(**arguments).search()
    assert caught.value.limiting == limiting


def test_finer_units_are_taken_where_they_free_more() -> None:
    """Copies 13.8 times as long as compute, a tenth more time: layers lose a whole one to each slot."""
    arguments = {"bytes_per_s": 3072 / 13.8}
    layers, blocks = simple_case(**arguments), simple_case(blocks=True, **arguments)
    both = replace(layers, unit_sets=(*layers.unit_sets, *blocks.unit_sets))
    assert layers.search().freed_bytes == 3072  # as in the design's table
    assert both.search().unit_set == "attention"
    assert both.search().freed_bytes == blocks.search().freed_bytes > 3072
    loose = {"limit": 40.0}
    alone, together = simple_case(**loose).search(), simple_case(blocks=True, **loose).search()
    assert together.freed_bytes > alone.freed_bytes  # everything away, through the smaller slot


def test_messages_round_up_what_would_be_enough() -> None:
    with pytest.raises(
        Infeasible, match=r"any one of these is enough:\n  device memory: 0\.00\d+ GiB instead of"
    ) as it:
        simple_case(device=60_000).search()
    assert "TPOT: " in str(it.value)
    assert "host memory" not in str(it.value)  # it was not limited
