"""The protocol as a state machine: messages are lost, repeated, late and out of order; everybody may restart.

Time is the machine's own. Each process has a monotonic clock of its own with any offset and a speed that differs by up
to `CLOCK_DRIFT`. Messages are kept for as long as hypothesis likes, across restarts.

Safety, after every step: what the replicas of a bus may do, a crashed one's successor included, never exceeds the bus,
nor what they use the node's host memory; and what a replica has promised to its requests stays possible for it.
Liveness, at the end: when messages flow again, ranges are those of the allocation.

Claims on host memory are calls between processes of one node: they come in order, but their answers may be lost, and
the agent may be restarted at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.bus.allocation import allocate_bus, unit_cost_bytes_per_s
from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig
from cluster.node.host_claims import CLAIM_LEASE_S, HostClaims
from cluster.protocol.messages import BusState, LinkDemand, NodeState, RangeUpdate, ReplicaReport
from cluster.protocol.node_reports import HostClaim
from cluster.replica.lease import RangeHolder

NUM_DEVICES, BUS, HOST = 3, 1000, 500
CLOCK_DRIFT = 0.05
CONFIG = CoordinatorConfig(lease_s=10.0, clock_drift=CLOCK_DRIFT, forget_after_s=1e9)
UNIT = 20
MAX_IN_FLIGHT = 60
CLOCKS = st.tuples(st.floats(-1e4, 1e4), st.floats(1.0, 1.0 + CLOCK_DRIFT))
SLOTS = st.integers(0, NUM_DEVICES - 1)
DEMANDS = st.builds(
    lambda k_min, more, step_s: LinkDemand(k_min=k_min, k_max=k_min + more, unit_bytes=UNIT, step_s=step_s),
    st.integers(0, 3),
    st.integers(0, 40),
    st.sampled_from([1.0, 0.5, 2.0]),
)


@dataclass
class Replica:
    """A replica that uses all it may, as far as it has a use for it.

    `promised`: units with which its requests' memory is there to their end. `host`: what it knows to be granted.
    """

    holder: RangeHolder
    clock: tuple[float, float]
    link: LinkDemand
    promised: int = 0
    host: HostClaim | None = None

    @property
    def demand(self) -> LinkDemand:
        k_min = max(self.link.k_min, self.promised)
        return replace(self.link, k_min=k_min, k_max=max(k_min, self.link.k_max))


@dataclass
class Agent:
    """A node's agent. It sees its node's processes, whatever the network does."""

    sequence: int
    claims: HostClaims
    heard_life: int = 0


@dataclass(frozen=True)
class NodeAnswer:
    """The coordinator's answer to a node's report: the agent awaits it, and takes no other's."""

    sequence: int
    life: int


Message = ReplicaReport | RangeUpdate | NodeState | NodeAnswer


@dataclass
class World:
    replicas: dict[int, Replica] = field(default_factory=dict)
    in_flight: list[Message] = field(default_factory=list)


class ProtocolMachine(RuleBasedStateMachine):
    @initialize(clock=CLOCKS, tells_replicas=st.booleans(), replicas=st.lists(st.tuples(CLOCKS, DEMANDS), max_size=3))
    def begin(self, clock, tells_replicas, replicas):
        """Often with replicas that share the bus already: most of what can go wrong begins there."""
        self.true_s, self.num_started, self.num_lives, self.has_gone_back = 0.0, 0, 0, False
        self.tells_replicas = tells_replicas
        self.world = World()
        self.agent = Agent(sequence=0, claims=self.new_claims(-CLAIM_LEASE_S))
        self.restart_coordinator(clock, False)
        for slot, (replica_clock, link) in enumerate(replicas):
            self.start_replica(slot, replica_clock, link)
        self.all_is_well(14 if replicas else 0, frozenset(range(NUM_DEVICES)), True)

    # -- what happens -------------------------------------------------------------------------------------------

    @rule(clock=CLOCKS, goes_back=st.booleans())
    def restart_coordinator(self, clock, goes_back):
        """Lives are numbered by a wall clock, which may go back once."""
        self.num_lives += 1
        life = 1000 * self.num_lives
        if goes_back and not self.has_gone_back and self.num_lives > 3:
            self.has_gone_back, life = True, 1500
        self.clock = clock
        self.coordinator = Coordinator(CONFIG, life=life, now_s=self.at(clock))

    @rule(slot=SLOTS, clock=CLOCKS, link=DEMANDS)
    def start_replica(self, slot, clock, link):
        """On a device without one, or in the place of one that died."""
        self.num_started += 1
        holder = RangeHolder(replica_id=f"r{self.num_started}", node_id="n", bus_id="b")
        self.world.replicas[slot] = Replica(holder, clock, link)

    @rule(slot=SLOTS)
    def stop_replica(self, slot):
        replica = self.world.replicas.pop(slot, None)
        if replica is not None:
            self.send(replica.holder.report(replica.link, self.at(replica.clock), is_leaving=True))
            self.agent.claims.release(replica.holder.replica_id)

    @rule(slot=SLOTS, link=DEMANDS)
    def change_demand(self, slot, link):
        """Another objective is another promise: what was promised by the old one is over."""
        if slot in self.world.replicas:
            self.world.replicas[slot].link, self.world.replicas[slot].promised = link, 0

    @rule(slot=SLOTS, share=st.floats(0, 1))
    def promise(self, slot, share):
        """Requests are let in, or end: what they need is streamed within what is guaranteed."""
        if slot in self.world.replicas:
            replica = self.world.replicas[slot]
            guaranteed = replica.holder.allowed(self.at(replica.clock)).fallback_bytes_per_s
            replica.promised = int(share * guaranteed) // unit_cost_bytes_per_s(replica.link)

    @rule(slot=SLOTS, num_bytes=st.integers(0, HOST), answer_is_lost=st.booleans())
    def claim_host(self, slot, num_bytes, answer_is_lost):
        """The memory is used from when the answer is there; less is used before it is given back."""
        if slot not in self.world.replicas:
            return
        replica = self.world.replicas[slot]
        if replica.host is not None and num_bytes < replica.host.own_bytes:
            replica.host = replace(replica.host, own_bytes=num_bytes)
        claim = HostClaim(
            replica_id=replica.holder.replica_id, bus_id="b", pid=0, process_start_ticks=0, own_bytes=num_bytes
        )
        answer = self.agent.claims.claim(claim, self.true_s)
        if answer.refusal is None and not answer_is_lost:
            replica.host = claim

    @rule(slot=SLOTS)
    def report(self, slot):
        if slot in self.world.replicas:
            self.send(self.report_of(self.world.replicas[slot]))

    @rule()
    def restart_agent(self):
        self.agent = Agent(sequence=self.agent.sequence + 1000, claims=self.new_claims(self.true_s))

    @rule()
    def report_node(self):
        self.send(self.node_report())

    @rule(data=st.data(), stays=st.booleans())
    def deliver(self, data, stays):
        """Any message, in any order; one that stays comes again."""
        if self.world.in_flight:
            index = data.draw(st.integers(0, len(self.world.in_flight) - 1))
            message = self.world.in_flight[index] if stays else self.world.in_flight.pop(index)
            self.send(self.receive(message))

    @rule(order=st.sampled_from([1, -1]), kinds=st.sampled_from([Message, RangeUpdate, ReplicaReport, NodeState]))
    def repeat_everything(self, order, kinds):
        """All that was ever sent and not forgotten arrives again, first or last first; the answers stay in flight."""
        for message in self.world.in_flight[::order]:
            if isinstance(message, kinds):
                self.send(self.receive(message))
                self.bus_and_host_memory_are_never_overcommitted()

    @rule(slot=SLOTS, link=DEMANDS, answer_is_late=st.booleans())
    def exchange_with_other_demand(self, slot, link, answer_is_late):
        self.change_demand(slot, link)
        self.exchange(slot, answer_is_late)

    @rule(slot=SLOTS, answer_is_late=st.booleans(), share=st.none() | st.just(1.0))
    def exchange(self, slot, answer_is_late, share=None):
        """A report that arrives, what may be promised meanwhile, and the answer, unless that takes its time."""
        if slot in self.world.replicas:
            answer = self.receive(self.report_of(self.world.replicas[slot]))
            if share is not None:
                self.promise(slot, share)
            if answer_is_late:
                self.send(answer)
            else:
                self.receive(answer)

    @rule(seconds=st.integers(1, 14), slots=st.frozensets(SLOTS), with_agent=st.booleans())
    def all_is_well(self, seconds, slots, with_agent):
        """For some, for a while; the others are cut off. What was in flight stays there."""
        for _ in range(seconds):
            self.time_passes(1.0)
            if with_agent:
                report = self.node_report()
                self.receive(self.receive(report))
                self.send(report)  # another copy, for later
            for slot in sorted(slots & set(self.world.replicas)):
                self.receive(self.receive(self.report_of(self.world.replicas[slot])))
                self.bus_and_host_memory_are_never_overcommitted()
            self.coordinator.sweep(self.at(self.clock))

    @rule(seconds=st.one_of(st.floats(0, 1), st.floats(0, 12)))
    def time_passes(self, seconds):
        """Replicas renew their claims every second, and the agent looks who lives."""
        while seconds > 0:
            self.true_s, seconds = self.true_s + min(1.0, seconds), seconds - 1.0
            for replica in self.world.replicas.values():
                if replica.host is not None:
                    self.agent.claims.claim(replace(replica.host, is_renewal=True), self.true_s)
            self.agent.claims.sweep(self.true_s)

    @rule()
    def lose_everything(self):
        self.world.in_flight.clear()

    @rule()
    def sweep(self):
        self.coordinator.sweep(self.at(self.clock))

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def bus_and_host_memory_are_never_overcommitted(self):
        if not hasattr(self, "world"):
            return
        allowed = [each.holder.allowed(self.at(each.clock)) for each in self.world.replicas.values()]
        assert sum(each.link_bytes_per_s for each in allowed) <= BUS
        self.agent.claims.check_integrity()
        used = [each.host.own_bytes for each in self.world.replicas.values() if each.host is not None]
        assert sum(used) <= HOST

    @invariant()
    def what_was_promised_stays_possible(self):
        """Unless the bus has less than all minima together, which the coordinator says."""
        for replica in self.world.replicas.values() if hasattr(self, "world") else ():
            allowed, needed = replica.holder.allowed(self.at(replica.clock)), replica.promised
            needed *= unit_cost_bytes_per_s(replica.link)
            is_possible = needed <= min(allowed.link_bytes_per_s, allowed.fallback_bytes_per_s)
            assert is_possible or replica.holder.problem is not None

    def teardown(self):
        """Messages flow again: everybody has what the allocation of all demands gives, and a lease."""
        if not hasattr(self, "world"):
            return
        self.all_is_well(40, frozenset(range(NUM_DEVICES)), True)
        live = {each.holder.replica_id: each for each in self.world.replicas.values()}
        assert all(each.holder.has_lease(self.at(each.clock)) for each in live.values())
        if not live or not self.tells_replicas:
            return  # the share of those who may be there is kept for them
        minimum = sum(r.demand.k_min * unit_cost_bytes_per_s(r.link) for r in live.values())
        if minimum > BUS:
            assert all(each.holder.problem for each in live.values())
            return
        best = allocate_bus({name: each.demand for name, each in live.items()}, BUS)
        ranges = {name: each.holder.k_range(each.demand, self.at(each.clock)) for name, each in live.items()}
        total = sum(k_max for _, k_max in ranges.values()) * UNIT
        assert total >= 0.99 * best.host_bytes
        known = {each.replica_id for each in self.agent.claims.report(self.true_s).replicas}
        assert {name for name, each in live.items() if each.host is not None} <= known <= set(live)

    # -- mechanics ----------------------------------------------------------------------------------------------

    def at(self, clock: tuple[float, float]) -> float:
        offset_s, speed = clock
        return offset_s + self.true_s * speed

    def report_of(self, replica: Replica) -> ReplicaReport:
        return replica.holder.report(replica.demand, self.at(replica.clock))

    def new_claims(self, now_s: float) -> HostClaims:
        return HostClaims(HOST, is_alive=self.is_alive, now_s=now_s)

    def is_alive(self, claim: HostClaim) -> bool:
        return any(each.holder.replica_id == claim.replica_id for each in self.world.replicas.values())

    def node_report(self) -> NodeState:
        self.agent.sequence += 1
        replica_ids = tuple(each.holder.replica_id for each in self.world.replicas.values())
        bus = BusState(
            bus_id="b",
            bytes_per_s=BUS,
            num_devices=NUM_DEVICES,
            replica_ids=replica_ids if self.tells_replicas else None,
        )
        return NodeState(
            node_id="n",
            sequence=self.agent.sequence,
            heard_life=self.agent.heard_life,
            buses=(bus,),
        )

    def send(self, message: Message | None) -> None:
        if message is not None:
            self.world.in_flight.append(message)
            del self.world.in_flight[:-MAX_IN_FLIGHT]

    def receive(self, message: Message | None) -> Message | None:
        """Gives a message to whom it is for, and returns the answer."""
        now_s = self.at(self.clock)
        if isinstance(message, ReplicaReport):
            is_old = self.coordinator.on_replica_report(message, now_s) == "old"
            return None if is_old else self.coordinator.update_for(message, now_s)
        if isinstance(message, NodeState):
            self.coordinator.on_node_report(message, now_s)
            return NodeAnswer(sequence=message.sequence, life=self.coordinator.life)
        if isinstance(message, RangeUpdate):
            for replica in self.world.replicas.values():
                replica.holder.apply(message, self.at(replica.clock), replica.demand)
        elif message is not None and message.sequence == self.agent.sequence:
            self.agent.heard_life = message.life
        return None


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
