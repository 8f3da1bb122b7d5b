"""A replica's membership: a real engine, a node's claims and a coordinator in this process, and calls that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig, ReplicaStatus
from cluster.node.host_claims import HostClaims
from cluster.protocol.messages import BusState, NodeState, RangeUpdate, ReplicaReport
from cluster.protocol.node_reports import HostAnswer, HostClaim
from cluster.replica.member import Member
from selectn_core.config import SloConfig
from selectn_core.engine.engine import Engine
from selectn_core.errors import HostMemoryExceeded
from selectn_core.profiling.record_cache import performance_record
from tests.support.engines import engine_config, greedy
from tests.support.tiny_models import tiny_model
from tests.support.waiting import wait_until

TIMEOUT_S, LEASE_S = 30.0, 2.0
CAPACITY, BUS_BYTES_PER_S = 1 << 30, 10**9


class Node:
    """An agent's claims and a coordinator, without processes between. `fault` happens before every call."""

    def __init__(self) -> None:
        now_s = time.monotonic()
        self.claims = self.new_claims(now_s - 10)
        self.core = Coordinator(CoordinatorConfig(lease_s=LEASE_S), life=1, now_s=now_s - 2 * LEASE_S)
        bus = BusState(bus_id="b", bytes_per_s=BUS_BYTES_PER_S, num_devices=2, replica_ids=("a",))
        state = NodeState(
            node_id="n",
            sequence=1,
            heard_life=1,
            buses=(bus,),
        )
        self.core.on_node_report(state, now_s)
        self.fault: Callable[[], object] = lambda: None
        self.lock = threading.Lock()

    def new_claims(self, now_s: float) -> HostClaims:
        return HostClaims(CAPACITY, is_alive=lambda claim: True, now_s=now_s, lease_s=0.5)

    def claim_host(self, claim: HostClaim) -> HostAnswer:
        self.fault()
        with self.lock:
            return self.claims.claim(claim, time.monotonic())

    def release_host(self, replica_id: str) -> None:
        self.fault()
        with self.lock:
            self.claims.release(replica_id)

    def latest(self) -> None:
        self.fault()

    def exchange(self, report: ReplicaReport, hold_s: float) -> RangeUpdate | None:
        self.fault()
        with self.lock:
            now_s = time.monotonic()
            if self.core.on_replica_report(report, now_s) == "old" or report.is_leaving:
                return None
            return self.core.update_for(report, now_s)

    def placed(self) -> list[tuple[str, str | None]]:
        with self.lock:
            self.claims.check_integrity()
            return [(each.replica_id, each.bus_id) for each in self.claims.report(time.monotonic()).replicas]

    def reserved(self) -> int:
        with self.lock:
            return self.claims.report(time.monotonic()).reserved_bytes


def member_of(node: Node, name: str = "a") -> Member:
    return Member(replica_id=name, node_id="n", agent=node, exchange=node.exchange, hold_s=0.2, agent_timeout_s=1.0)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def member(node) -> Iterator[Member]:
    member = member_of(node)
    yield member
    node.fault = lambda: None
    member.leave()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny_model("llama"), engine_config(num_offloaded=3, kv_gib=0.25)) as engine:
        engine.set_objectives(SloConfig(ttft_ms=1000, tpot_ms=100))
        yield engine


def replicas_of(node: Node) -> tuple[ReplicaStatus, ...]:
    """Those that the coordinator knows."""
    return node.core.status(time.monotonic()).replicas


def fail() -> None:
    raise ConnectionError("no route")


def test_memory_is_reserved_before_it_is_used_and_what_is_not_needed_is_given_back(node, member, engine):
    member.reserve_kv(engine.config.host.kv_gib)
    assert node.reserved() == CAPACITY // 4
    member.reserve(1000, "weights")
    assert node.reserved() == CAPACITY // 4 + 1000
    member.join(engine, None)
    swap_bytes = engine.batching.swap.capacity_bytes
    assert swap_bytes < CAPACITY // 4, "this test needs an engine that cannot use all that it may"
    wait_until(lambda: node.reserved() == swap_bytes + 1000, TIMEOUT_S, "the rest is given back")
    wait_until(lambda: member.snapshot()["host_held_bytes"] == swap_bytes + 1000, TIMEOUT_S, "the member knows")
    member.leave()
    assert (node.placed(), node.reserved()) == ([], 0)


def test_what_the_node_does_not_have_is_refused_with_what_limits(node, member):
    other = member_of(node, "b")
    other.reserve_kv(0.75)
    with pytest.raises(HostMemoryExceeded, match=r"node n refuses .* lower host\.kv_gib.* for replica b"):
        member.reserve_kv(0.5)
    member.reserve_kv(0.25)
    other.leave()


def test_without_an_agent_it_starts_all_the_same_and_claims_later(node, member, engine):
    node.fault = fail
    member.reserve_kv(engine.config.host.kv_gib)
    member.join(engine, "b")
    assert "no route" in member.snapshot()["host_problem"]
    assert member.snapshot()["range"] is None
    node.fault = lambda: None
    wait_until(lambda: node.placed() == [("a", "b")], TIMEOUT_S, "the agent knows where it is")
    wait_until(lambda: node.reserved() == engine.batching.swap.capacity_bytes, TIMEOUT_S, "a claim")


def test_a_new_agent_learns_what_is_in_use(node, member, engine):
    member.reserve_kv(engine.config.host.kv_gib)
    member.join(engine, "b")
    wait_until(lambda: node.placed() == [("a", "b")], TIMEOUT_S, "the agent knows where it is")
    with node.lock:
        node.claims = node.new_claims(time.monotonic())
    wait_until(lambda: node.placed() == [("a", "b")], TIMEOUT_S, "the agent knows where it is")
    assert node.reserved() == engine.batching.swap.capacity_bytes


def test_ranges_reach_the_engine_and_lapse_to_the_fallback(node, member, engine):
    member.join(engine, "b")
    wait_until(lambda: member.snapshot()["link_bytes_per_s"] == BUS_BYTES_PER_S, TIMEOUT_S, "a range")
    snapshot = member.snapshot()
    assert snapshot["range"] == [3, 3], "a plan by hand is what it wants"
    assert snapshot["epoch"]["life"] == 1
    assert 0 < snapshot["lease_left_s"] <= LEASE_S
    assert engine.offloading.link_share.bytes_per_s == BUS_BYTES_PER_S
    assert engine.offloading.link_share.guaranteed_bytes_per_s == BUS_BYTES_PER_S // 2
    assert engine.offloading.link_share.max_offloaded_bytes == 3 * max(unit.num_bytes for unit in engine.units)
    node.fault = fail
    wait_until(lambda: member.snapshot()["lease_left_s"] is None, TIMEOUT_S, "the lease runs out")
    wait_until(lambda: engine.offloading.link_share.bytes_per_s == BUS_BYTES_PER_S // 2, TIMEOUT_S, "an equal share")


def test_before_it_has_a_share_it_offloads_what_it_must(node, member, engine):
    node.fault = fail
    member.join(engine, "b")
    assert engine.target.fewest(2).num_offloaded == 0
    assert engine.offloading.link_share.max_offloaded_bytes == 0


def test_other_objectives_are_another_demand(node, member, engine):
    member.join(engine, "b")
    wait_until(lambda: len(replicas_of(node)) == 1, TIMEOUT_S, "the coordinator knows the replica")
    engine.set_objectives(SloConfig(ttft_ms=1000, tpot_ms=50))
    try:
        wait_until(lambda: replicas_of(node)[0].link.step_s == 0.05, TIMEOUT_S, "another demand")
    finally:
        engine.set_objectives(SloConfig(ttft_ms=1000, tpot_ms=100))


def test_what_requests_were_promised_is_what_it_needs_of_its_bus(node, member, tmp_path, monkeypatch):
    """Its k_min, so that nobody else is given it: while requests need it, and a little longer."""
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    config = replace(engine_config("auto", kv_tokens=64, max_requests=16), slo=SloConfig(ttft_ms=1e5, tpot_ms=1e5))
    engine = Engine(tiny_model("llama"), config)
    engine.steer(performance_record(engine, budget_s=1.0))

    def k_min() -> int | None:
        replicas = replicas_of(node)
        return replicas[0].link.k_min if replicas else None

    try:
        member.join(engine, "b")
        wait_until(lambda: k_min() == 0, TIMEOUT_S, "it needs nothing")
        handles = [engine.submit([5], greedy(60)) for _ in range(12)]  # nothing generates: they wait
        needed = engine.guaranteed_units
        assert needed > 0
        wait_until(lambda: k_min() == needed, TIMEOUT_S, "it needs what was promised")
        assert member.snapshot()["range"][0] == needed
        for handle in handles:
            handle.cancel()
        assert engine.guaranteed_units == 0
        wait_until(lambda: k_min() == 0, TIMEOUT_S, "it needs nothing")
    finally:
        member.stop()
        engine.close()


def test_it_says_goodbye_to_both(node, member, engine):
    member.join(engine, "b")
    wait_until(lambda: len(replicas_of(node)) == 1, TIMEOUT_S, "the coordinator knows the replica")
    member.leave()
    member.leave()
    assert node.core.status(time.monotonic()).replicas == ()
    assert node.placed() == []
