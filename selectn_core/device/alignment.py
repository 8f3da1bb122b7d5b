"""How bytes are aligned on a device. Apart from `base`, which imports torch."""

from __future__ import annotations

ALIGNMENT_BYTES = 256


def align_up(num_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    """The next multiple of `alignment` (a power of two) at or above `num_bytes`."""
    return (num_bytes + alignment - 1) & -alignment
