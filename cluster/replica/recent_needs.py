"""How many units a replica's requests have lately needed offloaded: requests that come and go make no new demand."""

from __future__ import annotations

import math
from collections import deque

# What was lately guaranteed counts as needed for so many reports more.
_NEEDED_FOR = 10
# Steps are planned to be a little shorter than they may be, so a unit takes more of the bus than k_min's part for it.
_SURE = 1.15
# What is wanted has to fall by more than this share before less is asked for.
_KEPT_SHARE = 1 / 3


class RecentNeeds:
    """What the last reports said: `needed` units at least, and `wanted` ones to be sure of."""

    def __init__(self) -> None:
        self.wanted = 0
        self._needed: deque[int] = deque([0], maxlen=_NEEDED_FOR)

    @property
    def needed(self) -> int:
        return max(self._needed)

    def add(self, *, needed: int, wanted: int) -> None:
        """What is needed and wanted now."""
        self._needed.append(needed)
        to_be_sure = math.ceil(_SURE * wanted)
        if not (1 - _KEPT_SHARE) * self.wanted <= to_be_sure <= self.wanted:
            self.wanted = to_be_sure
