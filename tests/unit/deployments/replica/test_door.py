"""A replica's door: in turn, and never more than fits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.replica.door import Door, Visit
from deployments.replica.forecast import SLACK_STEPS
from deployments.routing.headroom_report import MAX_ORIGINS
from selectn_core.errors import EngineOverloaded, EngineUnavailable


class Doorway:
    """A door, and what it has decided."""

    def __init__(self, capacity: int = 100, max_requests: int = 3, max_waiting: int = 4) -> None:
        self.capacity, self.now_s = capacity, 0.0
        self.decided: list[tuple[Visit, bool]] = []
        self.door = Door(
            lambda: self.capacity, max_requests=max_requests, max_waiting=max_waiting, clock=lambda: self.now_s
        )

    @property
    def entered(self) -> list[Visit]:
        return [visit for visit, has_entered in self.decided if has_entered]

    def visit(self, tokens: int, origin: str = "o", prompt_tokens: int | None = None) -> Visit:
        """Of `tokens` in all, all of them prompt unless said otherwise."""
        visit = Visit(
            origin=origin,
            prompt_tokens=tokens if prompt_tokens is None else prompt_tokens,
            total_tokens=tokens,
            decide=lambda ok: self.decided.append((visit, ok)),
        )
        self.door.knock(visit)
        return visit


def test_first_come_first_served():
    way = Doorway()
    first, second, third = way.visit(60), way.visit(50), way.visit(50)
    assert way.entered == [first]
    way.door.leave(first)
    assert way.entered == [first, second, third]


def test_one_that_is_gone_before_the_firsts_turn_passes_it():
    way = Doorway(capacity=100)
    inside, first = way.visit(60, prompt_tokens=20), way.visit(90)  # 40 steps until its turn
    brief = way.visit(20, prompt_tokens=10)
    assert way.entered == [inside, brief]
    way.door.leave(inside)
    assert way.door.num_waiting == 1
    way.door.leave(brief)
    assert way.entered == [inside, brief, first]


def test_one_that_has_room_beside_the_first_passes_it_however_long_it_stays():
    way = Doorway(capacity=100)
    inside, _ = way.visit(30, prompt_tokens=20), way.visit(80)  # its turn comes sooner than either of these is gone
    beside = way.visit(20, prompt_tokens=1)
    way.visit(21, prompt_tokens=1)
    assert way.entered == [inside, beside]


def test_one_that_would_make_the_first_wait_longer_does_not_pass():
    way = Doorway(capacity=100)
    inside, first = way.visit(60, prompt_tokens=40), way.visit(90)
    way.visit(40, prompt_tokens=1)  # there is room for it, but it stays for 39 steps, and the other for 20
    assert way.entered == [inside]
    way.door.leave(inside)
    assert way.entered[:2] == [inside, first]


def test_alone_it_may_have_more_than_the_capacity():
    way = Doorway()
    way.visit(500)
    way.visit(1)
    assert len(way.decided) == 1


def test_who_gives_up_waiting_makes_room_for_the_next():
    way = Doorway()
    way.visit(90)
    large, small = way.visit(90), way.visit(5)
    way.door.leave(large)
    assert way.decided[-1] == (small, True)


def test_growing_capacity_lets_in():
    way = Doorway()
    way.visit(90)
    waiting = way.visit(50)
    way.capacity = 200
    way.door.let_in()
    assert way.decided[-1] == (waiting, True)


def test_a_bounded_number_waits():
    way = Doorway(max_waiting=1)
    way.visit(90)
    way.visit(90)
    with pytest.raises(EngineOverloaded, match=r"batch\.max_waiting=1"):
        way.visit(90)
    assert way.door.num_waiting == 1


def test_a_closed_door_turns_away_who_waits_and_lets_finish_who_is_inside():
    way = Doorway()
    inside, waiting = way.visit(90), way.visit(90)
    way.door.close()
    assert way.decided == [(inside, True), (waiting, False)]
    with pytest.raises(EngineUnavailable):
        way.visit(1)
    way.door.leave(inside)
    assert way.door.inside_tokens == 0


def test_the_drain_rate_is_what_a_full_replica_gives_back():
    way = Doorway(capacity=100, max_requests=10)
    assert way.door.drain_tokens_per_s() is None
    for _ in range(3):
        visit = way.visit(20)
        way.now_s += 4
        way.door.leave(visit)
    assert way.door.drain_tokens_per_s() == 100 / 4  # full of requests that stay 4 s each
    narrow = Doorway(capacity=100, max_requests=2)
    visit = narrow.visit(20)
    narrow.now_s += 4
    narrow.door.leave(visit)
    assert narrow.door.drain_tokens_per_s() == 2 * 20 / 4  # no more than two at once


def test_promises_are_by_origin_and_bounded():
    way = Doorway(capacity=10**6, max_requests=1000)
    for i in range(MAX_ORIGINS + 10):
        way.visit(100 + i, origin=f"o{i}")
    promises = way.door.promises()
    assert len(promises) == MAX_ORIGINS + 1
    assert sum(each.tokens for each in promises) == way.door.inside_tokens
    assert promises[-1].origin == ""


def test_requests_that_do_not_end_together_share_their_last_pages():
    way = Doorway(capacity=190)
    old = way.visit(100, prompt_tokens=10)
    way.visit(100, prompt_tokens=10)
    assert len(way.decided) == 1  # both would end with 100
    old.num_generated = lambda: 60
    way.door.progressed()
    assert len(way.decided) == 2  # old has 30 steps to go, and is gone, slack included, when new has 10 + 40
    assert way.door.inside_tokens == 100 + 10 + 30 + SLACK_STEPS


REQUESTS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60), st.integers(0, 10)), min_size=1, max_size=25)


def turn_of(first: Visit, inside: Sequence[Visit], capacity: int, max_requests: int) -> int:
    """Steps until `first` could come in, by trying one after the other and adding up every step to come."""

    def held(visit: Visit, step: int) -> int:
        now = visit.prompt_tokens + visit.num_generated()
        left = visit.total_tokens - now
        return min(now + step, visit.total_tokens) if 0 <= step <= left + SLACK_STEPS else 0

    for turn in count():
        there = [visit for visit in inside if held(visit, turn)]
        steps = range(turn, turn + max(visit.total_tokens for visit in (first, *inside)) + SLACK_STEPS + 1)
        sums = [sum(held(visit, step) for visit in there) + held(first, step - turn) for step in steps]
        if not there or (len(there) < max_requests and max(sums) <= capacity):
            return turn
    raise AssertionError


@settings(deadline=None)
@given(REQUESTS, st.integers(80, 200))
def test_what_is_inside_fits_at_every_step_and_nobody_delays_the_first(requests, capacity):
    """Requests (prompt, output, steps until the next one comes) in lock-step, as an engine generates."""
    max_requests = 10
    way = Doorway(capacity=capacity, max_requests=max_requests, max_waiting=100)
    pending, generated, due = deque(requests), dict[Visit, int](), 0
    first, at_latest = None, 0

    def is_over(visit: Visit) -> bool:
        return visit.prompt_tokens + generated[visit] == visit.total_tokens

    for step in range(10_000):
        if pending and step >= due:
            prompt, output, gap = pending.popleft()
            way.visit(prompt + output, prompt_tokens=prompt)
            due = step + gap
        for visit in way.entered:
            if visit not in generated:
                generated[visit] = 0
                visit.num_generated = partial(generated.__getitem__, visit)
        inside = [visit for visit in generated if not is_over(visit)]
        waiting = next(iter(way.door.waiting), None)
        if waiting is not None and waiting is not first:
            first, at_latest = waiting, step + turn_of(waiting, inside, capacity, max_requests)
        assert waiting is None or step <= at_latest, "somebody who passed has made it wait longer"
        for visit in inside:
            generated[visit] += 1
        assert sum(visit.prompt_tokens + generated[visit] for visit in inside) <= capacity or len(inside) == 1
        for visit in inside:
            if is_over(visit):
                way.door.leave(visit)
        way.door.let_in()
        if not pending and not way.door.num_waiting and not inside:
            break
    assert len(generated) == len(requests), "somebody waits for ever"


class DoorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.way = Doorway()
        self.visits: list[Visit] = []

    @rule(tokens=st.integers(1, 150), origin=st.sampled_from("xyz"))
    def come(self, tokens, origin):
        try:
            self.visits.append(self.way.visit(tokens, origin))
        except EngineOverloaded:
            assert self.way.door.num_waiting == 4

    @rule(which=st.integers(0, 100))
    def go(self, which):
        if self.visits:
            self.way.door.leave(self.visits.pop(which % len(self.visits)))

    @rule(capacity=st.integers(0, 300))
    def change(self, capacity):
        self.way.capacity = capacity
        self.way.door.let_in()

    @invariant()
    def is_whole(self):
        self.way.door.check_integrity()
        entered = self.way.entered
        waiting = [visit for visit in self.visits if visit not in entered]
        assert waiting == list(self.way.door.waiting)  # in the order in which they came


TestDoor = DoorMachine.TestCase
