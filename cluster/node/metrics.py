"""A node's report as Ray metrics: gauges, set again with every report, with labels that cannot grow without bound."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from cluster.node.bus_topology import MAX_BUSES
from cluster.protocol.node_reports import (
    DeviceMemory,
    GpuReport,
    NodeReport,
    NodeTelemetry,
    Unavailable,
    Utilisation,
    XidErrors,
)
from selectn_core.device.host_memory import HostMemory, MemoryPressure

logger = logging.getLogger(__name__)

# Name: what it is, and its label beside `node`.
GAUGES: dict[str, tuple[str, str | None]] = {
    "selectn_gpu_up": ("1: the GPU answers; 0: it is lost, needs a reset, or its driver hangs", "gpu"),
    "selectn_gpu_memory_used_bytes": ("Device memory in use, by every process", "gpu"),
    "selectn_gpu_memory_total_bytes": ("Device memory", "gpu"),
    "selectn_gpu_pcie_generation": ("PCIe generation of the link now; 1 while the GPU is idle", "gpu"),
    "selectn_gpu_pcie_width": ("PCIe lanes of the link now", "gpu"),
    "selectn_gpu_pcie_rx_bytes_per_s": ("Bytes per second from the host, over 20 ms", "gpu"),
    "selectn_gpu_pcie_tx_bytes_per_s": ("Bytes per second to the host, over 20 ms", "gpu"),
    "selectn_gpu_pcie_replays": ("PCIe packets sent again since the driver was loaded", "gpu"),
    "selectn_gpu_compute_percent": ("Share of time in which a kernel ran", "gpu"),
    "selectn_gpu_temperature_c": ("Degrees Celsius", "gpu"),
    "selectn_gpu_power_w": ("Watts", "gpu"),
    "selectn_gpu_throttled": ("1: something holds the clocks down", "gpu"),
    "selectn_gpu_ecc_uncorrected_errors": ("Uncorrected memory errors since the driver was loaded", "gpu"),
    "selectn_gpu_xid_errors": ("Xid errors since the node's agent started", "gpu"),
    "selectn_bus_bytes_per_s": ("What a host bus carries in one direction", "bus"),
    "selectn_host_memory_available_bytes": ("Host memory that may still be used", None),
    "selectn_host_memory_limit_bytes": ("The limit on host memory: of a cgroup, or the machine", None),
    "selectn_host_memory_pressure_percent": ("Share of the last 10 s in which a task waited for memory", None),
    "selectn_node_sampling_s": ("How long taking this node's sample took", None),
}

Measurement = tuple[str, str | None, float]


def measurements(telemetry: NodeTelemetry) -> Iterator[Measurement]:
    """(gauge, value of its label, number) for everything that has a value. What has none is left out."""
    yield "selectn_node_sampling_s", None, telemetry.sampling_s
    for gpu in telemetry.gpus:
        for name, value in _gpu_values(gpu):
            if not isinstance(value, Unavailable):
                yield f"selectn_gpu_{name}", str(gpu.index), float(value)
    for bus in telemetry.buses:
        if not isinstance(bus.bytes_per_s, Unavailable):
            yield "selectn_bus_bytes_per_s", bus.name, bus.bytes_per_s
    if isinstance(telemetry.host.memory, HostMemory):
        yield "selectn_host_memory_available_bytes", None, telemetry.host.memory.available_bytes
        yield "selectn_host_memory_limit_bytes", None, telemetry.host.memory.limit_bytes
    if isinstance(telemetry.host.pressure, MemoryPressure):
        yield "selectn_host_memory_pressure_percent", None, telemetry.host.pressure.some_avg10_percent


def _gpu_values(gpu: GpuReport) -> Iterator[tuple[str, Any]]:
    yield "up", gpu.trouble is None
    if isinstance(gpu.memory, DeviceMemory):
        yield "memory_used_bytes", gpu.memory.used_bytes
        yield "memory_total_bytes", gpu.memory.total_bytes
    if isinstance(gpu.utilisation, Utilisation):
        yield "compute_percent", gpu.utilisation.compute_percent
    if isinstance(gpu.throttle_reasons, tuple):
        yield "throttled", bool(gpu.throttle_reasons)
    if isinstance(gpu.xid_errors, XidErrors):
        yield "xid_errors", gpu.xid_errors.total
    for name in ("pcie_generation", "pcie_width", "pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s", "pcie_replays"):
        yield name, getattr(gpu, name)
    for name in ("temperature_c", "power_w", "ecc_uncorrected_errors"):
        yield name, getattr(gpu, name)


class BoundedLabels:
    """Lets the first values of a label pass; names of buses come from outside, and each is a series of its own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()
        self._warned = False

    def admit(self, value: str) -> bool:
        if value in self._seen:
            return True
        if len(self._seen) < self._limit:
            self._seen.add(value)
            return True
        if not self._warned:
            self._warned = True
            logger.warning(
                "more than %d values of a metric's label: %r and later ones are left out", self._limit, value
            )
        return False


class NodeGauges:
    """The gauges of one node's agent. A gauge that is not set again is gone after some tens of seconds."""

    def __init__(self, node_id: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("node", label) if label else ("node",)).set_default_tags(
                {"node": node_id}
            )
            for name, (text, label) in GAUGES.items()
        }
        self._buses = BoundedLabels(MAX_BUSES)

    def set(self, report: NodeReport) -> None:
        for name, value, number in measurements(report.telemetry):
            label = GAUGES[name][1]
            if label == "bus" and not self._buses.admit(str(value)):
                continue
            self._gauges[name].set(number, tags={label: value} if label else None)
