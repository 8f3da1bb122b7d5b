"""The division of a bus against exhaustive search, and what a small change of demand does to it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bus import allocation as bus_allocation
from cluster.bus.allocation import (
    KEEP_WITHIN,
    BusOvercommitted,
    allocate_bus,
    max_min_shares,
    unit_cost_bytes_per_s,
)
from cluster.protocol.messages import LinkDemand

Counts = tuple[int, ...]


def demand(k_min: int, k_max: int, unit_bytes: int, step_s: float) -> LinkDemand:
    return LinkDemand(k_min=k_min, k_max=k_max, unit_bytes=unit_bytes, step_s=step_s)


@st.composite
def buses(draw, max_replicas: int = 4, max_units: int = 5) -> tuple[dict[str, LinkDemand], int]:
    """Up to four replicas, often alike, and a bus that holds something between their minima and their maxima."""
    demands = {}
    for index in range(draw(st.integers(1, max_replicas))):
        k_min = draw(st.integers(0, 2))
        k_max = k_min + draw(st.integers(0, max_units))
        size = draw(st.sampled_from([100, 200, 300, 70, 101]))
        demands[f"r{index}"] = demand(k_min, k_max, size, draw(st.sampled_from([1.0, 0.5, 0.1, 0.3])))
    least = cost_of(demands, tuple(d.k_min for d in demands.values()))
    most = cost_of(demands, tuple(d.k_max for d in demands.values()))
    return demands, draw(st.integers(least, most + 1))


def cost_of(demands: Mapping[str, LinkDemand], counts: Counts) -> int:
    return sum(count * unit_cost_bytes_per_s(d) for count, d in zip(counts, demands.values(), strict=True))


def shares(demands: Mapping[str, LinkDemand], counts: Counts) -> list[int]:
    return [count * d.unit_bytes for count, d in zip(counts, demands.values(), strict=True)]


def all_optimal(demands: Mapping[str, LinkDemand], capacity: int, tie_bytes: int = 0) -> list[Counts]:
    """By trying everything: the feasible allocations with the most host memory, or within `tie_bytes` of it."""
    ranges = [range(d.k_min, d.k_max + 1) for d in demands.values()]
    feasible = [counts for counts in itertools.product(*ranges) if cost_of(demands, counts) <= capacity]
    most = max(sum(shares(demands, counts)) for counts in feasible)
    return [counts for counts in feasible if sum(shares(demands, counts)) >= most - tie_bytes]


def fairest(demands: Mapping[str, LinkDemand], optimal: list[Counts], previous: Mapping[str, int]) -> Counts:
    """The rule itself: raise whoever has least by one unit while one of `optimal` has all of that."""
    names = list(demands)
    counts = [d.k_min for d in demands.values()]
    open_replicas = set(range(len(names)))
    while open_replicas:
        replica = min(
            open_replicas,
            key=lambda r: (
                counts[r] * demands[names[r]].unit_bytes,
                counts[r] >= previous.get(names[r], 0),
                names[r],
            ),
        )
        still = [each for each in optimal if each[replica] > counts[replica]]
        if not still:
            open_replicas.remove(replica)
            continue
        optimal = still = [each for each in still if all(e >= c for e, c in zip(each, counts, strict=True))]
        counts[replica] += 1
    assert optimal == [tuple(counts)]
    return tuple(counts)


def smallest_unsatisfied(demands: Mapping[str, LinkDemand], counts: Counts) -> float:
    return min(
        (s for s, c, d in zip(shares(demands, counts), counts, demands.values(), strict=True) if c < d.k_max),
        default=float("inf"),
    )


@given(buses(), st.sampled_from([0, 0, 50, 99, 250]))
def test_equal_to_exhaustive_search(bus, tie_bytes):
    demands, capacity = bus
    optimal = all_optimal(demands, capacity, tie_bytes)
    found = allocate_bus(demands, capacity, tie_bytes=tie_bytes)
    counts = tuple(found.num_offloaded[name] for name in demands)
    assert found.bound_bytes == sum(shares(demands, all_optimal(demands, capacity)[0]))
    assert found.host_bytes == sum(shares(demands, counts))
    assert counts in optimal
    assert counts == fairest(demands, optimal, {})
    with pytest.MonkeyPatch.context() as patch:  # small cases would never be raised level by level
        patch.setattr(bus_allocation, "_FEW_UNITS", 0)
        patch.setattr(bus_allocation, "_MANY_UNITS", 1)
        assert allocate_bus(demands, capacity, tie_bytes=tie_bytes) == found


@given(buses())
def test_the_smallest_share_is_as_large_as_any_optimal_allocation_allows(bus):
    demands, capacity = bus
    found = allocate_bus(demands, capacity)
    counts = tuple(found.num_offloaded[name] for name in demands)
    best = max(smallest_unsatisfied(demands, each) for each in all_optimal(demands, capacity))
    assert smallest_unsatisfied(demands, counts) == best


@given(buses(), st.data())
def test_a_previous_allocation_costs_little_and_is_kept_when_nothing_changed(bus, data):
    demands, capacity = bus
    names = [f"r{index}" for index in range(5)]
    previous = {name: data.draw(st.integers(0, 6)) for name in names if data.draw(st.booleans())}
    found = allocate_bus(demands, capacity, previous)
    counts = tuple(found.num_offloaded[name] for name in demands)
    assert cost_of(demands, counts) <= capacity
    assert all(d.k_min <= c <= d.k_max for c, d in zip(counts, demands.values(), strict=True))
    best = sum(shares(demands, all_optimal(demands, capacity)[0]))
    assert (1 - KEEP_WITHIN) * best <= found.host_bytes <= best
    assert allocate_bus(demands, capacity, found.num_offloaded).num_offloaded == found.num_offloaded


@given(st.integers(2, 64), st.integers(0, 63), st.integers(1, 5), st.integers(0, 2000))
def test_one_that_wants_less_disturbs_nobody_that_is_like_it(num_replicas, which, fewer, units):
    """The units that one gives up go to others; nobody loses any."""
    demands = {f"r{index:02}": demand(0, 40, 1000, 1.0) for index in range(num_replicas)}
    before = allocate_bus(demands, units * 1000).num_offloaded
    name = f"r{which % num_replicas:02}"
    demands[name] = demand(0, max(0, before[name] - fewer), 1000, 1.0)
    after = allocate_bus(demands, units * 1000, before).num_offloaded
    assert all(after[other] >= before[other] for other in demands if other != name)
    gained = sum(after[other] - before[other] for other in demands if other != name)
    assert gained == min(before[name] - after[name], 40 * (num_replicas - 1) - sum(before.values()) + before[name])


def test_a_newcomer_gets_its_part_of_a_full_bus():
    demands = {name: demand(0, 30, 1000, 1.0) for name in "ab"}
    before = allocate_bus(demands, 30_000).num_offloaded
    demands["c"] = demand(0, 30, 1000, 1.0)
    after = allocate_bus(demands, 30_000, before).num_offloaded
    assert sorted(after.values())[0] >= 9
    assert sum(after.values()) == 30


def test_those_with_a_looser_objective_offload_more():
    found = allocate_bus({"tight": demand(1, 30, 1000, 0.1), "loose": demand(1, 30, 1000, 0.4)}, 100_000)
    assert found.num_offloaded == {"tight": 2, "loose": 30}


@pytest.mark.parametrize("seed", range(12))
def test_sixty_four_that_all_differ_get_nearly_the_most_that_there_can_be(seed):
    """Where the search is cut short, `bound_bytes` is what no allocation exceeds, and 0.1 % of it missing at most."""
    generator = random.Random(seed)
    step_s = {0: lambda: 0.1, 1: lambda: generator.uniform(0.03, 0.4)}[seed % 2]
    demands = {
        f"r{index:02}": demand(k := generator.randrange(4), k + generator.randrange(1, 76), size, step_s())
        for index, size in enumerate(generator.sample(range(10_000_000, 900_000_000), 64))
    }
    least, most = (cost_of(demands, tuple(getattr(d, end) for d in demands.values())) for end in ("k_min", "k_max"))
    capacity = int(least + generator.uniform(0.1, 0.9) * (most - least))
    tie_bytes = min(d.unit_bytes for d in demands.values()) - 1
    found = allocate_bus(demands, capacity, tie_bytes=tie_bytes)
    counts = tuple(found.num_offloaded.values())
    assert cost_of(demands, counts) <= capacity
    assert all(d.k_min <= count <= d.k_max for d, count in zip(demands.values(), counts, strict=True))
    assert 0.999 * found.bound_bytes - tie_bytes <= found.host_bytes <= found.bound_bytes
    # A byte costs 1/T: no bytes can be worth more than the bus filled in the order of falling T, its last unit cut.
    assert found.bound_bytes <= most_divisible_bytes(demands, capacity) + 1


def most_divisible_bytes(demands: Mapping[str, LinkDemand], capacity: int) -> float:
    room: float = capacity - cost_of(demands, tuple(d.k_min for d in demands.values()))
    num_bytes = float(sum(d.k_min * d.unit_bytes for d in demands.values()))
    for d in sorted(demands.values(), key=lambda d: d.unit_bytes / unit_cost_bytes_per_s(d), reverse=True):
        units = min(d.k_max - d.k_min, room / unit_cost_bytes_per_s(d))
        num_bytes += units * d.unit_bytes
        room -= units * unit_cost_bytes_per_s(d)
    return num_bytes


def test_an_infeasible_set_says_who_is_over_and_by_how_much():
    demands = {"small": demand(1, 9, 1000, 1.0), "big": demand(9, 9, 1000, 1.0), "bigger": demand(12, 12, 1000, 1.0)}
    with pytest.raises(BusOvercommitted, match="need at least") as caught:
        allocate_bus(demands, 15_000)
    assert caught.value.over_bytes_per_s == {"big": 2_000, "bigger": 5_000}
    assert sum(caught.value.over_bytes_per_s.values()) == caught.value.needed_bytes_per_s - 15_000


def test_nobody_is_an_allocation_too():
    assert allocate_bus({}, 10).num_offloaded == {}


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=5))
def test_max_min_shares(capacity, replicas):
    wanted = {f"r{index}": wants for index, (_, wants) in enumerate(replicas)}
    floors = {f"r{index}": floor for index, (floor, _) in enumerate(replicas)}
    found = max_min_shares(capacity, wanted, floors)
    least = {name: min(floors[name], wanted[name]) for name in wanted}
    assert all(least[name] <= found[name] <= wanted[name] for name in wanted)
    if sum(least.values()) > capacity:
        assert found == least
        return
    assert sum(found.values()) == min(capacity, sum(wanted.values()))
    for poor, rich in itertools.permutations(wanted, 2):  # nobody could be raised at the cost of one who has more
        assert not (found[poor] < wanted[poor] and found[rich] > least[rich] and found[rich] - found[poor] > 1)
