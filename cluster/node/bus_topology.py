"""Which GPUs share a host bus, and what it carries: from topology and PCIe links, or as configured."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cluster.protocol.node_reports import BusReport, GpuReport, Reading, Unavailable
from selectn_core.bounds import Bounds, check_numbers, require
from selectn_core.config import MOST_GB_PER_S
from selectn_core.device.bus import Bus

# Bytes per second and lane that each generation's line rate leaves after its encoding: 8b/10b up to 2, 128b/130b up
# to 5, and from 6 on flits that carry 242 of every 256 bytes (PCI Express Base Specification).
LANE_BYTES_PER_S = {
    1: 2.5e9 / 10,
    2: 5e9 / 10,
    3: 8e9 / 8 * 128 / 130,
    4: 16e9 / 8 * 128 / 130,
    5: 32e9 / 8 * 128 / 130,
    6: 64e9 / 8 * 242 / 256,
    7: 128e9 / 8 * 242 / 256,
}
# What packet headers, acknowledgements and flow control leave to data. The paper counts on 24 GB/s where its A10s sit
# on PCIe 4.0 x16, which is 0.76 of 31.5.
DEFAULT_EFFICIENCY = 0.76
# NVML_TOPOLOGY_HOSTBRIDGE: GPUs that are this near or nearer share a bus.
SHARED_UP_TO_LEVEL = 30
MAX_BUSES = 64
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Levels = Mapping[frozenset[int], int]


@dataclass(frozen=True, kw_only=True)
class BusConfig:
    """A bus as configured, in place of what is found.

    `gpus` are the UUIDs, or NVML indices, of the GPUs behind it; none: it is the bus of emulated devices, which name it
    in `device.bus`. `gb_per_s`, in 10^9 bytes per second; None: modelled from the links, or what the emulated bus has
    now. `node`: the name, host name, address or id of the Ray node it is on; None: every node where it applies.
    """

    name: str
    gpus: tuple[str | int, ...] = ()
    gb_per_s: Annotated[float | None, Bounds(above=0, at_most=MOST_GB_PER_S)] = None
    node: str | None = None

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), "buses.name", self.name, "1 to 64 of A-Z a-z 0-9 . _ : -")
        check_numbers(self, "buses")
        require(
            not any(isinstance(gpu, int) and gpu < 0 for gpu in self.gpus),
            "buses.gpus",
            self.gpus,
            "UUIDs, or indices of 0 or more",
        )


def require_disjoint(buses: Sequence[BusConfig]) -> None:
    """Raises ConfigError if two buses of one node have the same name, or share a GPU."""
    seen: set[tuple[Any, ...]] = set()
    for bus in buses:
        for key in (("name", bus.name), *(("gpus", gpu) for gpu in bus.gpus)):
            require((bus.node, *key) not in seen, f"buses.{key[0]}", key[1], "each on one bus of a node only")
            seen.add((bus.node, *key))


def link_bytes_per_s(generation: int, width: int, efficiency: float) -> float:
    """What a PCIe link carries in one direction. A generation that is not known counts as the newest that is."""
    return LANE_BYTES_PER_S[max(1, min(generation, max(LANE_BYTES_PER_S)))] * width * efficiency


def gpu_name(gpu: GpuReport) -> str:
    """A GPU's UUID, or its index where NVML has not told it."""
    return gpu.uuid if isinstance(gpu.uuid, str) else f"gpu-{gpu.index}"


def find_buses(
    gpus: Sequence[GpuReport],
    levels: Levels,
    configured: Sequence[BusConfig] = (),
    *,
    efficiency: float = DEFAULT_EFFICIENCY,
) -> tuple[BusReport, ...]:
    """The buses of a node's GPUs. `levels`: NVML's common ancestor of pairs of indices, as far as they are known.

    Each GPU is on exactly one bus. Configured ones come first; the rest share a bus if they are behind one switch or
    host bridge, or if nobody knows whether they are: bandwidth is then not given out twice. What is not known about
    a GPU in trouble says nothing, since it may be silent for that very reason: it gets a bus of its own.
    """
    buses, rest = [], list(gpus)
    for bus in configured:
        behind = [gpu for gpu in rest if gpu_name(gpu) in bus.gpus or gpu.index in bus.gpus]
        if behind:
            rest = [gpu for gpu in rest if gpu not in behind]
            buses.append(_configured(bus, behind, efficiency))
    for group in _groups(rest, lambda a, b: _share(a, b, levels)):
        known = all(frozenset((a.index, b.index)) in levels for a in group for b in group if a is not b)
        buses.append(
            BusReport(
                name=_found_name(group[0]),
                gpus=tuple(map(gpu_name, group)),
                bytes_per_s=_modelled(group, efficiency),
                found_by="topology" if known else "assumed",
                rate_from="pcie_link",
            )
        )
    return tuple(buses)


def emulated_buses(
    configured: Sequence[BusConfig],
    names: Sequence[str] = (),
    *,
    peek: Callable[[str], float | None] = Bus.peek,
) -> tuple[BusReport, ...]:
    """The configured buses that have no GPUs; without any, those of `names`, which emulated devices have made."""
    buses = [bus for bus in configured if not bus.gpus] or [BusConfig(name=name) for name in names[:MAX_BUSES]]
    return tuple(
        BusReport(
            name=bus.name,
            gpus=(),
            bytes_per_s=_emulated_bytes_per_s(bus, peek),
            found_by="configuration" if bus in configured else "emulated",
            rate_from="emulated" if bus.gb_per_s is None else "configuration",
        )
        for bus in buses
    )


def _emulated_bytes_per_s(bus: BusConfig, peek: Callable[[str], float | None]) -> Reading[float]:
    if bus.gb_per_s is not None:
        return bus.gb_per_s * 1e9
    try:
        bytes_per_s = peek(bus.name)
    except (OSError, ValueError) as error:
        return Unavailable(cause="failed", detail=str(error))
    return bytes_per_s or Unavailable(cause="not_supported", detail="no emulated device has opened this bus yet")


def _configured(bus: BusConfig, behind: Sequence[GpuReport], efficiency: float) -> BusReport:
    return BusReport(
        name=bus.name,
        gpus=tuple(map(gpu_name, behind)),
        bytes_per_s=_modelled(behind, efficiency) if bus.gb_per_s is None else bus.gb_per_s * 1e9,
        found_by="configuration",
        rate_from="pcie_link" if bus.gb_per_s is None else "configuration",
    )


def _share(a: GpuReport, b: GpuReport, levels: Levels) -> bool:
    level = levels.get(frozenset((a.index, b.index)))
    if level is None:
        return a.trouble is None and b.trouble is None
    return level <= SHARED_UP_TO_LEVEL


def _groups(gpus: Collection[GpuReport], together: Callable[[GpuReport, GpuReport], bool]) -> list[list[GpuReport]]:
    """Connected components, each in the order of `gpus`."""
    groups: list[list[GpuReport]] = []
    for gpu in gpus:
        joined = [group for group in groups if any(together(gpu, other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(member for group in joined for member in group), gpu])
    return sorted((sorted(group, key=lambda gpu: gpu.index) for group in groups), key=lambda group: group[0].index)


def _found_name(first: GpuReport) -> str:
    return f"pcie-{first.pci_bus_id}" if isinstance(first.pci_bus_id, str) else f"pcie-gpu-{first.index}"


def _modelled(behind: Sequence[GpuReport], efficiency: float) -> Reading[float]:
    """The link of the best-connected GPU that works: NVML does not tell what the switch above it has.

    The generation is the most that GPU and slot can do, as an idle link sleeps at a lower one; the width is the one
    in use, as a link that came up with fewer lanes stays so.
    """
    rates = [_link_rate(gpu, efficiency) for gpu in behind]
    known = [rate for rate in rates if isinstance(rate, float)]
    return max(known) if known else rates[0]


def _link_rate(gpu: GpuReport, efficiency: float) -> Reading[float]:
    generation, width = gpu.pcie_max_generation, gpu.pcie_width
    if gpu.trouble is not None:
        return gpu.trouble
    if isinstance(generation, Unavailable):
        return generation
    if isinstance(width, Unavailable):
        return width
    if width < 1:
        return Unavailable(cause="failed", detail=f"a PCIe width of {width}")
    return link_bytes_per_s(generation, width, efficiency)
