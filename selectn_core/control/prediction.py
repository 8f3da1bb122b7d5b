"""What a step will take under a plan: by the record, by what steps have taught since, and by what copies slow.

Apart from the controller, which decides by it.
"""

from __future__ import annotations

from selectn_core.control.estimates import ComputeScale, LinkEstimate
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan, freed_bytes
from selectn_core.latency.prediction_cache import Remembered
from selectn_core.latency.recurrence import Link, simulate_steps_s
from selectn_core.latency.step_times import StepTimes, scaled, slowed
from selectn_core.latency.steps import StepRecord, StepShape


class Predictor:
    """Seconds of steps, learned from each that runs. What was asked before is remembered."""

    def __init__(
        self, times: StepTimes, link: Link, *, slowdown: float, guaranteed_share: float, percentile: float
    ) -> None:
        """As `Controller`'s."""
        self.times, self.slowdown = times, slowdown
        self.link = LinkEstimate(link, guaranteed_share)
        # Of steps that only decode, and of others.
        self.scales = {is_decode_only: ComputeScale(percentile) for is_decode_only in (True, False)}
        self.remembered = Remembered()
        self._last_usage: LinkUsage | None = None
        self._steady: dict[tuple[StepShape, OffloadPlan], float] = {}  # since something was learned

    @property
    def learned(self) -> tuple[float, float, float]:
        """All that steps have taught: the link's bytes per second, and how far the record is off."""
        return self.link.link.bytes_per_s, self.scales[True].high, self.scales[False].high

    def aim_at(self, percentile: float) -> None:
        """So many requests, in percent, are to keep their objectives: how careful `steady_s` is."""
        for scale in self.scales.values():
            scale.percentile = percentile

    def next_step(self) -> None:
        """Another step is to be decided: what was learned, or told of the link, counts from now on."""
        self._steady.clear()

    def learn(self, record: StepRecord, usage: LinkUsage) -> None:
        """Takes in what a step took, and what the link has carried in all."""
        if self._last_usage is not None:
            self.link.add(usage.since(self._last_usage))
        self._last_usage = usage
        copied_bytes = record.offloaded_bytes if record.num_offloaded > record.num_slots else 0
        unloaded_s = self.times.expected_s(record.shape)
        unloaded_s *= slowed(unloaded_s, copied_bytes, self.link.link, self.slowdown)
        self.scales[record.shape.is_decode_only].add((record.duration_s - record.stall_s) / unloaded_s)

    def steady_s(self, shape: StepShape, plan: OffloadPlan) -> float:
        """Seconds of a step of this shape once `plan` has held for a while, on the careful side."""
        asked = (shape, plan)
        if asked not in self._steady:
            self._steady[asked] = self._with_factor_s(shape, plan, self.factor(shape, plan, careful=True))
        return self._steady[asked]

    def next_s(self, shape: StepShape, current: OffloadPlan, plan: OffloadPlan) -> float:
        """Seconds that the next step should take, the copies of a change from `current` to `plan` included."""
        factor = self.factor(shape, plan, careful=False)
        if plan == current:
            return self._with_factor_s(shape, plan, factor)
        promoted = sorted(set(current.offloaded) - set(plan.offloaded))
        in_slots = set(current.offloaded[: current.num_slots])
        kept = [unit for unit in plan.offloaded if unit in in_slots]
        costs, link = scaled(self.times.expected(shape), factor), self.link.link
        return simulate_steps_s(costs, plan.offloaded, plan.num_slots, link, 1, promoted=promoted, in_slots=kept)[0]

    def factor(self, shape: StepShape, plan: OffloadPlan, *, careful: bool) -> float:
        """Compute under `plan` over what the record expects: what was learned, and what copies slow it by."""
        scale, unloaded_s = self.scales[shape.is_decode_only], self.times.expected_s(shape)
        copied_bytes = self.offloaded_bytes(plan) if self.slowdown and plan.num_offloaded > plan.num_slots else 0
        return (scale.high if careful else scale.middle) * slowed(
            unloaded_s, copied_bytes, self.link.link, self.slowdown
        )

    def offloaded_bytes(self, plan: OffloadPlan) -> int:
        """Bytes of the units that live only in host memory."""
        return self.remembered.get(plan, lambda: sum(self.times.unit_bytes[unit] for unit in plan.offloaded))

    def freed_bytes(self, plan: OffloadPlan) -> int:
        """Bytes of device memory that `plan` frees: those of its units, less its slots."""
        return freed_bytes(plan, self.times.unit_bytes)

    def _with_factor_s(self, shape: StepShape, plan: OffloadPlan, factor: float) -> float:
        link = self.link.link.beside(factor)
        return factor * self.remembered.predict_step_s(self.times.expected(shape), plan, link)
