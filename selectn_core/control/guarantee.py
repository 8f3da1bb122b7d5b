"""What is guaranteed to requests: the memory that stays theirs to their end, and what must be offloaded for it.

A request that has begun needs KV cache until it ends, so it may only count on memory that nobody can take away. With a
policy that is what the *guaranteed* share of the link frees: streamed in time even when the coordinator's lease has run
out. Host memory takes nothing from it: the host's copy of every unit, and the room for swapped KV, are reserved before
the engine serves (`ReserveHost`), however few units are offloaded.
"""

from __future__ import annotations

import math

from selectn_core.latency.placement import OffloadPlan
from selectn_core.offload.control import LinkShare
from selectn_core.offload.offloading import Offloading
from selectn_core.requests.handle import RequestHandle


class Guarantee:
    """An engine's; any thread may ask."""

    def __init__(self, offloading: Offloading, max_requests: int) -> None:
        self._offloading, self._max_requests = offloading, max_requests
        self._cut: tuple[tuple[float, int], OffloadPlan] | None = None  # (bytes at most, slots), and the plan for it

    @property
    def plan(self) -> OffloadPlan:
        """The plan whose memory requests may count on: the one by hand or of a policy that keeps to one, or what the
        guaranteed share streams in time.

        The policy says what that is when it plans a step. What the coordinator has said since then counts at once, also
        on an engine that plans none for want of requests, if it is less: no more bytes than its range has, and no more
        than the guaranteed share streams within the TPOT objective (w k / B <= T, which no schedule beats).
        """
        target, control, share = self._offloading.target, self._offloading.control, self._offloading.link_share
        plan, objectives = control.guaranteed_plan, control.objectives
        if plan is None:
            return target.plan
        if share is None or objectives is None or not control.adapts:
            return plan
        most_bytes = most_streamed_bytes(share, objectives.tpot_s)
        if target.plans.offloaded_bytes(plan) <= most_bytes:
            return plan
        asked = (most_bytes, plan.num_slots)
        if self._cut is None or self._cut[0] != asked:
            least = target.fewest(plan.num_slots)
            cut = target.plans.most_within(plan.num_slots, most_bytes)
            self._cut = asked, cut if cut.num_offloaded > least.num_offloaded else least
        return self._cut[1]

    @property
    def num_offloaded(self) -> int:
        """k_min with what is guaranteed now: the fewest units offloaded with which requests have memory to their end.

        What several are guaranteed together is never more than `plan` has; what they hold already counts whatever it
        has.
        """
        offloading, plan = self._offloading, self.plan
        sectors_for, handles = offloading.geometry.sectors_for_request, self._handles()
        at_their_ends = sum(sectors_for(each.max_total_tokens) for each in handles)
        held = sum(sectors_for(each.num_prompt_tokens + each.num_tokens) for each in handles if each.num_tokens)
        longest = max((sectors_for(each.max_total_tokens) for each in offloading.served()), default=0)
        num_sectors = max(min(at_their_ends, offloading.target.kv_sectors(plan)), held, longest)
        return self._fewest_beside(num_sectors, plan.num_slots)

    def _handles(self) -> list[RequestHandle]:
        return list(self._offloading.requests.by_ticket().values())

    @property
    def wanted_offloaded(self) -> int:
        """The fewest units whose memory holds those in flight, and a quarter and one more, as long as the longest.

        No more than the batch takes, and through as many slots as the plan has. 0 without requests; all units where not
        even they are enough.
        """
        most = self._max_requests
        lengths = [handle.max_total_tokens for handle in self._handles()][:most]
        if not lengths:
            return 0
        sectors = [self._offloading.geometry.sectors_for_request(length) for length in lengths]
        num_more = min(len(lengths) // 4 + 1, most - len(lengths))
        return self._fewest_beside(sum(sectors) + num_more * max(sectors), self._offloading.target.plan.num_slots)

    def _fewest_beside(self, num_sectors: int, num_slots: int) -> int:
        """The fewest units offloaded with which the KV cache has so many sectors; all where no number is enough."""
        arena = self._offloading.arena
        budget = (arena.num_sectors - num_sectors) * arena.sector_bytes
        plan = self._offloading.target.plans.fewest(num_slots, budget)
        return plan.num_offloaded if plan is not None else len(self._offloading.units)


def most_streamed_bytes(share: LinkShare, tpot_s: float) -> float:
    """Bytes of units that may be offloaded whatever happens: within the range, and streamed by the guaranteed share."""
    in_range = math.inf if share.max_offloaded_bytes is None else share.max_offloaded_bytes
    return min(in_range, share.guaranteed_bytes_per_s * tpot_s)
