"""The replicas of a node and what they claim of its host memory: who is there, and a ledger that counts a store once.

Pure; the clock and the look at processes are arguments. A claim ends when its replica says so, or its process is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.node.ledger import Ledger, LedgerClosed
from cluster.protocol.node_reports import HostAnswer, HostClaim, LedgerReport, Placement
from selectn_core.bounds import flaw_in
from selectn_core.errors import HostMemoryExceeded

# Replicas renew every second or so. A ledger that has just started takes claims only for this long.
CLAIM_LEASE_S = 3.0


@dataclass
class _Claimed:
    claim: HostClaim
    renewed_s: float
    was_seen: bool


class HostClaims:
    """A node's claims, by replica, and the ledger they are entered in. Not thread-safe."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        is_alive: Callable[[HostClaim], bool],
        now_s: float,
        lease_s: float = CLAIM_LEASE_S,
    ) -> None:
        """`is_alive` looks for a claim's process; it may not see one that is in another container."""
        self._ledger = Ledger(capacity_bytes, lease_s=lease_s, now_s=now_s)
        self._is_alive, self._lease_s = is_alive, lease_s
        self._claimed: dict[str, _Claimed] = {}

    def claim(self, claim: HostClaim, now_s: float) -> HostAnswer:
        """Enters a claim, in place of the replica's last one, or says what is in the way."""
        if flaw := flaw_in(claim):
            return HostAnswer(held_bytes=self.held_bytes(claim.replica_id), refusal=f"the claim makes no sense: {flaw}")
        try:
            self._enter(claim, now_s)
        except HostMemoryExceeded as error:
            self._release_unclaimed()
            return HostAnswer(
                held_bytes=self.held_bytes(claim.replica_id),
                refusal=f"{error}; reserved are {self._shares()}",
                ask_again=isinstance(error, LedgerClosed),
            )
        self._claimed[claim.replica_id] = _Claimed(claim, now_s, self._is_alive(claim))
        self._release_unclaimed()
        return HostAnswer(held_bytes=self.held_bytes(claim.replica_id))

    def release(self, replica_id: str) -> None:
        """The replica uses nothing any more. Repeating it does no harm."""
        self._claimed.pop(replica_id, None)
        self._release_unclaimed()

    def sweep(self, now_s: float) -> tuple[str, ...]:
        """Releases what belonged to processes that are gone; whose.

        One that could be seen before is gone at once; one that never could, when it has stopped renewing too.
        """
        gone = [
            replica_id
            for replica_id, each in self._claimed.items()
            if (each.was_seen or now_s >= each.renewed_s + self._lease_s) and not self._is_alive(each.claim)
        ]
        for replica_id in gone:
            self.release(replica_id)
        return tuple(gone)

    def resize(self, capacity_bytes: int) -> None:
        """The node's limit has changed."""
        self._ledger.resize(capacity_bytes)

    def held_bytes(self, replica_id: str) -> int:
        """The replica's own bytes, and its store's if it is the first of those that use it."""
        each = self._claimed.get(replica_id)
        if each is None:
            return 0
        users = [other for other, one in self._claimed.items() if one.claim.store_name == each.claim.store_name]
        is_first = each.claim.store_name is not None and users[0] == replica_id
        return each.claim.own_bytes + (self._store_bytes(each.claim.store_name) if is_first else 0)

    def report(self, now_s: float) -> LedgerReport:
        """What there is to see."""
        return LedgerReport(
            capacity_bytes=self._ledger.capacity_bytes,
            reserved_bytes=self._ledger.reserved_bytes,
            replicas=tuple(
                Placement(replica_id=replica_id, bus_id=each.claim.bus_id) for replica_id, each in self._claimed.items()
            ),
            is_complete=self._ledger.is_open(now_s),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless the ledger has what the claims say, each store once, and nothing else."""
        self._ledger.check_integrity()
        entries = {entry.owner: entry.num_bytes for entry in self._ledger.entries()}
        assert entries == {owner: num_bytes for owner, num_bytes in self._all_amounts().items() if num_bytes}
        assert sum(map(self.held_bytes, self._claimed)) == self._ledger.reserved_bytes

    def _enter(self, claim: HostClaim, now_s: float) -> None:
        enter = self._ledger.renew if claim.is_renewal else self._ledger.reserve
        known = self._claimed.get(claim.replica_id)
        if known is not None and _amounts(known.claim) != _amounts(claim):
            enter = self._ledger.reserve  # it has changed: more has to be there
        for owner, num_bytes in _amounts(claim).items():
            held_bytes = self._ledger.held_bytes(owner)
            if enter == self._ledger.renew and 0 < held_bytes < num_bytes:
                self._ledger.release(owner)  # another renewed the store and knew less of it; in use is in use
            # A store is as large as whoever claims most of it says. And what is needed no more is given back when
            # everything has been granted: a refusal changes nothing.
            enter(owner, max(num_bytes, held_bytes), now_s=now_s)

    def _all_amounts(self) -> dict[str, int]:
        """What all claims come to, by the ledger's owners."""
        total: dict[str, int] = {}
        for each in self._claimed.values():
            for owner, num_bytes in _amounts(each.claim).items():
                total[owner] = max(num_bytes, total.get(owner, 0))
        return total

    def _store_bytes(self, name: str | None) -> int:
        return max(each.claim.store_bytes for each in self._claimed.values() if each.claim.store_name == name)

    def _release_unclaimed(self) -> None:
        """Gives back what entries have beyond what is claimed."""
        claimed = self._all_amounts()
        for entry in self._ledger.entries():
            self._ledger.release(entry.owner, keep_bytes=claimed.get(entry.owner, 0))

    def _shares(self) -> str:
        entries = [f"{entry.num_bytes:,} for {entry.owner}" for entry in self._ledger.entries()]
        return ", ".join(entries) or "none"


def _amounts(claim: HostClaim) -> dict[str, int]:
    """Bytes by the ledger's owners. The store comes first: without it there is nothing to keep KV for."""
    store = {f"store {claim.store_name}": claim.store_bytes} if claim.store_name is not None else {}
    return {**store, f"replica {claim.replica_id}": claim.own_bytes}
