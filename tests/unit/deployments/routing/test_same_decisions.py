"""The door and the board decide as their references do, which compute everything anew; in linear time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.replica.door import Door, Visit
from deployments.replica.forecast import Course, Footprints, Forecast
from deployments.routing.ask import Ask
from deployments.routing.board import Board
from deployments.routing.headroom_report import HeadroomReport, Promise
from selectn_core.errors import EngineOverloaded
from tests.support import reference_board, reference_door

# -- the door ------------------------------------------------------------------------------------------------------

PAGE = 5
FOOTPRINTS: dict[str, Callable[[int], int]] = {
    "tokens": lambda tokens: tokens,
    "pages": lambda tokens: -(-tokens // PAGE) * PAGE,
    "a window of keys beside pages": lambda tokens: -(-tokens // PAGE) * PAGE + min(tokens, 12),
}


class Side:
    """One of the two doors, with visits of its own, and what it has decided."""

    def __init__(self, door_type: Any, visit_type: Any, footprint: str, max_requests: int) -> None:
        self.capacity, self.now_s, self.generated = 100, 0.0, dict[int, int]()
        self.visit_type, self.decided = visit_type, list[tuple[int, bool]]()
        self.visits: dict[int, Any] = {}
        self.door = door_type(
            lambda: self.capacity,
            FOOTPRINTS[footprint],
            max_requests=max_requests,
            max_waiting=8,
            clock=lambda: self.now_s,
        )

    def come(self, number: int, prompt: int, output: int) -> None:
        visit = self.visit_type(
            origin="abc"[number % 3],
            sequence=number,
            prompt_tokens=prompt,
            total_tokens=prompt + output,
            decide=lambda ok: self.decided.append((number, ok)),
            num_generated=lambda: self.generated.get(number, 0),
        )
        try:
            self.door.knock(visit)
            self.visits[number] = visit
        except (EngineOverloaded, reference_door.EngineOverloaded) as error:
            self.decided.append((number, bool(str(error) == "")))

    def go(self, number: int) -> None:
        self.door.leave(self.visits.pop(number))

    def proceed(self, steps: int, laggard: int) -> None:
        """Everybody inside has so many tokens more, but for one, and nobody more than it may have."""
        for number, visit in self.visits.items():
            most = visit.total_tokens - visit.prompt_tokens
            if visit.entered_s is not None and number != laggard:
                self.generated[number] = min(most, self.generated.get(number, 0) + steps)
        self.now_s += 0.03 * steps
        self.door.progressed()

    def change(self, capacity: int) -> None:
        self.capacity = capacity
        self.door.let_in()

    def seen(self) -> tuple[Any, ...]:
        """All that anybody is told."""
        door = self.door
        promises = [(each.origin, each.tokens, each.requests, each.sequence) for each in door.promises()]
        waiting = [visit.sequence for visit in door.waiting]
        return self.decided, promises, waiting, door.inside_tokens, door.drain_tokens_per_s()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 60), st.integers(0, 40)),
        st.tuples(st.just("go"), st.integers(0, 50)),
        st.tuples(st.just("proceed"), st.integers(1, 12), st.integers(0, 20)),
        st.tuples(st.just("change"), st.integers(0, 250)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=400)
@given(STEPS, st.sampled_from(sorted(FOOTPRINTS)), st.integers(1, 9))
def test_the_door_decides_as_its_reference_does(steps, footprint, max_requests):
    doors = (
        Side(Door, Visit, footprint, max_requests),
        Side(reference_door.Door, reference_door.Visit, footprint, max_requests),
    )
    for number, (what, *values) in enumerate(steps):
        for side in doors:
            if what == "come":
                side.come(number, *values)
            elif what == "go" and side.visits:
                side.go([*side.visits][values[0] % len(side.visits)])
            elif what in ("proceed", "change"):
                getattr(side, what)(*values)
        ours, reference = (side.seen() for side in doors)
        assert ours == reference
        doors[0].door.check_integrity()


COURSES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 25)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=500)
@given(COURSES, st.tuples(st.integers(1, 40), st.integers(0, 25)), st.sampled_from(sorted(FOOTPRINTS)), st.data())
def test_what_is_known_of_every_step_to_come_is_what_each_request_says_for_itself(inside, first, footprint, data):
    """The peak and who holds what at it, when one more could come in, and whether it could at any given step."""
    (tokens, more), courses = first, tuple(Course(*each) for each in inside)
    forecast = Forecast.of(courses, Footprints(FOOTPRINTS[footprint]))
    peak = forecast.beside(Course(*first)).peak
    capacity = data.draw(st.integers(0, peak + 10) | st.sampled_from([peak - 1, peak, forecast.peak]))
    max_requests = data.draw(st.integers(1, len(inside) + 1))
    reference = reference_door.Door(lambda: capacity, FOOTPRINTS[footprint], max_requests=max_requests, max_waiting=1)
    visits = [
        reference_door.Visit(origin="o", prompt_tokens=start, total_tokens=start + rest, decide=lambda _: None)
        for start, rest in (*inside, first)
    ]
    courses_there = [reference_door._Course(tokens=start, more=rest) for start, rest in inside]
    assert forecast.at_peak() == reference._at_peak(visits[:-1])
    assert peak == sum(reference._at_peak(visits))
    turn = reference._turn_of(visits[-1], courses_there)
    assert forecast.turn_of(Course(*first), capacity, max_requests) == turn
    for step in range(len(forecast.held) + 3):
        own = reference_door._Course(tokens=tokens, more=more, begins=step)
        may = reference._may_begin(own, courses_there)
        assert forecast.may_begin(Course(*first), step, capacity, max_requests) == may


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_footprints_are_what_they_are_asked_for_and_whole_pages_are_asked_once(page, numbers):
    asked = list[int]()

    def pages(tokens: int) -> int:
        asked.append(tokens)
        return -(-tokens // page) * page

    footprints = Footprints(pages)
    for number in numbers:
        assert footprints.of(number) == -(-number // page) * page
    assert len(asked) <= 2 * len(numbers) + len(set(asked)), "but for the ends of a range"


def test_a_long_requests_pages_are_few_questions_and_none_when_it_comes():
    num_asked = 0

    def pages(tokens: int) -> int:
        nonlocal num_asked
        num_asked += 1
        return -(-tokens // 256) * 256

    door = Door(lambda: 10**6, pages, max_requests=4, max_waiting=4, longest=131_072)
    assert num_asked < 131_072 // 10
    num_asked = 0
    door.knock(Visit(origin="o", prompt_tokens=131_000, total_tokens=131_072, decide=lambda may_enter: None))
    assert (num_asked, door.inside_tokens) == (0, 131_072)


# -- the board -----------------------------------------------------------------------------------------------------

ME, REPLICAS = "me", "abcd"
PREFIXES = st.lists(st.integers(0, 5), max_size=3, unique=True).map(tuple)
PROMISES = st.lists(
    st.builds(
        Promise,
        origin=st.sampled_from([ME, "x", "y", ""]),
        tokens=st.sampled_from([0, 10, 100, 300]),
        requests=st.integers(0, 3),
        sequence=st.integers(0, 3),
    ),
    max_size=4,
    unique_by=lambda promise: promise.origin,
).map(tuple)
REPORTS = st.builds(
    HeadroomReport,
    replica_id=st.just("r"),
    reported_s=st.integers(0, 3).map(float),
    kv_capacity_tokens=st.integers(0, 600),
    longest_request_tokens=st.sampled_from([150, 1000]),
    max_requests=st.integers(1, 6),
    is_model_limit=st.booleans(),
    promises=PROMISES,
    waiting_prefill_tokens=st.integers(0, 50),
    drain_tokens_per_s=st.sampled_from([None, 0.0, 7.0, 100.0]),
    prefill_s_per_token=st.none() | st.floats(0, 0.1),
    slack=st.none() | st.floats(-1, 1),
    ttft_s=st.none() | st.floats(0.1, 5),
    tightest_ttft_s=st.none() | st.floats(0.1, 1),
    loosest_ttft_s=st.none() | st.floats(1, 9),
    prefixes=PREFIXES,
    is_draining=st.booleans(),
)
REPLICA = st.sampled_from(REPLICAS)
ASKED = st.tuples(st.integers(1, 400), st.none() | st.floats(0.1, 5), PREFIXES)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.dictionaries(REPLICA, st.none() | REPORTS)),
        st.tuples(st.just("place"), ASKED),
        st.tuples(st.just("place"), ASKED),
        st.tuples(st.just("again"), st.integers(0, 20), ASKED),
        st.tuples(st.just("begun"), st.integers(0, 20)),
        st.tuples(st.just("moved"), st.integers(0, 20), REPLICA),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("forget"), REPLICA),
        st.tuples(st.just("time"), st.floats(0, 3)),
    ),
    max_size=30,
)


def asked(number: int, tokens: int, ttft_s: float | None, prefixes: tuple[int, ...]) -> Ask:
    return Ask(
        request_id=f"r{number}",
        tokens=tokens,
        least_tokens=tokens,
        prompt_tokens=tokens // 2,
        ttft_s=ttft_s,
        prefixes=prefixes,
    )


def happens(board: Any, number: int, what: str, values: list[Any]) -> Any:
    """One event on either board, and what it answers."""
    if what == "place":
        return board.place(asked(number, *values[0]))
    if what == "again":
        return board.place(replace(asked(values[0], *values[1]), excluded=frozenset("a")))
    if what in ("begun", "end"):
        return getattr(board, what)(f"r{values[0]}")
    if what == "moved":
        return board.moved(f"r{values[0]}", values[1])
    return getattr(board, what)(*values)


def all_that_it_says(board: Any, of: Ask) -> tuple[Any, ...]:
    longest = board.longest_request_tokens
    return (
        [vars(standing) for standing in board.rank(of)],
        board.could_hold(of),
        longest() if callable(longest) else longest,
        *(board.free_tokens(), board.door_tokens(), board.drain_tokens_per_s(), board.prefill_s(of)),
        *(board.ttft_s, board.ttft_range_s, board.replica_ids, board.has_model("any")),
        [(board.order(f"r{i}"), board.replica_of(f"r{i}"), board.sequence_of(f"r{i}")) for i in range(30)],
    )


@settings(deadline=None, max_examples=300)
@given(EVENTS, ASKED, ASKED)
def test_the_board_decides_as_its_reference_does(events, first, second):
    now_s = [0.0]
    boards = [each(ME, stale_after_s=5.0, clock=lambda: now_s[0]) for each in (Board, reference_board.Board)]
    for number, (what, *values) in enumerate(events):
        if what == "time":
            now_s[0] += values[0]
        else:
            ours, reference = (happens(board, number, what, values) for board in boards)
            assert ours == reference
        for asking in (asked(number, *first), asked(0, *second)):  # one that comes, and one that may be there already
            ours, reference = (all_that_it_says(board, asking) for board in boards)
            assert ours == reference


# -- how much work it is -------------------------------------------------------------------------------------------


def num_calls(function: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, that it takes: the same on every machine."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def full_door(num_inside: int, door_type: Any = Door, visit_type: Any = Visit) -> Any:
    """Requests that end one after the other; at the door one that needs all there is, and some that stay long."""
    capacity = num_inside * (100 + num_inside)
    door = door_type(lambda: capacity, FOOTPRINTS["pages"], max_requests=2 * num_inside, max_waiting=8)

    def come(prompt: int, output: int) -> Any:
        visit = visit_type(origin=f"o{prompt % 9}", prompt_tokens=prompt, total_tokens=prompt + output, decide=bool)
        door.knock(visit)
        return visit

    door.leave(come(1, 1))
    for number in range(num_inside):
        come(20 + 7 * number % 50, 1 + number)
    for prompt, output in ((capacity - 30, 30), *[(1, 2 * num_inside)] * 4):
        come(prompt, output)
    assert door.num_waiting == 5
    return door


@pytest.mark.parametrize("what", ["let_in", "promises", "drain_tokens_per_s"])
def test_the_doors_work_grows_with_the_requests_inside_and_not_with_their_square(what):
    def work(num_inside: int) -> int:
        door = full_door(num_inside)
        leaving = next(iter(door._inside))
        leaving.num_generated = lambda: 1  # what was known is over
        return num_calls(getattr(door, what))

    assert work(512) < 9 * work(64)


def full_board(num_replicas: int, num_origins: int, board_type: Any = Board) -> Any:
    """Every replica full, each with this caller's requests and promises to others."""
    board = board_type(ME, stale_after_s=5.0, clock=lambda: 0.0)
    names = [f"replica{number}" for number in range(num_replicas)]
    promises = tuple(Promise(origin=f"o{i}", tokens=10, requests=1) for i in range(num_origins))
    report = HeadroomReport(
        replica_id="r",
        reported_s=0.0,
        kv_capacity_tokens=40,
        longest_request_tokens=10**6,
        max_requests=10**6,
        drain_tokens_per_s=1.0,
    )
    board.observe(dict.fromkeys(names, report))
    for number in range(1, 1 + 4 * num_replicas):
        assert board.place(asked(number, 10, None, ())) is not None
    board.observe({name: replace(report, promises=promises, reported_s=1.0) for name in names})
    return board


ASKING = asked(0, 10, 1.0, (1, 2))


@pytest.mark.parametrize(
    "question",
    [lambda board: board.rank(ASKING), lambda board: board.place(ASKING), Board.drain_tokens_per_s, Board.free_tokens],
    ids=["rank", "place", "drain_tokens_per_s", "free_tokens"],
)
def test_the_boards_work_grows_with_the_replicas_and_not_with_their_requests(question):
    def work(num_replicas: int, num_origins: int) -> int:
        board = full_board(num_replicas, num_origins)
        board.drain_tokens_per_s()  # what has come since the last question is added up once
        return num_calls(lambda: question(board))

    assert work(32, 64) <= 1.1 * work(32, 8)
    assert work(64, 8) < 2.5 * work(32, 8)
