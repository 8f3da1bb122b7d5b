"""Ranges of a line of numbered places, handed out lowest first and merged when they come back."""

from __future__ import annotations


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
        merged: list[tuple[int, int]] = []
        for free_start, length in sorted([*self._free, (start, size)]):
            if merged and sum(merged[-1]) == free_start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((free_start, length))
        self._free = merged
        return size

    def taken(self) -> list[range]:
        """The ranges that are taken, ascending."""
        return [range(start, start + size) for start, size in sorted(self._taken.items())]
