"""Attainment counts every request against its own objectives, and keeps a bounded number of them."""

from __future__ import annotations

import pytest

from selectn_core.attainment import Attainment
from selectn_core.objectives import Objectives
from selectn_core.requests import RequestTiming

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)


def test_a_request_must_meet_both() -> None:
    attainment = Attainment(99.0)
    for ttft_s, tpot_s in ((0.5, 0.05), (1.5, 0.05), (0.5, 0.15), (1.0, None)):
        attainment.add(RequestTiming(ttft_s=ttft_s, tpot_s=tpot_s), OBJECTIVES)
    attainment.add(RequestTiming(ttft_s=None, tpot_s=None), OBJECTIVES)  # cancelled before its first token
    assert attainment.snapshot()["attained"] == 0.5
    assert attainment.num_requests == 4


def test_the_percentile_is_the_value_that_so_many_do_not_exceed() -> None:
    attainment = Attainment(90.0)
    assert attainment.snapshot()["ttft_s"] is None
    for i in range(1, 11):
        attainment.add(RequestTiming(ttft_s=float(i), tpot_s=i / 100), OBJECTIVES)
    assert attainment.snapshot()["ttft_s"] == 9.0
    assert attainment.snapshot()["tpot_s"] == pytest.approx(0.09)


def test_only_the_last_ones_are_kept() -> None:
    attainment = Attainment(50.0)
    for i in range(5000):
        attainment.add(RequestTiming(ttft_s=9.0 if i < 3000 else 0.1, tpot_s=None), OBJECTIVES)
    assert attainment.snapshot()["attained"] == 1.0
    assert attainment.num_requests == 5000
