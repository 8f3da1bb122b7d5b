"""A set of sectors is a set, and gives the highest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.memory.sector_set import SectorSet

LIMIT = 12
SPAN = st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(lambda ends: range(min(ends), max(ends)))
ACTION = st.one_of(
    st.tuples(st.just("add"), SPAN),
    st.tuples(st.just("remove"), SPAN),
    st.tuples(st.just("extend"), st.lists(st.integers(0, LIMIT - 1))),
    st.tuples(st.just("append"), st.integers(0, LIMIT - 1)),
    st.tuples(st.just("pop"), st.none()),
)


@given(first=SPAN, actions=st.lists(ACTION, max_size=20), asked=SPAN)
def test_it_is_a_set_whose_highest_is_taken_first(first, actions, asked) -> None:
    sectors, expected = SectorSet(LIMIT, first), set(first)
    for name, argument in actions:
        if name == "pop":
            if expected:
                assert sectors.pop() == max(expected)
                expected.remove(max(expected))
            continue
        getattr(sectors, name)(argument)
        others = {argument} if name == "append" else set(argument)
        expected = expected - others if name == "remove" else expected | others
    assert list(sectors) == sorted(expected)
    assert len(sectors) == len(expected)
    assert sectors.count(asked) == len(expected & set(asked))
    assert [sector in sectors for sector in range(LIMIT)] == [sector in expected for sector in range(LIMIT)]


def test_none_can_be_taken_of_none() -> None:
    with pytest.raises(IndexError, match="no sector is left"):
        SectorSet(LIMIT).pop()
