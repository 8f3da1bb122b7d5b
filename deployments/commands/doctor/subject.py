"""What is examined: a machine, and the configuration that it is to serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.node.telemetry import TelemetryConfig
from cluster.protocol.node_reports import NodeTelemetry
from deployments.commands.doctor.machine import Cuda, Machine
from deployments.config import AppArgs
from selectn_core.errors import RecordRefused
from selectn_core.planning.record import PerformanceRecord

# What a CUDA device keeps back where device.memory_gib is not set (docs/gpu.md).
_KEPT_BACK_BYTES, _KEPT_BACK_SHARE = 1 << 30, 0.03


@dataclass(frozen=True, kw_only=True)
class CachedRecord:
    """A file of the cache: a record, or why it cannot be read."""

    path: Path
    record: PerformanceRecord | None
    problem: str = ""


@dataclass(frozen=True)
class Subject:
    """`document` is the Serve config, `apps` the arguments of its Select-N applications.

    Where the file cannot be used `problem` says why, and there are no applications: the machine is looked at alone.
    Readings that several checks need are taken once.
    """

    machine: Machine
    document: Mapping[str, Any]
    apps: tuple[AppArgs, ...]
    where: str = "the defaults"
    problem: str | None = None

    @cached_property
    def node(self) -> NodeTelemetry:
        return self.machine.sample(self.apps[0].telemetry if self.apps else TelemetryConfig())

    @cached_property
    def cuda(self) -> Cuda:
        return self.machine.cuda()

    @cached_property
    def records(self) -> tuple[CachedRecord, ...]:
        return tuple(map(_loaded, self.machine.cached_records()))

    def model_hash(self, args: AppArgs) -> str | None:
        """What a record calls the model; None: not known here."""
        source = args.model.source
        if source not in self._model_hashes:
            self._model_hashes[source] = self.machine.model_hash(args.model)
        return self._model_hashes[source]

    @cached_property
    def _model_hashes(self) -> dict[str, str | None]:
        return {}

    def kind(self, args: AppArgs) -> str:
        """ "cuda" or "emulated": what `auto` means here."""
        if args.device.kind == "auto":
            return "cuda" if self.cuda.devices else "emulated"
        return args.device.kind

    def device_bytes(self, args: AppArgs) -> int | None:
        """Memory of the device that a replica would have; None: as much as it takes, or nothing is known."""
        configured = None if args.device.memory_gib is None else int(args.device.memory_gib * (1 << 30))
        if self.kind(args) == "emulated" or not self.cuda.devices:
            return configured
        total = self.cuda.devices[0][1]
        usable = total - max(_KEPT_BACK_BYTES, int(total * _KEPT_BACK_SHARE))
        return usable if configured is None else min(configured, usable)


def _loaded(path: Path) -> CachedRecord:
    try:
        return CachedRecord(path=path, record=PerformanceRecord.load(path))
    except RecordRefused as refused:
        return CachedRecord(path=path, record=None, problem=str(refused))
