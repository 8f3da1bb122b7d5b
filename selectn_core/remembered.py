"""The recurrence's answers, remembered: a controller asks the same questions at every step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from selectn_core.latency import Link, StepCosts, predict_step_s
from selectn_core.placement import OffloadPlan

Answer = TypeVar("Answer")

_BUCKET, _COARSE_BUCKET = math.log(1.1), math.log(1.25)
_CAPACITY = 4096


def alike(costs: StepCosts, link: Link) -> Hashable:
    """A key that costs and links share if all their ratios to the first unit's compute time are alike to within 10 %.

    The recurrence is linear in time, so nothing else about them matters. What is remembered under it is by how much a
    step exceeds its bound, which is known exactly and moves much more than the excess does.
    """
    unit_s = costs.compute_s[0]
    kinds = costs.distinct
    times_s = [costs.rest_s, *(t for t, _ in kinds), *(link.seconds(size) for _, size in kinds)]
    return tuple(round(math.log(max(t / unit_s, 1e-9)) / _BUCKET) for t in times_s)


def alike_in_time(costs: StepCosts) -> Hashable:
    """A key that costs share if the ratios of their times to the first unit's are alike to within 25 %."""
    unit_s = costs.compute_s[0]
    times_s = [costs.rest_s, *(t for t, _ in costs.distinct)]
    return tuple(round(math.log(max(t / unit_s, 1e-9)) / _COARSE_BUCKET) for t in times_s)


class Remembered:
    """A bounded memory of answers: what was asked for the longest ago goes first."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[object]:
        return iter(self._answers.values())

    def get(self, key: Hashable, compute: Callable[[], Answer]) -> Answer:
        """The answer to `key`, computed if it is not known."""
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key]  # type: ignore[return-value]
        answer = self._answers[key] = compute()
        if len(self._answers) > self._capacity:
            self._answers.popitem(last=False)
        return answer

    def predict_step_s(self, costs: StepCosts, plan: OffloadPlan, link: Link) -> float:
        """As `latency.predict_step_s`, to within a few percent."""
        copied_bytes = 0
        if plan.num_offloaded > plan.num_slots:
            copied_bytes = self.get(plan, lambda: sum(costs.unit_bytes[unit] for unit in plan.offloaded))
        bound_s = max(costs.unloaded_s, copied_bytes / link.bytes_per_s + plan.num_offloaded * link.copy_s)
        key = (plan, alike(costs, link))
        return bound_s * self.get(key, lambda: predict_step_s(costs, plan.offloaded, plan.num_slots, link) / bound_s)
