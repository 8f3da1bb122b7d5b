"""Machines for the doctor that are not here: files from a made-up root, and readings that say what a test wants.

The hardware is made up in the shape that a node agent reports it in; nothing of it was read from a driver.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cluster.protocol.node_reports import (
    GpuReport,
    HostReport,
    NodeTelemetry,
    NvmlInfo,
    Unavailable,
    Utilisation,
)
from deployments.commands.doctor.findings import Finding
from deployments.commands.doctor.machine import Cuda, Limit, Machine, Requirements
from deployments.commands.doctor.subject import Subject
from deployments.config import AppArgs, parse

GIB = 1 << 30
UNSUPPORTED = Unavailable(cause="not_supported", detail="made up")
VERSIONS = {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0", "nvidia-ml-py": "13.615.71"}
REQUIREMENTS = Requirements(
    python=">=3.11", packages=("ray[serve]<2.61,>=2.60", "torch>=2.11", "transformers==5.23.0", "nvidia-ml-py>=12.560")
)
ONE_GPU = Cuda(build="13.0", devices=(("Made-up GPU", 24 * GIB),))


def made_up_gpu(index: int = 0, **readings: Any) -> GpuReport:
    """One that works at full speed, unless `readings` say otherwise."""
    nothing: dict[str, Any] = {each.name: UNSUPPORTED for each in fields(GpuReport)}
    link = {"pcie_generation": 4, "pcie_width": 16, "pcie_max_generation": 4, "pcie_max_width": 16}
    rest = {"trouble": None, "pci_bus_id": f"00000000:{index:02x}:00.0", "pcie_replays": 0}
    idle = {"utilisation": Utilisation(compute_percent=0, memory_percent=0)}
    return GpuReport(**{**nothing, **link, **rest, **idle, **readings, "index": index})


def made_up_node(*gpus: GpuReport) -> NodeTelemetry:
    absent = Unavailable(cause="nvml_absent", detail="made up")
    return NodeTelemetry(
        sampled_s=0.0,
        sampled_unix_s=0.0,
        sampling_s=0.0,
        nvml=NvmlInfo(driver_version="made up", num_gpus=len(gpus)) if gpus else absent,
        gpus=gpus,
        buses=(),
        host=HostReport(memory=UNSUPPORTED, pressure=UNSUPPORTED, shared_memory_free_bytes=UNSUPPORTED),
    )


class OddMachine:
    """A root with what the doctor reads of /proc, /sys and shared memory: 8 CPUs, 64 GiB, no GPU, no limits."""

    def __init__(self, root: Path) -> None:
        self.root, self.cgroup = root, root / "cgroup"
        for directory in ("proc/self", "shm", "files", "cgroup", "sys/devices/system/node"):
            (root / directory).mkdir(parents=True)
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {64 << 20} kB\n")
        self.write("proc/cpuinfo", "model name\t: Made-up CPU\n")
        self.write("proc/self/cgroup", "0::/\n")
        self.write("proc/self/mountinfo", f"31 22 0:28 / {self.cgroup} rw - cgroup2 cgroup2 rw\n")
        self.node(0)
        self.machine = Machine(
            proc=root / "proc",
            sys=root / "sys",
            shared_memory=root / "shm",
            files=root / "files",
            uid=1000,
            num_cpus=8,
            environment={},
            python="3.12.1",
            requirements=lambda: REQUIREMENTS,
            version_of=VERSIONS.get,
            cuda=Cuda,
            sample=lambda config: made_up_node(),
            limit=lambda which: Limit(soft=None, hard=None),
            free_bytes=lambda directory: 32 * GIB,
            is_in_memory=lambda directory: True,
            why_port_is_not_free=lambda host, port: None,
            cached_records=list,
            model_hash=lambda model: "abc",
            checkpoint=lambda model: None,
        )

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def node(self, number: int) -> None:
        """A NUMA node with memory."""
        self.write(f"sys/devices/system/node/node{number}/meminfo", f"Node {number} MemTotal: {32 << 20} kB\n")

    def subject(
        self, args: dict[str, Any] | None = None, *, http: dict[str, Any] | None = None, **readings: Any
    ) -> Subject:
        """One application with these `args:`, on this machine but for `readings`."""
        parsed = parse(AppArgs, args or {}, where="args")
        return Subject(replace(self.machine, **readings), {"http_options": http or {}}, (parsed,))


def only(findings: Any) -> Finding:
    """The one finding there is."""
    (finding,) = list(findings)
    assert isinstance(finding, Finding)
    return finding
