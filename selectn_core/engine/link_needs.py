"""What an engine needs and wants of its host bus, which it may share with others: a number of units in every step."""

from __future__ import annotations

from dataclasses import dataclass

from selectn_core.config import EngineConfig
from selectn_core.control.policies import MOST_SLOTS
from selectn_core.offload.control import LinkShare
from selectn_core.offload.offloading import Offloading


@dataclass(frozen=True, kw_only=True)
class UnitDemand:
    """Units to be streamed in every step, which may take `step_s`: `k_min` at least, `k_max` at most.

    They are counted as if all were as large as the largest, of `unit_bytes`.
    """

    k_min: int
    k_max: int
    unit_bytes: int
    step_s: float


class LinkNeeds:
    """An engine's; any thread may ask. A range of units, here and in `UnitDemand`, counts in the largest of them."""

    def __init__(self, offloading: Offloading, config: EngineConfig) -> None:
        self._offloading = offloading
        self._target, self._plans = offloading.target, offloading.target.plans
        self._num_units, self._num_sharing = len(offloading.units), config.offload.num_sharing
        self._configured_link = config.device.link_gb_per_s * 1e9
        self.largest_unit_bytes = max(unit.num_bytes for unit in offloading.units)
        self._fewest = self._target.fewest(MOST_SLOTS).num_offloaded  # of which memory leaves no choice

    @property
    def link_bytes_per_s(self) -> float:
        """What the link carries if nobody else uses it: as measured, or else as configured."""
        measured = self._offloading.control.measured_link
        return measured.bytes_per_s if measured is not None else self._configured_link

    @property
    def equal_share_bytes_per_s(self) -> float:
        """What it carries for this engine if everybody who may use its bus does."""
        return self.link_bytes_per_s / self._num_sharing

    def demand(self, *, needed: int = 0, wanted: int = 0) -> UnitDemand:
        """What the engine wants of its bus, within its TPOT objective: all units at most.

        At least `needed`, or what memory leaves no choice of; and `wanted` if an equal share of the bus carries that:
        so much is nobody else's, however much host memory they would use with it.

        A plan by hand wants what it is. Where no objective says how long a step may take, it takes an equal share's
        time.
        """
        unit_bytes = self.largest_unit_bytes
        k_min, wanted, k_max = map(self._in_largest, (max(self._fewest, needed), wanted, self._num_units))
        if self._offloading.control.is_manual:
            by_hand = -(-self._plans.offloaded_bytes(self._target.plan) // unit_bytes)
            k_min = k_max = max(k_min, by_hand)
        objectives, share = self._offloading.control.objectives, self.equal_share_bytes_per_s
        step_s = objectives.tpot_s if objectives is not None else max(1, k_max) * unit_bytes / share
        k_min = max(k_min, min(wanted, k_max, int(share * step_s // unit_bytes)))
        return UnitDemand(k_min=k_min, k_max=k_max, unit_bytes=unit_bytes, step_s=step_s)

    def share(self, bytes_per_s: float, guaranteed_bytes_per_s: float, k_max: int) -> LinkShare:
        """The share that a range of up to `k_max` units is.

        What memory leaves no choice of is streamed whatever the share is, and a link of 0 has no latency.
        """
        return LinkShare(
            bytes_per_s=max(1, bytes_per_s),
            guaranteed_bytes_per_s=max(1, guaranteed_bytes_per_s),
            max_offloaded_bytes=k_max * self.largest_unit_bytes,
        )

    def least_share(self) -> LinkShare:
        """An equal share, for the units of which memory leaves no choice."""
        equal = self.equal_share_bytes_per_s
        return self.share(equal, equal, self._in_largest(self._fewest))

    def _in_largest(self, num_offloaded: int) -> int:
        """How many of the largest unit have as many bytes as so many of the units, of which some may be small."""
        plan = self._plans.plan(min(num_offloaded, self._num_units), self._target.plan.num_slots)
        return -(-self._plans.offloaded_bytes(plan) // self.largest_unit_bytes)
