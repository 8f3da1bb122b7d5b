"""The coordinator as a pure state machine: reports and a clock in, range updates out. No Ray; see docs/cluster.md.

Safety rests on one account: per replica the most it may be doing, given everything that was ever sent to it. That is
what its last report says it may do (its link share until a lease that began before the report must be over, the
fallback after that), or an update that was sent for the version it reported and may still arrive. Nobody is given
more than those accounts leave of the bus, so who is to shrink does so first, and who is to grow when that was heard.

State is soft. A new life knows nothing, so for one lease it raises nobody and only renews what replicas hold: what the
previous life had given out stays within the bus. After that the replicas which have not been heard yet hold at most
their fallback, an equal share, which is kept free for as many as the node's agent says there are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cluster.bus.allocation import BusOvercommitted, allocate_bus, max_min_shares, unit_cost_bytes_per_s
from cluster.protocol.messages import (
    NOTHING,
    Allowance,
    BusState,
    Epoch,
    KvUse,
    LinkDemand,
    NodeState,
    RangeUpdate,
    ReplicaReport,
)
from selectn_core.bounds import Bounds, check_numbers, flaw_in, require

logger = logging.getLogger(__name__)

LEASE = Bounds(above=0, at_most=120)
# A share that differs by less than this goes out with the next renewal, not at once.
_WORTH_SENDING = 0.01
_MAX_PROBLEM_CHARACTERS = 2000

Heard = Literal["old", "same", "new"]


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """`lease_s` must be the same in every life. Two clocks may differ in speed by `clock_drift`, in what they show by
    anything. A replica or node that nobody has vouched for in `forget_after_s` counts as gone.
    """

    lease_s: Annotated[float, LEASE] = 10.0
    clock_drift: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.01
    forget_after_s: Annotated[float, Bounds(above=0, at_most=1e9)] = 600.0

    def __post_init__(self) -> None:
        check_numbers(self, "coordinator")
        allowed = f"at least two leases: {2 * self.lease_bound_s:g}"
        is_enough = self.forget_after_s >= 2 * self.lease_bound_s
        require(is_enough, "coordinator.forget_after_s", self.forget_after_s, allowed)

    @property
    def lease_bound_s(self) -> float:
        """After this long on the coordinator's clock a lease is over on anybody's."""
        return self.lease_s * (1 + self.clock_drift)


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """What is known of one replica. `committed_bytes_per_s` is the most of its bus that it may be using."""

    replica_id: str
    node_id: str
    bus_id: str
    is_live: bool
    version: int
    allowed: Allowance
    committed_bytes_per_s: int
    link: LinkDemand
    kv: KvUse


@dataclass(frozen=True, kw_only=True)
class CoordinatorStatus:
    """`is_settling`: this life is younger than a lease and raises nobody. `num_refused`: reports that made no sense.

    `oldest_report_s` is the age of that node's last report which was heard the longest ago; None without nodes.
    """

    life: int
    is_settling: bool
    num_nodes: int
    replicas: tuple[ReplicaStatus, ...]
    num_refused: int = 0
    oldest_report_s: float | None = None


@dataclass
class _Replica:
    """The last report, and what was sent since that the replica may still apply, folded into its maximum."""

    report: ReplicaReport
    received_s: float
    sent: Allowance = NOTHING
    sent_end_s: float = 0.0


@dataclass
class _Bus:
    """A bus's replicas by id, and its last division."""

    replicas: dict[str, _Replica] = field(default_factory=dict)
    key: object = None
    counts: dict[str, int] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class _Node:
    report: NodeState
    received_s: float


@dataclass(frozen=True, kw_only=True)
class _View:
    """A bus at one moment. `room` is what no account covers; it is negative while the bus is overcommitted."""

    committed: dict[str, int]
    room: int
    equal_share: int
    shares: dict[str, int]
    counts: dict[str, int]

    def allowed(self, replica: _Replica) -> Allowance:
        """What the replica should do, as far as the accounts of the others allow it now."""
        name, own = replica.report.replica_id, replica.report.allowed
        room = self.room + self.committed[name]
        link = min(self.shares.get(name, own.link_bytes_per_s), max(own.link_bytes_per_s, room))
        return Allowance(link_bytes_per_s=link, fallback_bytes_per_s=min(link, self.equal_share))


class Coordinator:
    """One life of the coordinator. `life` must grow with every restart: wall-clock nanoseconds do."""

    def __init__(self, config: CoordinatorConfig, *, life: int, now_s: float) -> None:
        self._config = config
        self._num_refused = 0
        self._begin(life, now_s)

    @property
    def life(self) -> int:
        """What a node's agent puts into its next report as `heard_life`."""
        return self._life

    def on_node_report(self, report: NodeState, now_s: float) -> None:
        """Takes note of a node's buses. Older reports than the last are ignored, and what makes no sense is counted."""
        if self._is_refused(report.node_id, flaw_in(report)):
            return
        node = self._nodes.get(report.node_id)
        if node is None or report.sequence > node.report.sequence:
            self._nodes[report.node_id] = _Node(report, now_s)

    def on_replica_report(self, report: ReplicaReport, now_s: float) -> Heard:
        """Takes note of a replica's state. "old": a later one is known, this one is to be left unanswered;
        "same": nothing in it changes what others may do. One that makes no sense is left unanswered too, and counted.
        """
        if self._is_refused(report.replica_id, flaw_in(report) or report.link.flaw):
            return "old"
        if report.heard_life > self._life:
            # A clock went back over the restart. Updates of a life that is not the latest would be ignored.
            self._begin(report.heard_life + 1, now_s)
        bus = self._buses.setdefault((report.node_id, report.bus_id), _Bus())
        known = bus.replicas.get(report.replica_id)
        if known is not None and report.sequence <= known.report.sequence:
            return "old"
        if report.is_leaving:
            bus.replicas.pop(report.replica_id, None)
            return "new"
        is_same = known is not None and _concerns_others(known.report) == _concerns_others(report)
        if known is not None and known.report.version == report.version:
            known.report, known.received_s = report, now_s
        else:
            bus.replicas[report.replica_id] = _Replica(report, now_s)
        return "same" if is_same else "new"

    def wanting_updates(self, report: ReplicaReport, now_s: float) -> list[ReplicaReport]:
        """Last reports of the replicas on the reporting one's bus, itself included, that should do something else by
        enough to be told before their renewal.
        """
        key = (report.node_id, report.bus_id)
        if key not in self._buses:
            return []
        view = self._view(key, now_s)
        return [each.report for each in self._buses[key].replicas.values() if _should_change(each, view)]

    def update_for(self, report: ReplicaReport, now_s: float) -> RangeUpdate | None:
        """The answer to a replica's last report; None if there is nothing that it may be told.

        Whatever is returned counts as sent: it is in the account from here on.
        """
        key = (report.node_id, report.bus_id)
        replica = self._buses[key].replicas.get(report.replica_id) if key in self._buses else None
        if replica is None:
            return None
        view = self._view(key, now_s)
        allowed, counts = (view.allowed(replica), view.counts) if view else (report.allowed, {})
        if view is None and allowed == NOTHING:
            return None
        affordable = allowed.link_bytes_per_s // unit_cost_bytes_per_s(report.link)
        k_max = min(affordable, counts.get(report.replica_id, affordable))
        replica.sent = _larger(replica.sent if now_s < replica.sent_end_s else _lapsed(replica.sent), allowed)
        replica.sent_end_s = now_s + self._config.lease_bound_s
        self._number += 1
        return RangeUpdate(
            epoch=Epoch(life=self._life, number=self._number),
            replica_id=report.replica_id,
            for_version=report.version,
            sent_s=report.sent_s,
            lease_s=self._config.lease_s,
            allowed=allowed,
            k_min=report.link.k_min,
            k_max=max(report.link.k_min, min(report.link.k_max, k_max)),
            problem=self._buses[key].problem,
        )

    def sweep(self, now_s: float) -> None:
        """Forgets replicas that are gone, and nodes that have not been heard of for long."""
        for node_id, node in list(self._nodes.items()):
            if now_s >= node.received_s + self._config.forget_after_s:
                del self._nodes[node_id]
        for key, bus in list(self._buses.items()):
            for replica_id, replica in list(bus.replicas.items()):
                if self._is_gone(key, replica, now_s):
                    del bus.replicas[replica_id]
            if not bus.replicas:
                del self._buses[key]

    def status(self, now_s: float) -> CoordinatorStatus:
        """What there is to see, replicas by id."""
        replicas = [
            ReplicaStatus(
                replica_id=replica.report.replica_id,
                node_id=replica.report.node_id,
                bus_id=replica.report.bus_id,
                is_live=self._is_live(replica, now_s),
                version=replica.report.version,
                allowed=replica.report.allowed,
                committed_bytes_per_s=self._committed_link(replica, now_s),
                link=replica.report.link,
                kv=replica.report.kv,
            )
            for bus in self._buses.values()
            for replica in bus.replicas.values()
        ]
        return CoordinatorStatus(
            life=self._life,
            is_settling=self._is_settling(now_s),
            num_nodes=len(self._nodes),
            num_refused=self._num_refused,
            oldest_report_s=max((now_s - node.received_s for node in self._nodes.values()), default=None),
            replicas=tuple(sorted(replicas, key=lambda each: each.replica_id)),
        )

    def _is_refused(self, sender: str, flaw: str | None) -> bool:
        if flaw is None:
            return False
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:  # the 1st, 2nd, 4th, ...: a sender may never stop
            logger.warning("report %d that makes no sense, from %s: %s", self._num_refused, sender, flaw)
        return True

    def _begin(self, life: int, now_s: float) -> None:
        self._life, self._born_s, self._number = life, now_s, 0
        self._nodes: dict[str, _Node] = {}
        self._buses: dict[tuple[str, str], _Bus] = {}

    # -- who is there --------------------------------------------------------------------------------------------

    def _is_settling(self, now_s: float) -> bool:
        return now_s < self._born_s + self._config.lease_bound_s

    def _is_live(self, replica: _Replica, now_s: float) -> bool:
        """Whether a lease it had when it last reported may still run."""
        return now_s < replica.received_s + self._config.lease_bound_s

    def _is_gone(self, key: tuple[str, str], replica: _Replica, now_s: float) -> bool:
        silent_s = replica.received_s + self._config.lease_bound_s
        if now_s < silent_s:
            return False
        if now_s >= replica.received_s + self._config.forget_after_s:
            return True
        node, bus = self._nodes.get(key[0]), self._bus_report(key)
        there = bus.replica_ids if bus and node and node.received_s >= silent_s and self._is_trusted(node) else None
        return there is not None and replica.report.replica_id not in there

    def _is_trusted(self, node: _Node) -> bool:
        """Whether the report was made in this life: an older one may not know who has come since."""
        return node.report.heard_life == self._life

    def _bus_report(self, key: tuple[str, str]) -> BusState | None:
        node = self._nodes.get(key[0])
        return next((bus for bus in node.report.buses if bus.bus_id == key[1]), None) if node else None

    def _num_unheard(self, key: tuple[str, str], report: BusState, now_s: float) -> int:
        """Replicas on the bus that the previous life may have known and this one does not."""
        known = self._buses[key].replicas
        if report.replica_ids is not None and self._is_trusted(self._nodes[key[0]]):
            return sum(1 for replica_id in report.replica_ids if replica_id not in known)
        if now_s >= self._born_s + self._config.forget_after_s:
            return 0
        return max(0, report.num_devices - len(known))

    # -- what they may be doing ----------------------------------------------------------------------------------

    def _committed_link(self, replica: _Replica, now_s: float) -> int:
        """The most of its bus that the replica may be using, in bytes/s."""
        held, sent = replica.report.allowed, replica.sent
        most = max(
            held.link_bytes_per_s if self._is_live(replica, now_s) else held.fallback_bytes_per_s,
            sent.link_bytes_per_s if now_s < replica.sent_end_s else sent.fallback_bytes_per_s,
        )
        if replica.report.heard_life != self._life:
            # It may have applied an update of the previous life since it reported.
            bus = self._bus_report((replica.report.node_id, replica.report.bus_id))
            most = max(most, _equal_share(bus) if bus else 0)
        return most

    # -- what they should be doing -------------------------------------------------------------------------------

    def _view(self, key: tuple[str, str], now_s: float) -> _View | None:
        """Accounts and shares of a bus and its node; None while nobody may be told anything new."""
        bus, report = self._buses[key], self._bus_report(key)
        if report is None or self._is_settling(now_s):
            return None
        unheard = self._num_unheard(key, report, now_s) * _equal_share(report)
        committed = {name: self._committed_link(each, now_s) for name, each in bus.replicas.items()}
        self._divide(bus, report, committed, unheard, now_s)
        return _View(
            committed=committed,
            room=report.bytes_per_s - unheard - sum(committed.values()),
            equal_share=_equal_share(report),
            shares=bus.shares,
            counts=bus.counts,
        )

    def _divide(self, bus: _Bus, report: BusState, committed: dict[str, int], unheard: int, now_s: float) -> None:
        """Brings the bus's division up to date, if anything it depends on has changed."""
        live = {name: each.report.link for name, each in bus.replicas.items() if self._is_live(each, now_s)}
        held = sum(share for name, share in committed.items() if name in live)
        silent = sum(committed.values()) - held
        # What the live ones hold together is theirs, even where more is kept free for others than there is.
        capacity = min(report.bytes_per_s, max(report.bytes_per_s - silent - unheard, held))
        key = (capacity, live)
        if key == bus.key:
            return
        bus.key, bus.problem = key, None
        smallest = min((link.unit_bytes for link in live.values()), default=1)
        costs = {name: unit_cost_bytes_per_s(link) for name, link in live.items()}
        try:
            bus.counts = allocate_bus(live, capacity, bus.counts, tie_bytes=smallest - 1).num_offloaded
            needed = {name: bus.counts[name] * costs[name] for name in live}
        except BusOvercommitted as error:
            bus.problem = str(error)[:_MAX_PROBLEM_CHARACTERS]
            bus.counts = {name: link.k_min for name, link in live.items()}
            needed = max_min_shares(capacity, {name: link.k_min * costs[name] for name, link in live.items()})
        spare = (capacity - sum(needed.values())) // max(1, len(live))
        bus.shares = {name: share + spare for name, share in needed.items()}


def _should_change(replica: _Replica, view: _View | None) -> bool:
    if view is None:
        return False
    new, old = view.allowed(replica), replica.report.allowed
    a, b = new.link_bytes_per_s, old.link_bytes_per_s
    return abs(a - b) > _WORTH_SENDING * max(a, b)


def _concerns_others(report: ReplicaReport) -> tuple[object, ...]:
    return report.allowed, report.link, report.heard_life


def _equal_share(bus: BusState) -> int:
    """What a replica without a lease may use at most, whatever the others do: one device's part of the bus."""
    return bus.bytes_per_s // max(1, bus.num_devices)


def _larger(a: Allowance, b: Allowance) -> Allowance:
    return Allowance(
        link_bytes_per_s=max(a.link_bytes_per_s, b.link_bytes_per_s),
        fallback_bytes_per_s=max(a.fallback_bytes_per_s, b.fallback_bytes_per_s),
    )


def _lapsed(allowed: Allowance) -> Allowance:
    return Allowance(
        link_bytes_per_s=allowed.fallback_bytes_per_s,
        fallback_bytes_per_s=allowed.fallback_bytes_per_s,
    )
