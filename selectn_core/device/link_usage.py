"""What has gone over a host link. Apart from `base`, which imports torch: control and planning read it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkUsage:
    """What went over the host link since the device was opened: bytes, copies and seconds of copying.

    `waited_s` is for how long copies that could have begun waited for a bus that others used, where the device can
    tell; where it cannot, a shared bus makes copying itself slower.
    """

    copied_bytes: int
    num_copies: int
    busy_s: float
    waited_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth while copying; infinite before the first copy."""
        return self.copied_bytes / self.busy_s if self.busy_s else math.inf

    def since(self, earlier: LinkUsage) -> LinkUsage:
        """What was added after `earlier`."""
        return LinkUsage(
            copied_bytes=self.copied_bytes - earlier.copied_bytes,
            num_copies=self.num_copies - earlier.num_copies,
            busy_s=self.busy_s - earlier.busy_s,
            waited_s=self.waited_s - earlier.waited_s,
        )

    @property
    def share_bytes_per_s(self) -> float:
        """Bandwidth that was there for this device, waiting for the others included; infinite before the first copy."""
        seconds = self.busy_s + self.waited_s
        return self.copied_bytes / seconds if seconds else math.inf
