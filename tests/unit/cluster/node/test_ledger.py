"""The host-memory ledger: nothing is promised twice, whatever owners and restarts do."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.node.ledger import Ledger, LedgerClosed
from selectn_core.errors import HostMemoryExceeded

LEASE_S = 10.0
CAPACITY = 100
OWNERS = st.sampled_from(["a", "b", "c"])


class LedgerMachine(RuleBasedStateMachine):
    """Owners that use no more than they were granted, and agents that restart with an empty ledger.

    An owner renews more often than the lease, dead ones excepted; nobody releases what a living owner uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.used: dict[str, int] = {}
        self.ledger = Ledger(CAPACITY, lease_s=LEASE_S, now_s=self.now_s)

    @rule(owner=OWNERS, num_bytes=st.integers(0, CAPACITY))
    def reserve(self, owner, num_bytes):
        before = self.ledger.entries()
        try:
            self.ledger.reserve(owner, num_bytes, now_s=self.now_s)
        except HostMemoryExceeded:
            assert num_bytes > self.used.get(owner, 0) or owner not in {e.owner for e in before}
            assert self.ledger.entries() == before
        else:
            self.used[owner] = num_bytes

    @rule(owner=OWNERS)
    def release(self, owner):
        self.used.pop(owner, None)
        assert self.ledger.held_bytes(owner) == self.ledger.release(owner)
        assert self.ledger.release(owner) == 0

    @rule(seconds=st.floats(0.1, 15))
    def time_passes(self, seconds):
        while seconds > 0:
            step_s = min(seconds, LEASE_S / 2)
            self.now_s, seconds = self.now_s + step_s, seconds - step_s
            for owner, num_bytes in self.used.items():
                self.ledger.renew(owner, num_bytes, now_s=self.now_s)

    @rule()
    def agent_restarts(self):
        self.ledger = Ledger(CAPACITY, lease_s=LEASE_S, now_s=self.now_s)

    @invariant()
    def nothing_is_used_twice(self):
        assert sum(self.used.values()) <= CAPACITY
        self.ledger.check_integrity()
        assert not self.ledger.over_bytes


TestLedger = LedgerMachine.TestCase


def open_ledger() -> Ledger:
    return Ledger(CAPACITY, lease_s=LEASE_S, now_s=-LEASE_S)


def test_what_is_reserved_is_not_there_for_others():
    ledger = open_ledger()
    ledger.reserve("a", 70, now_s=0)
    with pytest.raises(HostMemoryExceeded, match="b asks for 31 .* 30 of 100 are free"):
        ledger.reserve("b", 31, now_s=0)
    ledger.reserve("b", 30, now_s=0)
    ledger.reserve("a", 10, now_s=0)
    assert (ledger.reserved_bytes, ledger.free_bytes) == (40, 60)


def test_an_owner_that_went_silent_keeps_its_bytes_until_somebody_has_looked():
    ledger = open_ledger()
    ledger.reserve("a", 70, now_s=0)
    ledger.reserve("b", 10, now_s=5)
    assert [entry.owner for entry in ledger.lapsed(LEASE_S)] == ["a"]
    with pytest.raises(HostMemoryExceeded):
        ledger.reserve("b", 50, now_s=LEASE_S)
    assert ledger.release("a") == 70
    ledger.reserve("b", 50, now_s=LEASE_S)


def test_after_a_restart_claims_come_first():
    ledger = Ledger(CAPACITY, lease_s=LEASE_S, now_s=0)
    with pytest.raises(LedgerClosed, match="8.0 s"):
        ledger.reserve("new", 50, now_s=2)
    ledger.renew("old", 80, now_s=3)
    with pytest.raises(HostMemoryExceeded):
        ledger.reserve("new", 50, now_s=LEASE_S)
    with pytest.raises(ValueError, match="reserve them first"):
        ledger.renew("old", 90, now_s=LEASE_S)


def test_a_lower_limit_takes_nothing_away_and_gives_nothing_out():
    ledger = open_ledger()
    ledger.reserve("a", 70, now_s=0)
    ledger.resize(50)
    assert (ledger.over_bytes, ledger.free_bytes) == (20, 0)
    with pytest.raises(HostMemoryExceeded):
        ledger.reserve("b", 1, now_s=0)
    ledger.check_integrity()
