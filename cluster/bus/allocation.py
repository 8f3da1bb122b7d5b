"""How one bus is divided between its replicas: minimum first, then the most host memory, ties by max-min fairness.

Replica g streams k_g units of w_g bytes in every step and may take T_g seconds for one, so it needs k_g w_g / T_g of
the bus. Among the whole numbers k_min <= k_g <= k_max with sum_g k_g w_g / T_g <= B_bus, the allocation has

1. the most host memory in use, sum_g k_g w_g: a bounded knapsack whose kinds are the distinct (w, T)
   (cluster/bus/knapsack.py);
2. among those, and those within `tie_bytes` of them, the fairest in bytes k_g w_g: the replica that has least is raised
   by a unit for as long as one of them has that too. The smallest share is then as large as any of them allows;
3. among those the one closest to the previous allocation: whoever had a unit is asked first.

With a previous allocation, one that comes of it with few changes is kept while it is nearly as good (`KEEP_WITHIN`).
docs/cluster.md says why this is right. Pure functions, without Ray.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.bus.knapsack import Knapsack, Nodes, by_efficiency
from cluster.protocol.messages import LinkDemand
from selectn_core.errors import SelectNError

# A rearrangement costs copies on every replica that it touches, so it has to be worth this much host memory.
KEEP_WITHIN = 0.01
# Partial packings looked at, about a microsecond each: for the most host memory, and in all for fairness. Should the
# first need more, `bound_bytes` says what was left unproven.
_MAX_NODES, _MAX_NODES_FAIRNESS, _MAX_NODES_ONCE = 1000, 300, 100
# So many units are raised one by one as fast as their level is found; after so many in a row a level may be near again.
_FEW_UNITS, _MANY_UNITS = 60, 64


@dataclass(frozen=True, kw_only=True)
class BusAllocation:
    """Units offloaded per replica, the bytes of host memory that is, and the most that any allocation can use.

    `bound_bytes` is larger than `host_bytes` by what fairness (`tie_bytes`) or the previous allocation was worth,
    and where the search was cut short by what it has left open (benchmarks/bench_bus.py: 0.08 % at most).
    """

    num_offloaded: dict[str, int]
    host_bytes: int
    bound_bytes: int

    @property
    def is_optimal(self) -> bool:
        """Whether this is known to be the most host memory."""
        return self.host_bytes == self.bound_bytes


class BusOvercommitted(SelectNError):
    """What the replicas of a bus need at least is more than it has.

    Attributes:
        needed_bytes_per_s, bus_bytes_per_s: the sum of what they need at least, and what there is.
        over_bytes_per_s: for each replica that needs more than its max-min fair part, by how much; adds up to what
            is missing.
    """

    def __init__(self, needed: Mapping[str, int], bus_bytes_per_s: int) -> None:
        fair = max_min_shares(bus_bytes_per_s, needed)
        self.needed_bytes_per_s, self.bus_bytes_per_s = sum(needed.values()), bus_bytes_per_s
        self.over_bytes_per_s = {name: needed[name] - fair[name] for name in needed if needed[name] > fair[name]}
        over = ", ".join(f"{name} by {excess / 1e9:.4g} GB/s" for name, excess in self.over_bytes_per_s.items())
        super().__init__(
            f"the replicas of a bus need at least {self.needed_bytes_per_s / 1e9:.4g} GB/s and it has "
            f"{bus_bytes_per_s / 1e9:.4g}; over their fair part: {over}. Give them more device memory or a looser "
            "tpot objective, or have fewer replicas on this bus"
        )


def unit_cost_bytes_per_s(demand: LinkDemand) -> int:
    """Bandwidth that one more unit takes, w / T, rounded up: whole numbers add up exactly, whatever their order."""
    return math.ceil(demand.unit_bytes / demand.step_s)


def allocate_bus(
    demands: Mapping[str, LinkDemand],
    bus_bytes_per_s: int,
    previous: Mapping[str, int] | None = None,
    *,
    tie_bytes: int = 0,
) -> BusAllocation:
    """Divides `bus_bytes_per_s` between the replicas of `demands`; see the module for what is optimal.

    `previous` is the last allocation's `num_offloaded`; it may name replicas that are gone and lack new ones.
    Models of different sizes hardly ever tie to the byte: with `tie_bytes` 0 the last few bytes decide who gets
    gigabytes. With a byte less than a unit, whole units are still what counts first.

    Raises BusOvercommitted if the minimum of everyone does not fit.
    """
    if not demands:
        return BusAllocation(num_offloaded={}, host_bytes=0, bound_bytes=0)
    bus = _Bus(demands, previous or {})
    lowest = bus.lowest
    if bus.cost(lowest) > bus_bytes_per_s:
        needed = {name: count * cost for name, count, cost in zip(bus.names, lowest, bus.costs, strict=True)}
        raise BusOvercommitted(needed, bus_bytes_per_s)
    if bus.cost(bus.highest) <= bus_bytes_per_s:
        return bus.allocation(bus.highest, bus.value(bus.highest))
    best, bound = bus.best_above(lowest, bus_bytes_per_s, tie_bytes)
    if previous:
        kept, _ = bus.best_above(bus.trimmed_previous(bus_bytes_per_s), bus_bytes_per_s, tie_bytes)
        if bus.is_nearly_as_good(kept, best):
            best = kept
    return bus.allocation(best, bound)


def max_min_shares(capacity: int, wanted: Mapping[str, int], floors: Mapping[str, int] | None = None) -> dict[str, int]:
    """Max-min fair whole shares of `capacity`: nobody more than wanted, nobody less than their floor.

    What whole numbers leave over goes to the first in the order of `wanted`. Where the floors alone exceed the
    capacity they are what everybody gets.
    """
    if sum(wanted.values()) <= capacity:
        return dict(wanted)
    shares = {name: min((floors or {}).get(name, 0), wants) for name, wants in wanted.items()}
    left = capacity - sum(shares.values())
    if left <= 0:
        return shares
    level = _water_level(left, [(shares[name], wanted[name]) for name in wanted])
    for name in wanted:
        shares[name] = max(shares[name], min(level, wanted[name]))
    left = capacity - sum(shares.values())
    for name in wanted:
        if left > 0 and shares[name] == level < wanted[name]:
            shares[name], left = shares[name] + 1, left - 1
    return shares


def _water_level(room: int, ranges: list[tuple[int, int]]) -> int:
    """The highest whole level to which everyone, up to the end of their range, can be raised with `room`."""
    low, high = 0, max(end for _, end in ranges)
    while low < high:
        level = (low + high + 1) // 2
        if sum(max(0, min(level, end) - start) for start, end in ranges) <= room:
            low = level
        else:
            high = level - 1
    return low


@dataclass
class _Raise:
    """Lower bounds on the way up.

    `room` is the bandwidth left above them, `missing` the bytes still to be placed (none if negative), `spare` the
    units by kind that a known allocation has above them, `limits` the most there may be.
    """

    counts: list[int]
    room: int
    missing: int
    spare: list[int]
    limits: list[int]
    blocked: set[int] = field(default_factory=set)
    nodes_left: int = _MAX_NODES_FAIRNESS


class _Bus:
    """One problem in parallel lists, replicas in the order of their names; kinds by falling w / cost."""

    def __init__(self, demands: Mapping[str, LinkDemand], previous: Mapping[str, int]) -> None:
        self.names = sorted(demands)
        ordered = [demands[name] for name in self.names]
        self.lowest = [demand.k_min for demand in ordered]
        self.highest = [demand.k_max for demand in ordered]
        self.sizes = [demand.unit_bytes for demand in ordered]
        self.costs = [unit_cost_bytes_per_s(demand) for demand in ordered]
        self.had = [previous.get(name, 0) for name in self.names]
        pairs = list(zip(self.sizes, self.costs, strict=True))
        self.kinds = by_efficiency(set(pairs))
        number = {kind: index for index, kind in enumerate(self.kinds)}
        self.kind_of = [number[pair] for pair in pairs]
        self.knapsack = Knapsack([size for size, _ in self.kinds], [cost for _, cost in self.kinds])

    def cost(self, counts: list[int]) -> int:
        return sum(map(int.__mul__, counts, self.costs))

    def value(self, counts: list[int]) -> int:
        return sum(map(int.__mul__, counts, self.sizes))

    def allocation(self, counts: list[int], bound: int) -> BusAllocation:
        return BusAllocation(
            num_offloaded=dict(zip(self.names, counts, strict=True)), host_bytes=self.value(counts), bound_bytes=bound
        )

    def best_above(self, lowest: list[int], capacity: int, tie_bytes: int) -> tuple[list[int], int]:
        """The best allocation that gives everyone at least `lowest`, which fits, and the bound on its host bytes."""
        room = capacity - self.cost(lowest)
        limits = [0] * len(self.kinds)
        for kind, low, high in zip(self.kind_of, lowest, self.highest, strict=True):
            limits[kind] += high - low
        packing = self.knapsack.pack(limits, room, nodes=Nodes(left=_MAX_NODES))
        assert packing is not None, "taking nothing is a packing"
        bound = self.value(lowest) + packing.bound
        state = _Raise(
            counts=list(lowest),
            room=room,
            missing=packing.value - tie_bytes,
            spare=list(packing.counts),
            limits=limits,
        )
        self._raise_fairly(state)
        return state.counts, bound

    def _raise_fairly(self, state: _Raise) -> None:
        """Raises whoever has least, as long as an allocation with all that and all the missing bytes exists."""
        waiting = self._raised_together(state, range(len(self.names)))
        num_in_a_row = 0
        while waiting:
            *_, replica = waiting[0]
            if not self._raise_by_one(state, replica):
                heapq.heappop(waiting)
                num_in_a_row = 0
                continue
            heapq.heapreplace(waiting, self._turn(state, replica))
            num_in_a_row += 1
            if num_in_a_row == _MANY_UNITS:
                waiting, num_in_a_row = self._raised_together(state, [replica for *_, replica in waiting]), 0

    def _raised_together(self, state: _Raise, replicas: Iterable[int]) -> list[tuple[int, bool, str, int]]:
        """Takes in one go what most of them would take one by one; whose turn it is then, as a heap."""
        self._block_hopeless(state)
        self._raise_to_level(state)
        waiting = [self._turn(state, replica) for replica in replicas]
        heapq.heapify(waiting)
        return waiting

    def _block_hopeless(self, state: _Raise) -> None:
        """Closes at once every kind of which the bound alone shows that no allocation has one more.

        Where all replicas differ that is most of them, and finding it out for one after the other takes longest.
        """
        for kind, may_be in enumerate(self.knapsack.may_have(state.limits, state.room, at_least=state.missing)):
            if not may_be:
                state.blocked.add(kind)
                state.limits[kind] = 0

    def _turn(self, state: _Raise, replica: int) -> tuple[int, bool, str, int]:
        """Least bytes first, then who had a unit more before, then by name."""
        count = state.counts[replica]
        return count * self.sizes[replica], count >= self.had[replica], self.names[replica], replica

    def _raise_by_one(self, state: _Raise, replica: int) -> bool:
        kind = self.kind_of[replica]
        if state.counts[replica] == self.highest[replica] or kind in state.blocked:
            return False
        state.limits[kind] -= 1
        room, missing = state.room - self.costs[replica], state.missing - self.sizes[replica]
        if state.spare[kind]:
            state.spare[kind] -= 1
        else:
            spare = self._rest(state, state.limits, room, missing)
            if spare is None:
                state.blocked.add(kind)
                state.limits[kind] = 0
                return False
            state.spare = spare
        state.counts[replica] += 1
        state.room, state.missing = room, missing
        return True

    def _rest(self, state: _Raise, limits: list[int], room: int, missing: int) -> list[int] | None:
        """Units by kind that are worth what is missing and fit; None if none were found."""
        if room < 0:
            return None
        if missing <= 0:
            return [0] * len(limits)
        nodes = Nodes(left=min(_MAX_NODES_ONCE, state.nodes_left))
        state.nodes_left -= nodes.left
        packing = self.knapsack.pack(limits, room, at_least=missing, nodes=nodes)
        state.nodes_left += max(0, nodes.left)
        return packing.counts if packing else None

    def _raise_to_level(self, state: _Raise) -> None:
        """Raises everyone who is not blocked to the highest level that can be had, to within a unit.

        The same as raising them one by one: whoever has least comes first there, so every level is passed.
        """
        free = [
            r for r, kind in enumerate(self.kind_of) if kind not in state.blocked and state.counts[r] < self.highest[r]
        ]
        fair_bytes = state.missing // max(1, len(free))
        if sum(fair_bytes // self.sizes[r] for r in free) <= _FEW_UNITS:
            return
        low, step = min(state.counts[r] * self.sizes[r] for r in free), min(self.sizes[r] for r in free)
        high = max(self.highest[r] * self.sizes[r] for r in free) + 1
        stride = step
        while high - low > step:
            level = low + min(stride, (high - low) // 2)
            raised = self._raised_to(state, free, level)
            if raised is None:
                high = level
            else:
                low, stride = level, 4 * stride
                state.counts, state.spare, state.limits = raised.counts, raised.spare, raised.limits
                state.room, state.missing = raised.room, raised.missing

    def _raised_to(self, state: _Raise, free: list[int], level: int) -> _Raise | None:
        """The state with everyone in `free` at `level` bytes or more, where they can; None if nothing has that."""
        counts, limits = list(state.counts), list(state.limits)
        room, missing = state.room, state.missing
        for replica in free:
            size = self.sizes[replica]
            more = min(self.highest[replica], -(-level // size)) - counts[replica]
            if more > 0:
                counts[replica] += more
                limits[self.kind_of[replica]] -= more
                room -= more * self.costs[replica]
                missing -= more * size
        spare = self._rest(state, limits, room, missing)
        if spare is None:
            return None
        return _Raise(counts=counts, room=room, missing=missing, spare=spare, limits=limits)

    def trimmed_previous(self, capacity: int) -> list[int]:
        """The previous counts within today's limits, less what no longer fits: least efficient, then largest first."""
        counts = [max(low, min(had, high)) for low, had, high in zip(self.lowest, self.had, self.highest, strict=True)]
        over = self.cost(counts) - capacity
        while over > 0:
            replica = max(
                (r for r, low in enumerate(self.lowest) if counts[r] > low),
                key=lambda r: (self.kind_of[r], counts[r] * self.sizes[r]),
            )
            counts[replica] -= 1
            over -= self.costs[replica]
        return counts

    def is_nearly_as_good(self, kept: list[int], best: list[int]) -> bool:
        """Whether `kept` has nearly the host memory of `best`, and nobody's share is smaller by more than a unit."""
        if self.value(kept) < (1 - KEEP_WITHIN) * self.value(best):
            return False
        unit = max(self.sizes)
        shares, fair = (sorted(map(int.__mul__, counts, self.sizes)) for counts in (kept, best))
        return all(share >= share_fair - unit for share, share_fair in zip(shares, fair, strict=True))
