"""What should be offloaded at the next step: what was asked for, and what memory and requests in flight make of it."""

from __future__ import annotations

from collections.abc import Sequence

from selectn_core.config import OffloadConfig, require
from selectn_core.errors import ConfigError, DeviceMemoryExceeded
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.arena import Arena
from selectn_core.memory.plan_memory import UnmeasuredPlans
from selectn_core.weights.units import Unit


class Target:
    """The plan that an engine follows. Any thread may aim elsewhere; the generation thread asks what that means now.

    `plan` is what was asked for last, by hand or by the policy. `plans` are those that nothing had to be measured for.
    """

    def __init__(self, units: Sequence[Unit], arena: Arena, offload: OffloadConfig) -> None:
        """Aims at the configured number of units, else at the fewest.

        Raises ConfigError where that number is not possible, DeviceMemoryExceeded where none is.
        """
        self._units, self._arena, self._unit = units, arena, offload.unit
        self.plans = UnmeasuredPlans(units, arena.round_up)
        self.plan = self._first(offload)
        self._urgent: OffloadPlan | None = None

    def _first(self, offload: OffloadConfig) -> OffloadPlan:
        if offload.num_offloaded != "auto":
            return self.of("offload.num_offloaded", offload.num_offloaded, offload.num_slots)
        plan = self._fewest_in(self._budget, offload.num_slots)
        if plan is None:
            least = self._bytes(self._everything(offload.num_slots))
            raise DeviceMemoryExceeded(
                f"the model does not fit the device even with every {self._unit} offloaded: the slots take {least:,} "
                f"bytes and the KV cache leaves {self._budget:,}: raise device.memory_gib, or lower batch.kv_tokens or "
                f"offload.num_slots ({offload.num_slots})"
            )
        return plan

    @property
    def is_urgent(self) -> bool:
        """Whether running requests should be preempted for it."""
        return self._urgent is self.plan

    def aim_at(self, plan: OffloadPlan, *, urgent: bool = False) -> None:
        """From the next step on."""
        self._urgent = plan if urgent else None  # first: it says nothing until it is the plan
        self.plan = plan

    def of(self, name: str, num_offloaded: int, num_slots: int) -> OffloadPlan:
        """So many of the units. Raises ConfigError, naming `name`, where the model has fewer or memory is short."""
        allowed = f"0 to {len(self._units)}, the {self._unit}s"
        require(0 <= num_offloaded <= len(self._units), name, num_offloaded, allowed)
        return self.checked(f"{name}={num_offloaded}", self.plans.plan(num_offloaded, num_slots))

    def checked(self, what: str, plan: OffloadPlan) -> OffloadPlan:
        """The plan itself. Raises ConfigError, naming `what`, where it is another model's or memory is short."""
        allowed = f"{len(self._units)}, the model's {self._unit}s"
        require(plan.num_units == len(self._units), "plan.num_units", plan.num_units, allowed)
        wanted = self._bytes(plan)
        if wanted > self._budget:
            least = self._fewest_in(self._budget, plan.num_slots)
            hint = f"at least {least.num_offloaded} must be offloaded" if least else "no number of them would fit"
            raise ConfigError(
                f"{what} is not possible: weights and {plan.slots_used} slots would take {wanted:,} "
                f"bytes of device memory and {self._budget:,} are there; {hint}"
            )
        return plan

    def fewest(self, num_slots: int) -> OffloadPlan:
        """k_min: the plan with the fewest units offloaded that the device's memory allows."""
        return self._fewest_in(self._budget, num_slots) or self._everything(num_slots)

    def with_kv(self, num_sectors: int) -> OffloadPlan:
        """The plan, with more offloaded where the KV cache needs `num_sectors` and has less under it.

        It must be no more than `most_kv_sectors`. Slots take memory as well: where everything through as many leaves
        too little there are fewer.
        """
        plan = self.plan
        if max(num_sectors, self._arena.min_kv_sectors) <= self.kv_sectors(plan):
            return plan
        more = self.fewest_beside(num_sectors, at_least=plan.num_offloaded)
        assert more is not None, "a request longer than max_model_len was admitted"
        return more

    def fewest_beside(self, num_sectors: int, *, at_least: int = 0) -> OffloadPlan | None:
        """The plan with the fewest units offloaded under which the KV cache has `num_sectors`, and its minimum.

        Through as many slots as `plan` has, or fewer. None where it is more than `most_kv_sectors`.
        """
        most = self._arena.num_sectors - max(num_sectors, self._arena.min_kv_sectors)
        by_slots = (
            self._fewest_in(most * self._arena.sector_bytes, num_slots, at_least=at_least)
            for num_slots in range(self.plan.num_slots, 0, -1)
        )
        return next((each for each in by_slots if each is not None), None)

    def kv_sectors(self, plan: OffloadPlan) -> int:
        """Sectors that the KV cache has under `plan`."""
        return self._arena.num_sectors - self._bytes(plan) // self._arena.sector_bytes

    @property
    def most_kv_sectors(self) -> int:
        """Sectors that it has with everything offloaded, through one slot."""
        return self.kv_sectors(self._everything(1))

    @property
    def _budget(self) -> int:
        return self._arena.reachable_bytes(0)

    def _bytes(self, plan: OffloadPlan) -> int:
        return self.plans.bytes_for(plan)

    def _everything(self, num_slots: int) -> OffloadPlan:
        return self.plans.plan(len(self._units), num_slots)

    def _fewest_in(self, budget_bytes: int, num_slots: int, *, at_least: int = 0) -> OffloadPlan | None:
        return self.plans.fewest(num_slots, budget_bytes, at_least=at_least)
