"""What the requests inside a replica will hold together at every step to come, if none stops early.

Each gets a token per step until it has its last one, and is gone a few steps later. Adding them up step by step, as one
array, takes as long as there are requests, however many questions are asked of it; asking each request anew at each
step at which another ends would take the square of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Requests do not keep step exactly: one waits for its prefill, another's last token is on its way. Each counts as there
# for so many steps more: always as many, so that what was predicted of a step is still so when it has come closer.
SLACK_STEPS = 8

Tokens = NDArray[np.int64]


class Course(NamedTuple):
    """A request's tokens from now, or its beginning, on: `tokens`, and one more at each step until it has `more`."""

    tokens: int
    more: int

    @property
    def lasts(self) -> int:
        """The last step at which it counts as there; it begins at step 0."""
        return self.more + SLACK_STEPS


class Footprints:
    """What a request of so many tokens takes, as a table: what is known is not asked again, whatever it may cost.

    It must not fall where tokens grow: where it is the same at both ends of a range it is so between them.
    """

    def __init__(self, footprint: Callable[[int], int]) -> None:
        self._footprint = footprint
        self._table: Tokens = np.zeros(0, np.int64)

    def know(self, num_tokens: int) -> None:
        """Asks for every number up to this one: for a long request that takes a while, which may be done before."""
        self._up_to(num_tokens)

    def of(self, num_tokens: int) -> int:
        return int(self._up_to(num_tokens)[num_tokens])

    def at(self, nums_tokens: Tokens) -> Tokens:
        """Of each number of tokens."""
        return self._up_to(int(nums_tokens.max()))[nums_tokens]

    def along(self, course: Course) -> Tokens:
        """At each step of the course until it has all its tokens. [more + 1]"""
        last = course.tokens + course.more
        return self._up_to(last)[course.tokens : last + 1]

    def held(self, course: Course) -> Tokens:
        """At each step of the course at which it counts as there. [lasts + 1]"""
        along = self.along(course)
        return np.concatenate((along, np.repeat(along[-1:], SLACK_STEPS)))

    def _up_to(self, num_tokens: int) -> Tokens:
        known = len(self._table)
        if num_tokens >= known:
            self._table = np.concatenate((self._table, self._between(known, max(2 * known, num_tokens))))
        return self._table

    def _between(self, first: int, last: int) -> Tokens:
        """Of each number from first to last: a range is halved where its ends differ."""
        values = np.empty(last - first + 1, np.int64)
        ranges = [(first, self._footprint(first), last, self._footprint(last))]
        while ranges:
            low, at_low, high, at_high = ranges.pop()
            if at_low == at_high or high - low < 2:
                values[low - first : high - first] = at_low
                values[high - first] = at_high
            else:
                middle = (low + high) // 2
                at_middle = self._footprint(middle)
                ranges += [(low, at_low, middle, at_middle), (middle, at_middle, high, at_high)]
        return values


@dataclass(frozen=True, eq=False, kw_only=True)
class Forecast:
    """What courses that are under way hold together: `held` at each step, and nothing beyond it. [num_steps]"""

    courses: tuple[Course, ...]
    held: Tokens
    footprints: Footprints

    @classmethod
    def of(cls, courses: tuple[Course, ...], footprints: Footprints) -> Forecast:
        num_steps = 1 + max((course.lasts for course in courses), default=-1)
        held = np.zeros(num_steps + 1, np.int64)
        ends = np.zeros(num_steps + 1, np.int64)  # by how much less is held from a step on
        for course in courses:
            along = footprints.along(course)
            held[: len(along)] += along
            ends[len(along)] += along[-1]
            ends[course.lasts + 1] -= along[-1]
        return cls(courses=courses, held=(held + np.cumsum(ends))[:num_steps], footprints=footprints)

    def beside(self, course: Course) -> Forecast:
        """With one more, which begins now."""
        own = self.footprints.held(course)
        held = np.zeros(max(len(own), len(self.held)), np.int64)
        held[: len(self.held)] = self.held
        held[: len(own)] += own
        return Forecast(courses=(*self.courses, course), held=held, footprints=self.footprints)

    @property
    def peak(self) -> int:
        """The most that is held at a step."""
        return int(self.held.max(initial=0))

    def at_peak(self) -> list[int]:
        """What each holds at the first step at which most is held."""
        if not self.courses:
            return []
        step, (tokens, more) = int(self.held.argmax()), np.array(self.courses).T
        held = self.footprints.at(tokens + np.minimum(step, more))
        return [int(each) for each in np.where(step <= more + SLACK_STEPS, held, 0)]

    def num_there(self, step: int) -> int:
        """How many count as there at a step."""
        return sum(course.lasts >= step for course in self.courses)

    def may_begin(self, course: Course, begins: int, capacity: int, max_requests: int) -> bool:
        """Whether there is room for one more from the step at which it begins to its end."""
        num_there = self.num_there(begins)
        if num_there == 0:  # alone it may have more than the capacity
            return True
        if num_there >= max_requests:
            return False
        own, room = self.footprints.held(course), capacity - self.held[begins:]
        num_beside = min(len(own), len(room))
        # Where there is too little room without it as well nobody begins before that is over.
        fits = (own[:num_beside] <= room[:num_beside]).all() and (room >= self.footprints.of(0)).all()
        return bool(fits and own[-1] <= capacity)

    def turn_of(self, course: Course, capacity: int, max_requests: int) -> int:
        """The first step at which one more `may_begin`."""
        num_steps, along = len(self.held), self.footprints.along(course)
        if along[-1] > capacity:
            return num_steps  # alone, when everybody is gone
        ends = sorted(each.lasts for each in self.courses)
        full_until = ends[len(ends) - max_requests] if len(ends) >= max_requests else -1
        # At each step there is room for so many tokens more than it begins with; -1 where there is none for it at all.
        # It must not begin so much earlier that it has more by then, unless so early that it is gone; nor, where there
        # is too little without it as well, at any step before.
        steps, room = np.arange(num_steps), capacity - self.held
        fitting = np.searchsorted(along, room, side="right") - 1
        is_short = fitting < course.more
        first = np.where(room < self.footprints.of(0), 0, np.maximum(steps - course.lasts, 0))[is_short]
        behind = (steps - fitting)[is_short]
        forbidden = np.zeros(num_steps + 2, np.int64)
        has_any = behind > first
        np.add.at(forbidden, first[has_any], 1)
        np.add.at(forbidden, behind[has_any], -1)
        is_free = np.cumsum(forbidden)[: num_steps + 1] == 0
        is_free[: full_until + 1] = False
        return int(is_free.argmax())
