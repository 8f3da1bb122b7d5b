"""The bounded knapsack against trying everything."""

from __future__ import annotations

import itertools
from operator import mul

from hypothesis import given
from hypothesis import strategies as st

from cluster.bus.knapsack import Knapsack, Nodes, by_efficiency

KINDS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=5)


def problem(kinds: list[tuple[int, int, int]]) -> tuple[list[int], list[int], list[int]]:
    """Values, costs, limits in the order that Knapsack wants."""
    limits = {(value, cost): limit for value, cost, limit in kinds}
    ordered = by_efficiency(limits)
    return [v for v, _ in ordered], [c for _, c in ordered], [limits[kind] for kind in ordered]


def most_value(values: list[int], costs: list[int], limits: list[int], room: int) -> int:
    packings = itertools.product(*(range(limit + 1) for limit in limits))
    return max(sum(map(mul, counts, values)) for counts in packings if sum(map(mul, counts, costs)) <= room)


@given(KINDS, st.integers(0, 300))
def test_as_much_value_as_any_packing(kinds, room):
    values, costs, limits = problem(kinds)
    found = Knapsack(values, costs).pack(limits, room, nodes=Nodes(left=10**6))
    assert found is not None
    assert found.value == found.bound == most_value(values, costs, limits, room)
    assert found.value == sum(map(mul, found.counts, values))
    assert sum(map(mul, found.counts, costs)) <= room
    assert all(0 <= count <= limit for count, limit in zip(found.counts, limits, strict=True))


@given(KINDS, st.integers(0, 300), st.integers(1, 400))
def test_whether_there_is_one_worth_so_much(kinds, room, at_least):
    values, costs, limits = problem(kinds)
    found = Knapsack(values, costs).pack(limits, room, at_least=at_least, nodes=Nodes(left=10**6))
    assert (found is not None) == (most_value(values, costs, limits, room) >= at_least)
    assert found is None or found.value >= at_least


@given(KINDS, st.integers(0, 300), st.integers(-5, 400))
def test_a_kind_is_only_ruled_out_where_no_packing_has_it(kinds, room, at_least):
    values, costs, limits = problem(kinds)
    packings = [
        counts
        for counts in itertools.product(*(range(limit + 1) for limit in limits))
        if sum(map(mul, counts, costs)) <= room and sum(map(mul, counts, values)) >= at_least
    ]
    may_have = Knapsack(values, costs).may_have(limits, room, at_least=at_least)
    assert all(may or not any(counts[kind] for counts in packings) for kind, may in enumerate(may_have))
    if at_least > sum(map(mul, values, limits)) + max(values):  # far more than there is: that much it sees
        assert not any(may_have)


@given(KINDS, st.integers(0, 300), st.integers(0, 5))
def test_cut_short_it_says_what_it_left_open(kinds, room, num_nodes):
    values, costs, limits = problem(kinds)
    found = Knapsack(values, costs).pack(limits, room, nodes=Nodes(left=num_nodes))
    assert found is not None
    assert found.value <= most_value(values, costs, limits, room) <= found.bound
