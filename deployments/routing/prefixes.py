"""Prefixes of prompts as hashes: which replica has lately had a prompt that began alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

MAX_PREFIXES = 128
FIRST_PREFIX_BYTES, NUM_PREFIX_LENGTHS = 128, 8


def prefix_hashes(prompt: bytes) -> tuple[int, ...]:
    """Hashes of ever longer beginnings of a prompt: 128 bytes, 256, 512, ..., as far as it goes."""
    lengths = (FIRST_PREFIX_BYTES << i for i in range(NUM_PREFIX_LENGTHS))
    return tuple(digest(prompt[:length]) for length in lengths if length <= len(prompt))


class RecentPrefixes:
    """The prefixes of a replica's latest requests, `capacity` hashes at most."""

    def __init__(self, capacity: int = MAX_PREFIXES) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def add(self, hashes: Iterable[int]) -> None:
        for value in hashes:
            self._hashes[value] = None
            self._hashes.move_to_end(value)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def hashes(self) -> tuple[int, ...]:
        return tuple(self._hashes)


def digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
