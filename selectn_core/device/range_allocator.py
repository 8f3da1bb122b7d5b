"""Ranges of a line of numbered places, handed out lowest first and merged when they come back."""

from __future__ import annotations

from bisect import bisect


class FirstFit:
    """Who holds which of the places 0..capacity-1. What a place is, a byte or a sector, is the caller's business."""

    def __init__(self, capacity: int) -> None:
        self._free: list[tuple[int, int]] = [(0, capacity)]  # (start, size), ascending, never adjacent
        self._taken: dict[int, int] = {}
        self.num_taken = 0

    def take(self, size: int) -> int | None:
        """The start of the lowest free range of `size` places, now taken; None where there is none."""
        for i, (start, available) in enumerate(self._free):
            if available >= size:
                self._free[i : i + 1] = [(start + size, available - size)] if available > size else []
                self._taken[start] = size
                self.num_taken += size
                return start
        return None

    def give_back(self, start: int) -> int:
        """Frees the range taken at `start` and returns its size; ValueError for anything else."""
        size = self._taken.pop(start, None)
        if size is None:
            raise ValueError(f"nothing was taken at {start}")
        self.num_taken -= size
        first = last = bisect(self._free, (start, size))
        merged_start, merged_end = start, start + size
        if first > 0 and sum(self._free[first - 1]) == start:
            first -= 1
            merged_start = self._free[first][0]
        if last < len(self._free) and self._free[last][0] == merged_end:
            merged_end = sum(self._free[last])
            last += 1
        self._free[first:last] = [(merged_start, merged_end - merged_start)]
        return size

    def taken(self) -> list[range]:
        """The ranges that are taken, ascending."""
        return [range(start, start + size) for start, size in sorted(self._taken.items())]
