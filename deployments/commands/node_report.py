"""`selectn node-report`: this node's hardware as a node agent would report it, for people or as JSON. Starts no Ray."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.node.telemetry import Telemetry, TelemetryConfig
from cluster.protocol.node_reports import BusReport, GpuReport, HostReport, NodeTelemetry, Unavailable
from deployments.commands.file_options import file_name
from deployments.commands.serve import DEFAULT_CONFIG
from deployments.config import AppArgs, parse
from deployments.serve_file import app_args, load_yaml, select_n_applications
from selectn_core.bounds import Bounds, require_number
from selectn_core.device.host_memory import SHARED_MEMORY

# Longer than an agent waits: without a persistent driver NVML takes seconds to start.
DEFAULT_TIMEOUT_S = 10.0
RATE_FROM = {
    "pcie_link": "modelled from its PCIe links",
    "configuration": "configured",
    "emulated": "emulated",
}
FOUND_BY = {
    "topology": "found in the topology",
    "assumed": "assumed, as the driver knows no topology",
    "configuration": "configured",
    "emulated": "of emulated devices",
}


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "node-report",
        help="report this node's GPUs, buses and host memory",
        description="Samples this node once: GPUs, the host buses they share, host memory. What cannot be read is "
        "shown with the reason.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--config", type=file_name, help=f"Serve config whose `telemetry` applies (default: {DEFAULT_CONFIG} if there)"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        help="how long a driver call may take before its GPU counts as timed out (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Samples and prints. Raises ConfigError for a wrong configuration; a broken GPU is no error."""
    require_number("--timeout-s", args.timeout_s, bounds=Bounds(at_least=0.001, at_most=3600))
    config = replace(_configured(args.config), deadline_s=args.timeout_s)
    with Telemetry(config, node_names={socket.gethostname()}) as telemetry:
        report = telemetry.sample()
    print(json.dumps(asdict(report), indent=2) if args.json else render(report))
    return 0


def _configured(path: Path | None) -> TelemetryConfig:
    path = path or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    if path is None:
        return TelemetryConfig()
    application = select_n_applications(load_yaml(path))[0]
    return parse(AppArgs, app_args(application), where="args").telemetry


def render(report: NodeTelemetry) -> str:
    """The report as text for a terminal."""
    at = datetime.fromtimestamp(report.sampled_unix_s).astimezone().isoformat(timespec="seconds")
    lines = [f"sampled at {at} in {report.sampling_s:.2f} s", f"NVML: {_nvml(report)}"]
    for gpu in report.gpus:
        lines += ["", f"GPU {gpu.index}: {_text(gpu.name)}, {_text(gpu.uuid)}, at {_text(gpu.pci_bus_id)}"]
        lines += [f"  {name:<12} {value}" for name, value in _gpu_rows(gpu)]
    lines += ["", "host buses" if report.buses else "host buses: none"]
    lines += [f"  {bus.name}: {_bus(bus)}" for bus in report.buses]
    lines += ["", "host memory"]
    lines += [f"  {name:<12} {value}" for name, value in _host_rows(report.host)]
    return "\n".join(lines)


def _nvml(report: NodeTelemetry) -> str:
    return _text(report.nvml, lambda info: f"driver {_text(info.driver_version)}, {info.num_gpus} GPUs")


def _gpu_rows(gpu: GpuReport) -> Iterator[tuple[str, str]]:
    if gpu.trouble is not None:
        yield "TROUBLE", _text(gpu.trouble)
    yield "memory", _text(gpu.memory, lambda m: f"{_gib(m.used_bytes)} of {_gib(m.total_bytes)} used")
    now = f"PCIe {_text(gpu.pcie_generation)} x{_text(gpu.pcie_width)}"
    yield "link", f"{now} now, PCIe {_text(gpu.pcie_max_generation)} x{_text(gpu.pcie_max_width)} at most"
    yield "traffic", f"in {_text(gpu.pcie_rx_bytes_per_s, _mb_per_s)}, out {_text(gpu.pcie_tx_bytes_per_s, _mb_per_s)}"
    yield "replays", _text(gpu.pcie_replays)
    yield "utilisation", _text(gpu.utilisation, lambda u: f"compute {u.compute_percent} %, memory {u.memory_percent} %")
    yield "temperature", _text(gpu.temperature_c, lambda celsius: f"{celsius} C")
    yield "power", f"{_text(gpu.power_w, _watts)} of {_text(gpu.power_limit_w, _watts)}"
    yield "throttled", _text(gpu.throttle_reasons, lambda reasons: ", ".join(reasons) or "no")
    corrected, uncorrected = _text(gpu.ecc_corrected_errors), _text(gpu.ecc_uncorrected_errors)
    yield "ECC errors", f"{corrected} corrected, {uncorrected} uncorrected"
    yield "Xid errors", _text(gpu.xid_errors, lambda xids: f"{xids.total} {list(xids.last_codes) or ''}".strip())


def _bus(bus: BusReport) -> str:
    rate = _text(bus.bytes_per_s, lambda bytes_per_s: f"{bytes_per_s / 1e9:.1f} GB/s, {RATE_FROM[bus.rate_from]}")
    behind = f"; {', '.join(bus.gpus)}" if bus.gpus else ""
    return f"{rate}; {FOUND_BY[bus.found_by]}{behind}"


def _host_rows(host: HostReport) -> Iterator[tuple[str, str]]:
    yield (
        "available",
        _text(host.memory, lambda m: f"{_gib(m.available_bytes)} of {_gib(m.limit_bytes)}, limited by {m.limited_by}"),
    )
    yield (
        "pressure",
        _text(
            host.pressure,
            lambda p: f"some tasks waited {p.some_avg10_percent} %, all {p.full_avg10_percent} % of the last 10 s",
        ),
    )
    yield str(SHARED_MEMORY), _text(host.shared_memory_free_bytes, lambda free: f"{_gib(free)} free")


def _text(value: Any, show: Callable[[Any], str] = str) -> str:
    """A value, or its state in words."""
    if isinstance(value, Unavailable):
        return f"[{value.cause.replace('_', ' ')}: {value.detail}]"
    return show(value)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"


def _mb_per_s(bytes_per_s: int) -> str:
    return f"{bytes_per_s / 1e6:.1f} MB/s"


def _watts(watts: float) -> str:
    return f"{watts:.1f} W"
