"""A node's host-memory ledger: bytes are reserved by an owner before they are used, and never given out twice.

An owner renews its entry within the lease. One that does not is *lapsed*: it may have died, and its bytes may still be
in use all the same, so they stay counted until somebody who has looked (the node's agent, which sees its processes)
releases it. A ledger starts closed for one lease: after a restart of its agent, owners that hold bytes already claim
them by renewing, and only then is the rest given out. Pure, single-threaded; the clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from selectn_core.errors import HostMemoryExceeded


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """What one owner has reserved, and until when on the ledger's clock it is known to be there."""

    owner: str
    num_bytes: int
    lease_end_s: float


class LedgerClosed(HostMemoryExceeded):
    """The ledger has just started and does not know yet what is held; the message says when to ask again."""


class Ledger:
    """Host memory of one node, `capacity_bytes` in all. Owners with nothing reserved have no entry."""

    def __init__(self, capacity_bytes: int, *, lease_s: float, now_s: float) -> None:
        """`now_s` is when it starts; `lease_s` is for how long a reservation or renewal counts."""
        self._capacity_bytes = _checked(capacity_bytes, "capacity_bytes")
        self._lease_s = lease_s
        self._opens_s = now_s + lease_s
        self._entries: dict[str, LedgerEntry] = {}

    @property
    def capacity_bytes(self) -> int:
        """What may be reserved in all."""
        return self._capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """The sum of all entries, lapsed ones included."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def free_bytes(self) -> int:
        """What may still be reserved: none while more is claimed than there is."""
        return max(0, self._capacity_bytes - self.reserved_bytes)

    @property
    def over_bytes(self) -> int:
        """By how much claims exceed the capacity: after it was lowered, or a restart."""
        return max(0, self.reserved_bytes - self._capacity_bytes)

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, by owner."""
        return tuple(self._entries[owner] for owner in sorted(self._entries))

    def is_open(self, now_s: float) -> bool:
        """Whether every owner of before the start has had a lease's time to renew."""
        return now_s >= self._opens_s

    def held_bytes(self, owner: str) -> int:
        """What `owner` has reserved."""
        entry = self._entries.get(owner)
        return entry.num_bytes if entry else 0

    def reserve(self, owner: str, num_bytes: int, *, now_s: float) -> LedgerEntry:
        """Makes `owner`'s reservation `num_bytes` in all: an amount, not a difference, so repeating it does no harm.

        A smaller or equal amount is always granted. Raises HostMemoryExceeded if the difference is not there,
        LedgerClosed in the first lease after a start; the reservation is then what it was.
        """
        _checked(num_bytes, "num_bytes")
        more_bytes = num_bytes - self.held_bytes(owner)
        if more_bytes > 0 and not self.is_open(now_s):
            raise LedgerClosed(
                f"{owner} asks for {more_bytes} more bytes of host memory {self._opens_s - now_s:.1f} s before all "
                "reservations of before the restart can be known: ask again then"
            )
        if more_bytes > self.free_bytes:
            raise HostMemoryExceeded(
                f"{owner} asks for {more_bytes} more bytes of host memory and {self.free_bytes} of "
                f"{self._capacity_bytes} are free: lower host.kv_gib, or give the node more memory"
            )
        return self._set(owner, num_bytes, now_s)

    def renew(self, owner: str, num_bytes: int, *, now_s: float) -> LedgerEntry:
        """`owner` is alive and uses up to `num_bytes`, which this ledger or the one before it has granted.

        A claim is never refused, since the bytes are in use; nobody gets more until all claims fit. Only a claim
        after a restart can be larger than the entry, and one that comes late finds none: at any other time that is an
        error of the owner (ValueError).
        """
        _checked(num_bytes, "num_bytes")
        if 0 < self.held_bytes(owner) < num_bytes and self.is_open(now_s):
            raise ValueError(
                f"{owner} renews {num_bytes} bytes and has reserved {self.held_bytes(owner)}: reserve them first"
            )
        return self._set(owner, num_bytes, now_s)

    def release(self, owner: str, *, keep_bytes: int = 0) -> int:
        """`owner` uses no more than `keep_bytes`; returns the bytes it gave back. Repeating it does no harm."""
        entry = self._entries.get(owner)
        if entry is None or entry.num_bytes <= _checked(keep_bytes, "keep_bytes"):
            return 0
        if keep_bytes:
            self._entries[owner] = replace(entry, num_bytes=keep_bytes)
        else:
            del self._entries[owner]
        return entry.num_bytes - keep_bytes

    def lapsed(self, now_s: float) -> tuple[LedgerEntry, ...]:
        """Entries whose owner has not renewed in time. Release those whose owner is gone."""
        return tuple(entry for entry in self.entries() if entry.lease_end_s <= now_s)

    def resize(self, capacity_bytes: int) -> None:
        """The node's limit has changed. What is reserved stays so."""
        self._capacity_bytes = _checked(capacity_bytes, "capacity_bytes")

    def check_integrity(self) -> None:
        """Raises AssertionError if an entry is empty or negative, or filed under another owner."""
        for owner, entry in self._entries.items():
            assert entry.owner == owner, f"{entry} is filed under {owner}"
            assert entry.num_bytes > 0, f"{entry} holds nothing"
        assert self.free_bytes == 0 or self.reserved_bytes + self.free_bytes == self._capacity_bytes

    def _set(self, owner: str, num_bytes: int, now_s: float) -> LedgerEntry:
        entry = LedgerEntry(owner=owner, num_bytes=num_bytes, lease_end_s=now_s + self._lease_s)
        if num_bytes:
            self._entries[owner] = entry
        else:
            self._entries.pop(owner, None)
        return entry


def _checked(num_bytes: int, field: str) -> int:
    if num_bytes < 0:
        raise ValueError(f"{field}={num_bytes}: 0 or more is needed")
    return num_bytes
