"""Who lately came, and how much of them is to be expected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.routing.arrivals import MAX_FLOWS, MEMORY_S, Arrivals
from tests.support.clock import Clock


@given(st.integers(1, 1000), st.sampled_from([0.05, 0.2, 0.5]))
def test_a_steady_flow_goes_on_as_it_came(tokens, period_s):
    clock = Clock()
    arrivals = Arrivals(clock)
    for _ in range(round(10 * MEMORY_S / period_s)):
        clock.now_s += period_s
        arrivals.add(("normal", "a"), tokens)
    assert arrivals.expected(2.0)[("normal", "a")] == pytest.approx(2.0 * tokens / period_s, rel=0.1)


def test_flows_are_told_apart_and_those_that_stay_away_are_forgotten():
    clock = Clock()
    arrivals = Arrivals(clock)
    arrivals.add(("normal", "a"), 100)
    arrivals.add(("high", "a"), 300)
    expected = arrivals.expected(1.0)
    assert expected[("high", "a")] == pytest.approx(3 * expected[("normal", "a")])
    clock.now_s += 10 * MEMORY_S
    assert arrivals.expected(1.0) == {}
    assert len(arrivals) == 0


@pytest.mark.slow
def test_the_number_of_flows_is_bounded():
    arrivals = Arrivals(Clock())
    for number in range(2 * MAX_FLOWS):
        arrivals.add(("normal", f"k{number}"), 100)
    assert len(arrivals) == MAX_FLOWS
