"""Which NUMA nodes a machine has, and which one a PCI device is on: read from /sys, without torch."""

from __future__ import annotations

import re
from pathlib import Path

SYS = Path("/sys")


def nodes(sys: Path = SYS) -> list[int]:
    """The machine's nodes that have memory, ascending; none where the kernel knows of none."""
    found = (re.fullmatch(r"node(\d+)", path.name) for path in (sys / "devices/system/node").glob("node*"))
    numbers = sorted(int(match[1]) for match in found if match)
    return [number for number in numbers if _has_memory(sys / f"devices/system/node/node{number}")]


def _has_memory(node: Path) -> bool:
    try:
        match = re.search(r"MemTotal:\s+(\d+)", (node / "meminfo").read_text())
    except OSError:
        return False
    return match is not None and int(match[1]) > 0


def node_of_pci(address: str, sys: Path = SYS) -> int | None:
    """The node that the device at `address` (0000:3b:00.0) is on; None where there is one node, or none is known."""
    known = nodes(sys)
    try:
        number = int((sys / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if len(known) > 1 and number in known else None
