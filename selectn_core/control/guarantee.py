"""What requests may be promised: the memory that stays theirs to their end, and what must be offloaded for it.

A request that has begun needs KV cache until it ends, so it may only count on memory that nobody can take away. With a
policy that is what the *guaranteed* share of the link frees: streamed in time even when the coordinator's lease has run
out. Host memory takes nothing from it: the host's copy of every unit, and the room for swapped KV, are reserved before
the engine serves (`ReserveHost`), however few units are offloaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from selectn_core.control.steering import LinkShare
from selectn_core.latency.placement import OffloadPlan

if TYPE_CHECKING:
    from selectn_core.engine.engine import Engine


class Promises:
    """An engine's; any thread may ask."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cut: tuple[tuple[float, int], OffloadPlan] | None = None  # (bytes at most, slots), and the plan for it

    @property
    def plan(self) -> OffloadPlan:
        """The plan whose memory requests may count on: the one by hand or of a policy that keeps to one, or what the
        guaranteed share streams in time.

        The policy says what that is when it plans a step. What the coordinator has said since then counts at once, also
        on an engine that plans none for want of requests, if it is less: no more bytes than its range has, and no more
        than the guaranteed share streams within the TPOT objective (w k / B <= T, which no schedule beats).
        """
        engine, steering, share = self._engine, self._engine.steering, self._engine.link_share
        if steering is None:
            return engine.target.plan
        plan = steering.guaranteed_plan
        if share is None or not steering.controller.policy.adapts:
            return plan
        most_bytes = most_streamed_bytes(share, steering.objectives.tpot_s)
        if engine.target.plans.offloaded_bytes(plan) <= most_bytes:
            return plan
        asked = (most_bytes, plan.num_slots)
        if self._cut is None or self._cut[0] != asked:
            least = engine.target.fewest(plan.num_slots)
            cut = engine.target.plans.most_within(plan.num_slots, most_bytes)
            self._cut = asked, cut if cut.num_offloaded > least.num_offloaded else least
        return self._cut[1]

    @property
    def num_offloaded(self) -> int:
        """k_min with what is promised now: the fewest units offloaded with which requests have memory to their end.

        What several are promised together is never more than `plan` has; what they hold already counts whatever it has.
        """
        engine = self._engine
        sectors_for, plan = engine.batching.geometry.sectors_for_request, self.plan
        handles = engine.handles()
        at_their_ends = sum(sectors_for(each.max_total_tokens) for each in handles)
        held = sum(sectors_for(each.num_prompt_tokens + each.num_tokens) for each in handles if each.num_tokens)
        longest = max((sectors_for(each.max_total_tokens) for each in engine.served_handles()), default=0)
        num_sectors = max(min(at_their_ends, engine.target.kv_sectors(plan)), held, longest)
        return self._fewest_beside(num_sectors, plan.num_slots)

    @property
    def wanted_offloaded(self) -> int:
        """The fewest units whose memory holds those in flight, and a quarter and one more, as long as the longest.

        No more than the batch takes, and through as many slots as the plan has. 0 without requests; all units where not
        even they are enough.
        """
        engine = self._engine
        most = engine.config.batch.max_requests
        lengths = [handle.max_total_tokens for handle in engine.handles()][:most]
        if not lengths:
            return 0
        sectors = [engine.batching.geometry.sectors_for_request(length) for length in lengths]
        num_more = min(len(lengths) // 4 + 1, most - len(lengths))
        return self._fewest_beside(sum(sectors) + num_more * max(sectors), engine.target.plan.num_slots)

    def _fewest_beside(self, num_sectors: int, num_slots: int) -> int:
        """The fewest units offloaded with which the KV cache has so many sectors; all where no number is enough."""
        engine = self._engine
        budget = (engine.arena.num_sectors - num_sectors) * engine.arena.sector_bytes
        plan = engine.target.plans.fewest(num_slots, budget)
        return plan.num_offloaded if plan is not None else len(engine.units)


def most_streamed_bytes(share: LinkShare, tpot_s: float) -> float:
    """Bytes of units that may be offloaded whatever happens: within the range, and streamed by the guaranteed share."""
    in_range = math.inf if share.max_offloaded_bytes is None else share.max_offloaded_bytes
    return min(in_range, share.guaranteed_bytes_per_s * tpot_s)
