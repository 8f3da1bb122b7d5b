"""A set of sectors, by their numbers: a byte for each, so that a range comes and goes at once and nothing is sorted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_HAS, _HAS_NOT = b"\1", b"\0"


class SectorSet:
    """Sectors of 0..`limit`-1. `pop` and `append` are those of a list, whose place it takes in a pool of free ones."""

    def __init__(self, limit: int, sectors: range = range(0)) -> None:
        self._has = bytearray(limit)
        self._len = 0
        self._end = 0  # no sector is at or after it
        self.add(sectors)

    def __len__(self) -> int:
        return self._len

    def __contains__(self, sector: int) -> bool:
        return bool(self._has[sector])

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        return (sector for sector, has in enumerate(self._has) if has)

    def count(self, sectors: range) -> int:
        """How many of `sectors` are here."""
        return self._has.count(_HAS, sectors.start, sectors.stop)

    def add(self, sectors: range) -> None:
        """Adds `sectors`, of which some may be here already."""
        self._len += len(sectors) - self.count(sectors)
        self._has[sectors.start : sectors.stop] = _HAS * len(sectors)
        self._end = max(self._end, sectors.stop)

    def remove(self, sectors: range) -> None:
        """Removes `sectors`, of which some may be elsewhere."""
        self._len -= self.count(sectors)
        self._has[sectors.start : sectors.stop] = _HAS_NOT * len(sectors)

    def append(self, sector: int) -> None:
        self.extend((sector,))

    def extend(self, sectors: Iterable[int]) -> None:
        """Adds sectors in any order."""
        has = self._has
        for sector in sectors:
            self._len += not has[sector]
            has[sector] = 1
            if sector >= self._end:
                self._end = sector + 1

    def pop(self) -> int:
        """Takes the highest sector out; IndexError where there is none."""
        sector = self._has.rfind(_HAS, 0, self._end)
        if sector < 0:
            raise IndexError("no sector is left")
        self._has[sector] = 0
        self._len -= 1
        self._end = sector
        return sector
