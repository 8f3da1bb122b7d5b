"""What is kept of a decision about the interval: plans and limits as they were, to be looked at when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from selectn_core.latency.placement import OffloadPlan, freed_bytes
from selectn_core.latency.steps import StepShape
from selectn_core.offload.control import Decision, LimitedBy, PlanLimits

# "offload_others": as many units, but not the same ones, or through more or fewer slots.
IntervalVerdict = Literal["offload_more", "offload_fewer", "offload_others", "stay"]
INTERVAL_VERDICTS: tuple[IntervalVerdict, ...] = get_args(IntervalVerdict)


class IntervalFacts(NamedTuple):
    """From `before` to `after`. `target` is what the policy or a hand asked for: memory may need more than that.

    `decision` and `shape` are of the step that was scheduled, None where the plan changed between steps; `limits` None:
    by hand.
    """

    before: OffloadPlan
    after: OffloadPlan
    target: OffloadPlan
    decision: Decision | None
    shape: StepShape | None
    limits: PlanLimits | None

    @property
    def verdict(self) -> IntervalVerdict:
        if self.after == self.before:
            return "stay"
        if self.after.num_offloaded == self.before.num_offloaded:
            return "offload_others"
        return "offload_more" if self.after.num_offloaded > self.before.num_offloaded else "offload_fewer"

    @property
    def reason(self) -> LimitedBy:
        """Why `after` offloads what it does, and not more."""
        if self.after != self.target:
            return "memory"
        return "by_hand" if self.limits is None else self.limits.limited_by(self.after)

    @property
    def request_id(self) -> None:
        return None

    @property
    def inputs(self) -> Mapping[str, float | None]:
        return {
            "k_before": self.before.num_offloaded,
            "k_after": self.after.num_offloaded,
            "k_asked_for": self.target.num_offloaded,
            "num_units": self.after.num_units,
            "slots_before": self.before.num_slots,
            "slots_after": self.after.num_slots,
            **self._of_step(),
            **self._of_limits(),
        }

    def _of_step(self) -> dict[str, float | None]:
        shape, decision = self.shape, self.decision
        return {
            "step_tokens": shape.num_tokens if shape is not None else None,
            "step_decodes": shape.num_decodes if shape is not None else None,
            "step_kv_tokens": shape.kv_tokens if shape is not None else None,
            "held_s": decision.held_s if decision is not None else None,
            "predicted_s": decision.predicted_s if decision is not None else None,
            "limit_s": decision.limit_s if decision is not None else None,
            "is_urgent": float(decision.urgent) if decision is not None else None,
        }

    def _of_limits(self) -> dict[str, float | None]:
        limits, after = self.limits, self.after
        if limits is None:
            return {}
        sizes = limits.unit_bytes
        return {
            "link_bytes_per_s": limits.link_bytes_per_s,
            "share_bytes_per_s": limits.share_bytes_per_s,
            "max_offloaded_bytes": limits.max_offloaded_bytes,
            "needed_bytes": limits.held_freed_bytes,
            "offloaded_bytes": sum(sizes[unit] for unit in after.offloaded),
            "freed_bytes": freed_bytes(after, sizes),
            "next_unit_bytes": limits.next_unit_bytes(after),
        }
