"""A node's report as Ray metrics: gauges, set again with every report, with labels that cannot grow without bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.metrics.meters import Meters
from cluster.metrics.table import BY_NAME
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

Measurement = tuple[str, str | None, float]


def measurements(telemetry: NodeTelemetry) -> Iterator[Measurement]:
    """(gauge, value of its label, number) for everything that has a value. What has none is left out."""
    yield "selectn_node_sampling_seconds", None, telemetry.sampling_s
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


class NodeGauges:
    """The gauges of one node's agent. A gauge that is not set again is gone after some tens of seconds."""

    def __init__(self, node_id: str) -> None:
        self._meters = Meters("node", {"node": node_id})

    def set(self, report: NodeReport) -> None:
        for name, value, number in measurements(report.telemetry):
            labels = BY_NAME[name].labels
            self._meters.set(name, number, **({labels[0]: str(value)} if labels else {}))
        if report.ledger is not None:
            self._meters.set("selectn_ledger_capacity_bytes", report.ledger.capacity_bytes)
            self._meters.set("selectn_ledger_reserved_bytes", report.ledger.reserved_bytes)
