"""The door and the board decide as their references do, which compute everything anew; in linear time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.door import Door, Visit
from selectn_core.errors import EngineOverloaded
from tests.unit.cluster import reference_door

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
