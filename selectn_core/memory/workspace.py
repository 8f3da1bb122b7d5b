"""What a step needs of the device beside weights and KV cache. Apart from measuring it, which runs the model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes of activations: of a step that reads no keys but its own, and what other keys add to it.

    That is `past_bytes`, however few they are, and `bytes_per_sector` of the KV cache that holds them.
    """

    step_bytes: int = 0
    past_bytes: int = 0
    bytes_per_sector: float = 0.0

    def bytes_for(self, num_sectors: int) -> int:
        """With a KV cache of `num_sectors`, all of which one step may read."""
        return self.step_bytes + self.past_bytes + math.ceil(self.bytes_per_sector * num_sectors)

    def most_sectors(self, free_bytes: int, sector_bytes: int) -> int:
        """The largest KV cache that leaves room for such a step."""
        free_bytes -= self.step_bytes + self.past_bytes
        return max(0, math.floor(free_bytes / (sector_bytes + self.bytes_per_sector)))
