"""The one model of latency: how long a step takes when some of its units are copied in while others compute.

Planner, controller, simulator, benchmarks and tests all call this module (docs/architecture.md gives the symbols).
The model is a recurrence over the units of a step. With w_l the bytes and c_l the compute time of unit l, R the
rest of the step, B the link's bandwidth and S slots:

    copy j starts   when copy j-1 is done (one link) and the unit that used its slot, copy j-S's, is done
    copy j is done  w_j / B (plus a fixed cost per copy) after it started
    unit l starts   when unit l-1 is done and, if it is offloaded, its copy is done
    a step ends     R after its last unit; the link goes on copying for the next step meanwhile

A step with at most S offloaded units copies nothing: their slots keep them, and nothing is freed either.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat

_MAX_WARM_UP_STEPS = 64
_SAME_STATE_S = 1e-12


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What one step shape costs on one device: seconds of compute and bytes of parameters per unit.

    `compute_s[l]` and `unit_bytes[l]` describe unit l in the order of the step; `rest_s` is the step's time
    outside the units (embedding, head, sampling, scheduling), during which the link may copy.
    """

    compute_s: tuple[float, ...]
    unit_bytes: tuple[int, ...]
    rest_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.compute_s) != len(self.unit_bytes):
            raise ValueError(f"{len(self.compute_s)} compute times for {len(self.unit_bytes)} units")

    @cached_property
    def unloaded_s(self) -> float:
        """The step's time with every unit resident: R + sum c_l."""
        return self.starts_s[-1] + self.rest_s

    @cached_property
    def starts_s(self) -> tuple[float, ...]:
        """When each unit starts with every unit resident, and when the last one ends."""
        return tuple(accumulate(self.compute_s, initial=0.0))

    @cached_property
    def log_ratios(self) -> tuple[float, ...]:
        """Of the compute times of all kinds of units but the first, in this order, to the first one's: logarithms."""
        first_s = self.compute_s[0]
        return tuple(math.log(max(compute_s / first_s, 1e-9)) for compute_s, _ in self.distinct[1:])

    @cached_property
    def distinct(self) -> tuple[tuple[float, int], ...]:
        """Compute time and bytes of each kind of unit, once."""
        return tuple(dict.fromkeys(zip(self.compute_s, self.unit_bytes, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Link:
    """The share of the host link that one replica may use now.

    `copy_s` is the fixed cost of one copy, whatever its size.
    """

    bytes_per_s: float
    copy_s: float = 0.0

    def beside(self, factor: float) -> Link:
        """This link as it is to compute that takes `factor` times as long, in that compute's time.

        The recurrence is linear in time: a step of such compute takes `factor` times a step beside this link.
        """
        return Link(bytes_per_s=self.bytes_per_s * factor, copy_s=self.copy_s / factor)

    def seconds(self, num_bytes: int) -> float:
        """Time for one copy of `num_bytes`."""
        return num_bytes / self.bytes_per_s + self.copy_s


def bound_s(costs: StepCosts, offloaded: Sequence[int], num_slots: int, link: Link) -> float:
    """T_bound: what no schedule of these copies can beat, in seconds.

    max(R + sum c_l, sum over offloaded w_l / B). The second term is 0 where every offloaded unit keeps a slot.
    """
    copied = offloaded if len(offloaded) > num_slots else ()
    return max(costs.unloaded_s, sum(link.seconds(costs.unit_bytes[unit]) for unit in copied))


def simulate_steps_s(
    costs: StepCosts,
    offloaded: Sequence[int],
    num_slots: int,
    link: Link,
    num_steps: int,
    *,
    promoted: Sequence[int] = (),
    in_slots: Sequence[int] = (),
) -> list[float]:
    """Durations in seconds of `num_steps` steps, start-up included.

    Args:
        costs: the step shape's costs, the same for every step.
        offloaded: the offloaded units, ascending.
        num_slots: S, at least 1 where anything is offloaded.
        promoted: units that the first step copies into homes of their own (they were offloaded until now).
        in_slots: offloaded units whose bytes are in a slot when the first step starts.
    """
    walk = _Walk(costs, offloaded, num_slots, link)
    walk.start(promoted=promoted, in_slots=in_slots)
    return [walk.step() for _ in range(num_steps)]


def predict_step_s(costs: StepCosts, offloaded: Sequence[int], num_slots: int, link: Link) -> float:
    """Seconds per step once the plan has run for a while: the mean over one period of the recurrence.

    The recurrence is linear in (max, +), so the times relative to a step's start become periodic; the period is
    one step except where S does not divide k and a slot is what limits.
    """
    if not offloaded:
        return costs.unloaded_s
    walk = _Walk(costs, offloaded, num_slots, link)
    if walk.num_slots == 1:
        return walk.one_slot_s()
    walk.start()
    durations: list[float] = []
    states: list[tuple[float, ...]] = []
    for _ in range(_MAX_WARM_UP_STEPS):
        durations.append(walk.step())
        state = walk.relative_state()
        for period, earlier in enumerate(reversed(states), start=1):
            if _is_same(state, earlier):
                return sum(durations[-period:]) / period
        states.append(state)
    tail = durations[len(durations) // 2 :]
    return sum(tail) / len(tail)


def _is_same(state: tuple[float, ...], earlier: tuple[float, ...]) -> bool:
    for now_s, before_s in zip(state, earlier, strict=True):
        if not -_SAME_STATE_S <= now_s - before_s <= _SAME_STATE_S:
            return False
    return True


class _Walk:
    """The recurrence's state between two units."""

    def __init__(self, costs: StepCosts, offloaded: Sequence[int], num_slots: int, link: Link) -> None:
        if offloaded and num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: offloaded units need at least one slot")
        self.costs, self.offloaded, self.link = costs, tuple(offloaded), link
        self.num_slots = min(num_slots, len(self.offloaded))
        # For each offloaded unit, in order: compute of the resident ones before it, and its own. Then what follows.
        self.stretches: list[tuple[float, float]] = []
        before, starts_s = 0, costs.starts_s
        for unit in self.offloaded:
            self.stretches.append((starts_s[unit] - starts_s[before], costs.compute_s[unit]))
            before = unit + 1
        self.tail_s = starts_s[-1] - starts_s[before] + costs.rest_s
        copy_s = {size: link.seconds(size) for _, size in costs.distinct}
        self.copy_s = [copy_s[costs.unit_bytes[unit]] for unit in self.offloaded]
        self.copies_every_step = len(self.offloaded) > self.num_slots
        self.clock_s = 0.0
        self.link_free_s = 0.0
        self.next_copy = 0  # index into the endless repetition of `offloaded`
        self.copied_s: deque[float] = deque()  # when the next S units of that sequence are on the device
        self.home_copied_s: dict[int, float] = {}

    def start(self, *, promoted: Sequence[int] = (), in_slots: Sequence[int] = ()) -> None:
        """Issues the copies that a step after a change of plan begins with, in the order of the step."""
        first = self.offloaded[: self.num_slots]
        ready = {unit: 0.0 for unit in first if unit in in_slots}
        for unit in sorted([*promoted, *(unit for unit in first if unit not in ready)]):
            done_s = self._copy(unit, after_s=0.0)
            (self.home_copied_s if unit in promoted else ready)[unit] = done_s
        self.copied_s.extend(ready[unit] for unit in first)
        self.next_copy = len(first)

    def one_slot_s(self) -> float:
        """Seconds per step through one slot: each copy waits for the unit before it, and is hidden until the next one.

        The link is never behind then: what the recurrence comes to is a sum.
        """
        if not self.copies_every_step:
            return self.costs.unloaded_s
        total_s, before_s = 0.0, self.tail_s
        for (resident_s, compute_s), copy_s in zip(self.stretches, self.copy_s, strict=True):
            between_s = before_s + resident_s
            total_s += compute_s + (between_s if between_s > copy_s else copy_s)
            before_s = 0.0
        return total_s

    def step(self) -> float:
        """Advances by one step and returns its duration in seconds."""
        return self._step_with_promotions() if self.home_copied_s else self._steady_step()

    def _steady_step(self) -> float:
        """Only offloaded units can wait: the others are added up. The controller's innermost loop."""
        clock_s, link_free_s, copied_s = self.clock_s, self.link_free_s, self.copied_s
        copies_s: Iterable[float | None] = repeat(None)
        if self.copies_every_step:  # as many as there are offloaded units: after the step the next one is the same
            next_copy = self.next_copy % len(self.offloaded)
            copies_s = self.copy_s[next_copy:] + self.copy_s[:next_copy]
        for (resident_s, compute_s), copy_s in zip(self.stretches, copies_s, strict=False):
            clock_s += resident_s
            ready_s = copied_s.popleft()
            if ready_s > clock_s:
                clock_s = ready_s
            clock_s += compute_s
            if copy_s is None:
                copied_s.append(clock_s)
                continue
            if clock_s > link_free_s:
                link_free_s = clock_s
            link_free_s += copy_s
            copied_s.append(link_free_s)
        start_s, self.clock_s, self.link_free_s = self.clock_s, clock_s + self.tail_s, link_free_s
        return self.clock_s - start_s

    def _step_with_promotions(self) -> float:
        start_s, is_offloaded = self.clock_s, set(self.offloaded)
        for unit, compute_s in enumerate(self.costs.compute_s):
            if unit in is_offloaded:
                self._offloaded_unit(compute_s)
            else:
                self.clock_s = max(self.clock_s, self.home_copied_s.pop(unit, 0.0)) + compute_s
        self.clock_s += self.costs.rest_s
        return self.clock_s - start_s

    def relative_state(self) -> tuple[float, ...]:
        """What the next step's duration depends on, relative to now; times already past count as now."""
        now_s = self.clock_s
        return tuple([t - now_s if t > now_s else 0.0 for t in (self.link_free_s, *self.copied_s)])

    def _offloaded_unit(self, compute_s: float) -> None:
        self.clock_s = max(self.clock_s, self.copied_s.popleft()) + compute_s
        if not self.copies_every_step:
            self.copied_s.append(self.clock_s)
            return
        unit = self.offloaded[self.next_copy % len(self.offloaded)]
        self.copied_s.append(self._copy(unit, after_s=self.clock_s))
        self.next_copy += 1

    def _copy(self, unit: int, *, after_s: float) -> float:
        self.link_free_s = max(self.link_free_s, after_s) + self.link.seconds(self.costs.unit_bytes[unit])
        return self.link_free_s


def swap_s(num_bytes: int, link: Link) -> float:
    """Seconds on the link to move a preempted request's KV out and back."""
    return 2 * num_bytes / link.bytes_per_s


def recompute_s(num_tokens: int, seconds_per_token: float) -> float:
    """Seconds to compute it again, at what a token of prefill costs in a full step."""
    return num_tokens * seconds_per_token
