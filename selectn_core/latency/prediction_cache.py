"""The recurrence's answers, remembered: a controller asks the same questions at every step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s

Answer = TypeVar("Answer")

_BUCKET, _COARSE_BUCKET = math.log(1.1), math.log(1.25)
_SHARES, _COARSE_SHARES = 32, 16
_CAPACITY = 4096
_UNKNOWN = object()


def alike(costs: StepCosts, link: Link) -> Hashable:
    """A key that costs and links share if their times are to one another as nearly as a predicted step need be.

    Other units' compute and what the link copies meanwhile are to the first unit's compute to within 10 %, and the rest
    is the same share of the step to within a thirtieth of it. The recurrence is linear in time, so nothing else about
    the costs of the same units matters. What is remembered under it is by how much a step exceeds its bound, which is
    known exactly and moves much more than the excess does.
    """
    first_s = costs.compute_s[0]
    return (
        round(_SHARES * costs.rest_s / costs.unloaded_s),
        *[round(each / _BUCKET) for each in costs.log_ratios],
        round(math.log(link.bytes_per_s * first_s) / _BUCKET),
        round(link.copy_s / first_s / _BUCKET),
    )


def alike_in_time(costs: StepCosts) -> Hashable:
    """As `alike`, without the link, to within 25 % and a sixteenth of the step."""
    others = [round(each / _COARSE_BUCKET) for each in costs.log_ratios]
    return (round(_COARSE_SHARES * costs.rest_s / costs.unloaded_s), *others)


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
        answer = self._answers.get(key, _UNKNOWN)
        if answer is not _UNKNOWN:
            self._answers.move_to_end(key)
            return answer  # type: ignore[return-value]
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
