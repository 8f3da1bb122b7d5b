"""Ranges are handed out lowest first, and come back in any order to be one again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.device.range_allocator import FirstFit

CAPACITY = 20


@given(actions=st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=40))
def test_what_is_taken_is_the_lowest_that_is_free_and_comes_back_whole(actions) -> None:
    ranges, taken = FirstFit(CAPACITY), dict[int, int]()
    for is_taking, number in actions:
        if is_taking:
            held = {place for start, size in taken.items() for place in range(start, start + size)}
            fits = [i for i in range(CAPACITY - number + 1) if not held & set(range(i, i + number))]
            start = ranges.take(number)
            assert start == (fits[0] if fits else None)
            if start is not None:
                taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            assert ranges.give_back(start) == taken.pop(start)
        assert ranges.num_taken == sum(taken.values())
        assert ranges.taken() == [range(start, start + size) for start, size in sorted(taken.items())]


def test_what_was_not_taken_does_not_come_back() -> None:
    with pytest.raises(ValueError, match="nothing was taken at 3"):
        FirstFit(CAPACITY).give_back(3)
