"""A node's claims: a store counts once, nothing is granted twice, and nothing outlives its process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.node.host_claims import HostClaims
from cluster.protocol.node_reports import HostClaim, Placement

CAPACITY, LEASE_S = 100, 3.0
STORE_BYTES = {"small": 20, "large": 70}


def claim(name: str, own_bytes: int = 0, store: str | None = None, *, pid: int = 1) -> HostClaim:
    return HostClaim(
        replica_id=name,
        bus_id="b",
        pid=pid,
        process_start_ticks=0,
        own_bytes=own_bytes,
        store_name=store,
        store_bytes=STORE_BYTES[store] if store is not None else 0,
    )


class Node:
    """Claims of a ledger that has been open for long, and which processes there are."""

    def __init__(self, *, opened_s: float = -LEASE_S) -> None:
        self.living = {1, 2, 3}
        self.claims = HostClaims(
            CAPACITY, is_alive=lambda claim: claim.pid in self.living, now_s=opened_s, lease_s=LEASE_S
        )

    def reserved(self, now_s: float = 0) -> int:
        self.claims.check_integrity()
        return self.claims.report(now_s).reserved_bytes


@pytest.mark.parametrize("num_bytes", [-1, float("inf"), float("nan"), 0.5, None, True])
def test_a_claim_that_makes_no_sense_is_refused_and_changes_nothing(num_bytes):
    node = Node()
    node.claims.claim(claim("a", 10), 0)
    answer = node.claims.claim(claim("a", num_bytes), 0)
    assert (answer.held_bytes, answer.ask_again) == (10, False)
    assert answer.refusal is not None
    assert f"own_bytes={num_bytes!r}" in answer.refusal
    assert node.reserved() == 10


def test_a_store_counts_once_and_is_the_first_ones():
    node = Node()
    assert node.claims.claim(claim("a", 10, "large"), 0).held_bytes == 80
    assert node.claims.claim(claim("b", 10, "large", pid=2), 0).held_bytes == 10
    assert node.reserved() == 90
    node.claims.release("a")
    assert node.reserved() == 80
    assert node.claims.held_bytes("b") == 80
    node.claims.release("b")
    assert node.reserved() == 0


def test_a_store_is_as_large_as_whoever_knows_most_of_it_says():
    """Who builds it claims what the weights take, before there is a manifest; who comes later sees the whole file."""
    node = Node()
    builder, later = claim("a", 10, "small"), replace(claim("b", 10, "small", pid=2), store_bytes=25)
    node.claims.claim(builder, 0)
    node.claims.claim(later, 0)
    assert node.reserved() == 45
    node.claims.claim(replace(builder, is_renewal=True), 1)
    assert (node.reserved(), node.claims.held_bytes("a"), node.claims.held_bytes("b")) == (45, 35, 10)
    node.claims.release("b")
    assert node.reserved() == 30


def test_after_a_restart_too_in_whatever_order_they_renew():
    for first, second in ((20, 25), (25, 20)):
        node = Node()
        for name, pid, num_bytes in (("a", 1, first), ("b", 2, second)):
            renewed = replace(claim(name, 10, "small", pid=pid), store_bytes=num_bytes, is_renewal=True)
            assert node.claims.claim(renewed, 0).refusal is None
        assert node.reserved() == 45


def test_a_store_that_grew_for_a_claim_that_is_refused_shrinks_again():
    node = Node()
    node.claims.claim(claim("a", 10, "small"), 0)
    refused = replace(claim("b", 90, "small", pid=2), store_bytes=25)
    assert node.claims.claim(refused, 0).refusal
    assert node.reserved() == 30


def test_a_store_that_shrank_for_a_claim_that_is_refused_is_as_large_as_before():
    node = Node()
    node.claims.claim(claim("a", 0, "large"), 0)
    less_and_more = replace(claim("a", 32, "large"), store_bytes=69)
    assert node.claims.claim(less_and_more, 0).refusal
    assert node.reserved() == 70


def test_a_refusal_says_what_is_there_and_who_has_it_and_changes_nothing():
    node = Node()
    node.claims.claim(claim("a", 30, "small"), 0)
    answer = node.claims.claim(claim("b", 0, "large", pid=2), 0)
    assert answer.refusal is not None
    assert not answer.ask_again
    assert "50 of 100 are free" in answer.refusal
    assert answer.refusal.endswith("30 for replica a, 20 for store small")
    assert node.reserved() == 50
    kept = node.claims.claim(claim("a", 90, "small"), 0)
    assert (kept.held_bytes, node.reserved()) == (50, 50)


def test_a_store_without_room_for_what_comes_with_it_is_given_back():
    node = Node()
    assert node.claims.claim(claim("a", 40, "large"), 0).refusal
    assert node.reserved() == 0


def test_a_new_ledger_takes_what_is_in_use_before_it_gives_anything():
    node = Node(opened_s=0)
    newcomer = claim("new", 50, pid=2)
    assert node.claims.claim(newcomer, 1).ask_again
    assert not node.claims.report(1).is_complete
    in_use = replace(claim("old", 10, "large"), is_renewal=True)
    assert node.claims.claim(in_use, 1).held_bytes == 80
    answer = node.claims.claim(newcomer, LEASE_S)
    assert answer.refusal
    assert not answer.ask_again
    assert node.claims.report(LEASE_S).is_complete


def test_what_is_in_use_counts_however_late_it_is_claimed():
    node = Node()
    node.claims.claim(claim("a", 60), 0)
    assert node.claims.claim(replace(claim("late", 60, pid=2), is_renewal=True), 0).refusal is None
    assert node.reserved() == 120
    assert node.claims.claim(claim("c", 1, pid=3), 0).refusal


def test_a_dead_process_loses_all_at_once_and_a_silent_living_one_nothing():
    node = Node()
    node.claims.claim(claim("a", 30, "small"), 0)
    node.claims.claim(claim("b", 10, "small", pid=2), 0)
    assert node.claims.sweep(1000) == ()
    node.living.remove(1)
    assert node.claims.sweep(1000) == ("a",)
    assert node.reserved() == 30
    assert node.claims.report(0).replicas == (Placement(replica_id="b", bus_id="b"),)


def test_one_that_cannot_be_seen_lives_as_long_as_it_renews():
    node = Node()
    unseen = claim("a", 30, pid=99)
    node.claims.claim(unseen, 0)
    assert node.claims.sweep(LEASE_S - 1) == ()
    node.claims.claim(replace(unseen, is_renewal=True), LEASE_S - 1)
    assert node.claims.sweep(LEASE_S) == ()
    assert node.claims.sweep(2 * LEASE_S) == ("a",)


class ClaimsMachine(RuleBasedStateMachine):
    """Replicas that use no more than was granted; they renew in time; agents restart, processes die."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.granted: dict[str, HostClaim] = {}
        self.dead: set[str] = set()
        self.restart()

    @rule()
    def restart(self):
        is_alive = lambda claim: claim.replica_id not in self.dead  # noqa: E731 -- looks at the machine itself
        self.claims = HostClaims(CAPACITY, is_alive=is_alive, now_s=self.now_s, lease_s=LEASE_S)

    @rule(
        name=st.sampled_from("abc"),
        own=st.integers(0, 60),
        store=st.sampled_from([None, *STORE_BYTES]),
        unknown=st.integers(0, 2),
    )
    def claim(self, name, own, store, unknown):
        if name in self.dead:
            return
        wanted = claim(name, own, store)
        if store is not None:  # not everybody knows all of it
            wanted = replace(wanted, store_bytes=wanted.store_bytes - unknown)
        if self.claims.claim(wanted, self.now_s).refusal is None:
            self.granted[name] = wanted

    @rule(name=st.sampled_from("abc"))
    def leave(self, name):
        self.claims.release(name)
        self.granted.pop(name, None)

    @precondition(lambda self: self.granted)
    @rule(name=st.sampled_from("abc"))
    def die(self, name):
        if self.granted.pop(name, None):
            self.dead.add(name)

    @rule(seconds=st.floats(0.1, 2 * LEASE_S))
    def time_passes(self, seconds):
        while seconds > 0:
            step_s = min(seconds, LEASE_S / 3)
            self.now_s, seconds = self.now_s + step_s, seconds - step_s
            for granted in self.granted.values():
                answer = self.claims.claim(replace(granted, is_renewal=True), self.now_s)
                assert answer.refusal is None
            self.claims.sweep(self.now_s)

    @invariant()
    def nothing_is_used_twice(self):
        self.claims.check_integrity()
        stores = {each.store_name: 0 for each in self.granted.values() if each.store_name is not None}
        for each in self.granted.values():
            if each.store_name is not None:
                stores[each.store_name] = max(stores[each.store_name], each.store_bytes)
        assert sum(each.own_bytes for each in self.granted.values()) + sum(stores.values()) <= CAPACITY

    def teardown(self):
        """What the dead had is free again, and nothing else is."""
        self.time_passes(2 * LEASE_S)
        assert {each.replica_id for each in self.claims.report(self.now_s).replicas} == set(self.granted)


TestClaims = ClaimsMachine.TestCase
