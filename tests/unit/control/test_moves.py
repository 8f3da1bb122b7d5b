"""Which way a controller goes to another plan, in the loop of bench_deciding: units are unequal, moves take time."""

from __future__ import annotations

import pytest

from benchmarks.bench_deciding import Loop, blocks


def lost_after_halving(monkeypatch: pytest.MonkeyPatch, *, may_be_sooner: bool) -> float:
    """Objectives' worth of time above the objective once half of the bus is taken; attention and MLPs are units."""
    lost = 0.0
    for num_steps in range(50, 80):
        loop = Loop(blocks())
        if not may_be_sooner:
            monkeypatch.setattr(loop.controller, "_sooner", lambda goals, current, plan: plan)
        for i in range(num_steps + 20):
            loop.step(i, is_bus_shared=i >= num_steps)
        lost += sum(max(0.0, step_s / loop.tpot_s - 1) for step_s in loop.steps_s[num_steps:])
    return lost


def test_weights_come_home_the_short_way_when_the_bus_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other units than those that are offloaded now may be better, and all of these come home before that shows."""
    short = lost_after_halving(monkeypatch, may_be_sooner=True)
    assert short < 0.96 * lost_after_halving(monkeypatch, may_be_sooner=False)
