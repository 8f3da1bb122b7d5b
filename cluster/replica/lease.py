"""What a replica may do now: the replica's side of the protocol as a pure state machine; the clock is an argument.

It starts with nothing: only the coordinator knows what a bus has left. Every change of what is allowed, a lapsed
lease included, has a number, the version. A report says the version, an update is for one, and an update for
another is dropped: two that cross, arrive twice or in the wrong order cannot both be applied. A lease counts from when
the report it answers was sent, so it ends here before it ends for the coordinator, however long the answer took.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.bus.allocation import unit_cost_bytes_per_s
from cluster.protocol.messages import (
    NO_EPOCH,
    NOTHING,
    Allowance,
    Epoch,
    KvUse,
    LinkDemand,
    RangeUpdate,
    ReplicaReport,
)
from selectn_core.bounds import flaw_in


class RangeHolder:
    """One replica's allowance. Not thread-safe: range_client.py calls it from one thread."""

    def __init__(self, *, replica_id: str, node_id: str, bus_id: str) -> None:
        """`replica_id` is new for every start of a replica."""
        self.replica_id, self.node_id, self.bus_id = replica_id, node_id, bus_id
        self.epoch: Epoch = NO_EPOCH
        self.problem: str | None = None
        self.lease_end_s: float | None = None
        self._allowed, self._k_max = NOTHING, 0
        self._version = self._sequence = self._heard_life = 0

    @property
    def version(self) -> int:
        """How often what is allowed has changed."""
        return self._version

    def allowed(self, now_s: float) -> Allowance:
        """What the replica may do now; with the lease gone its link share is the fallback."""
        self.tick(now_s)
        return self._allowed

    def has_lease(self, now_s: float) -> bool:
        """Whether the coordinator's word still counts."""
        self.tick(now_s)
        return self.lease_end_s is not None

    def k_range(self, link: LinkDemand, now_s: float) -> tuple[int, int]:
        """(k_min, k_max) of `link` under what is allowed now. k_min is its own: memory or requests need it."""
        affordable = self.allowed(now_s).link_bytes_per_s // unit_cost_bytes_per_s(link)
        if self.lease_end_s is not None:
            affordable = min(affordable, self._k_max)
        return link.k_min, max(link.k_min, min(link.k_max, affordable))

    def report(
        self,
        link: LinkDemand,
        now_s: float,
        *,
        kv: KvUse = KvUse(),  # noqa: B008 -- frozen
        is_leaving: bool = False,
    ) -> ReplicaReport:
        """The next report. With `is_leaving` the replica has stopped using the link for good."""
        self._sequence += 1
        return ReplicaReport(
            replica_id=self.replica_id,
            node_id=self.node_id,
            bus_id=self.bus_id,
            sequence=self._sequence,
            sent_s=now_s,
            allowed=self.allowed(now_s),
            version=self._version,
            heard_life=self._heard_life,
            link=link,
            kv=kv,
            is_leaving=is_leaving,
        )

    def apply(self, update: RangeUpdate, now_s: float, link: LinkDemand | None = None) -> bool:
        """Takes what `update` allows, if it is of the coordinator's latest life, for this version, and in time.

        And if it leaves what `link`, the demand of now, needs at least: one that was made before this much was needed
        may have given it to others. It is dropped, and the next one will know.
        """
        if update.replica_id != self.replica_id or update.epoch.life < self._heard_life or flaw_in(update):
            return False
        self._heard_life = update.epoch.life
        self.tick(now_s)
        lease_end_s = update.sent_s + update.lease_s
        if update.for_version != self._version or lease_end_s <= now_s:
            return False
        if link is not None and self._takes_what_is_needed(update, link):
            return False
        self._version += 1
        self._allowed, self._k_max = update.allowed, update.k_max
        self.epoch, self.problem, self.lease_end_s = update.epoch, update.problem, lease_end_s
        return True

    def _takes_what_is_needed(self, update: RangeUpdate, link: LinkDemand) -> bool:
        needed, own, new = link.k_min * unit_cost_bytes_per_s(link), self._allowed, update.allowed
        is_less = new.link_bytes_per_s < min(needed, own.link_bytes_per_s) or new.fallback_bytes_per_s < min(
            needed, own.fallback_bytes_per_s
        )
        return update.k_min < link.k_min and is_less

    def tick(self, now_s: float) -> bool:
        """Falls back if the lease has run out; True if that happened now."""
        if self.lease_end_s is None or now_s < self.lease_end_s:
            return False
        self._version += 1
        self._allowed = replace(self._allowed, link_bytes_per_s=self._allowed.fallback_bytes_per_s)
        self.lease_end_s = None
        return True
