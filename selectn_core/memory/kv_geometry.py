"""How a model's keys and values lie in memory: whole sectors, cut into blocks by each attention type for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selectn_core.device import ALIGNMENT_BYTES

_MOST_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """One attention type's blocks: `page_size` tokens of all layers of that type."""

    page_size: int
    blocks_per_sector: int
    sliding_window: int | None

    def sectors_for(self, num_tokens: int) -> int:
        return -(-_pages(num_tokens, self.page_size) // self.blocks_per_sector)

    def sectors_for_request(self, num_tokens: int) -> int:
        return self.sectors_for(min(num_tokens, self.sliding_window or num_tokens))

    def sectors_for_batch(self, num_requests: int, num_tokens: int) -> int:
        pages = num_requests * _pages(min(num_tokens, self.sliding_window or num_tokens), self.page_size)
        return -(-pages // self.blocks_per_sector)


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """Sectors of `sector_bytes`, and how many of them tokens take."""

    sector_bytes: int
    types: tuple[BlockGeometry, ...]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention types' sliding windows, each once; None is that of one which keeps every key."""
        return tuple(dict.fromkeys(blocks.sliding_window for blocks in self.types))

    def sectors_for(self, num_tokens: int) -> int:
        """Sectors for `num_tokens` that may belong to many requests, each shorter than a sliding window."""
        return sum(blocks.sectors_for(num_tokens) for blocks in self.types)

    def sectors_for_request(self, num_tokens: int) -> int:
        """Sectors for one request of `num_tokens` that has the cache alone."""
        return sum(blocks.sectors_for_request(num_tokens) for blocks in self.types)

    def sectors_for_batch(self, num_requests: int, num_tokens: int) -> int:
        """Sectors for `num_requests` of `num_tokens` each: every request has pages of its own."""
        return sum(blocks.sectors_for_batch(num_requests, num_tokens) for blocks in self.types)

    def tokens_in(self, num_sectors: int) -> int:
        """Tokens that fit `num_sectors`, whoever they belong to."""
        return _largest(lambda tokens: self.sectors_for(tokens) <= num_sectors)

    def longest_request_in(self, num_sectors: int) -> int:
        """Tokens of the longest request that fits `num_sectors` alone; bounded where only sliding windows are kept."""
        return _largest(lambda tokens: self.sectors_for_request(tokens) <= num_sectors)


def _pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, where fewer always do."""
    low, high = 0, _MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def weight_sectors(num_bytes: int, sector_bytes: int) -> int:
    """Sectors that `num_bytes` of weights take.

    Sectors are multiples of 128 bytes; weights that begin at one may have to move up to their own alignment.
    """
    padding = 0 if sector_bytes % ALIGNMENT_BYTES == 0 else ALIGNMENT_BYTES - 128
    return -(-(num_bytes + padding) // sector_bytes)
