"""Samples a node's hardware: GPUs, buses and host memory, each counter a value or a state, never a stall or a crash."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cluster.node import nvml
from cluster.node.bus_topology import DEFAULT_EFFICIENCY, BusConfig, emulated_buses, find_buses, require_disjoint
from cluster.protocol.node_reports import (
    BusReport,
    Cause,
    GpuReport,
    HostReport,
    NodeTelemetry,
    NvmlInfo,
    Reading,
    Unavailable,
)
from selectn_core.bounds import Bounds, check_numbers
from selectn_core.device.bus import Bus
from selectn_core.device.host_memory import SHARED_MEMORY, available_host_memory, free_bytes, memory_pressure

logger = logging.getLogger(__name__)

T = TypeVar("T")

# NVML that did not start is tried again, but not at every sample: the driver's own tools may run each time.
RETRY_NVML_S = 30.0
# States of a GPU as a whole, worst first.
_TROUBLE: tuple[Cause, ...] = ("gpu_lost", "reset_required", "timed_out")
_COUNTERS = tuple(field.name for field in fields(GpuReport) if field.name not in ("index", "trouble"))


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """How a node's hardware is sampled.

    Every `period_s` a sample is taken; a driver call has `deadline_s` to answer before its GPU counts as timed out.
    `pcie_efficiency` is the part of a link's raw bandwidth that copies get. `buses` replace those that are found. With
    `genai_metrics` replicas export latencies by OpenTelemetry's GenAI names as well.
    """

    period_s: Annotated[float, Bounds(at_least=0.01, at_most=3600)] = 1.0
    deadline_s: Annotated[float, Bounds(at_least=0.001, at_most=3600)] = 0.5
    pcie_efficiency: Annotated[float, Bounds(above=0, at_most=1)] = DEFAULT_EFFICIENCY
    buses: tuple[BusConfig, ...] = ()
    genai_metrics: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "telemetry")
        require_disjoint(self.buses)


class Telemetry:
    """A node's hardware, sampled by one thread per GPU and one for NVML as a whole.

    A driver call that hangs keeps its thread until it returns: that GPU is `timed_out` meanwhile, and no other thread
    is started in its place. `sample` returns within three deadlines (NVML's start, the GPUs, their topology), and
    within one as soon as NVML has started and topology is known.
    """

    def __init__(self, config: TelemetryConfig | None = None, *, node_names: Collection[str] = ()) -> None:
        """`node_names` are what `BusConfig.node` may call this node."""
        self._config = config or TelemetryConfig()
        self._buses = [bus for bus in self._config.buses if bus.node is None or bus.node in node_names]
        self._nvml: Reading[NvmlInfo] | None = None
        self._tried_nvml_s = 0.0
        self._levels: dict[frozenset[int], int] = {}
        self._main = Worker("nvml")
        self._gpus: list[_Gpu] = []

    def sample(self) -> NodeTelemetry:
        """One report. For one thread at a time."""
        sampled_unix_s, start_s = time.time(), time.monotonic()
        nvml_state = self._start_nvml()
        gpus = self._read_gpus()
        self._learn_topology(gpus)
        return NodeTelemetry(
            sampled_s=start_s,
            sampled_unix_s=sampled_unix_s,
            nvml=nvml_state,
            gpus=gpus,
            buses=self._find_buses(nvml_state, gpus),
            host=read_host(),
            sampling_s=time.monotonic() - start_s,
        )

    def close(self) -> None:
        """Ends the threads that are not in a hanging call, and leaves NVML if none is."""
        gpu_workers = [gpu.worker for gpu in self._gpus]
        if isinstance(self._nvml, NvmlInfo) and not any(worker.is_busy() for worker in gpu_workers):
            self._main.offer(nvml.stop_nvml, "nvmlShutdown")
            self._main.wait(time.monotonic() + self._config.deadline_s)
        for worker in [self._main, *gpu_workers]:
            worker.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_nvml(self) -> Reading[NvmlInfo]:
        if not isinstance(self._nvml, NvmlInfo):
            now_s = time.monotonic()
            if self._nvml is None or now_s >= self._tried_nvml_s + RETRY_NVML_S:
                self._main.offer(self._try_nvml, "nvmlInit")
            if not self._main.wait(now_s + self._config.deadline_s):
                return self._main.timed_out()
        assert self._nvml is not None
        if isinstance(self._nvml, NvmlInfo) and not self._gpus:
            self._gpus = [_Gpu(index) for index in range(self._nvml.num_gpus)]
        return self._nvml

    def _try_nvml(self) -> None:
        self._nvml = nvml.start_nvml()
        self._tried_nvml_s = time.monotonic()

    def _read_gpus(self) -> tuple[GpuReport, ...]:
        for gpu in self._gpus:
            gpu.begin()
        deadline_s = time.monotonic() + self._config.deadline_s
        return tuple(gpu.report(deadline_s) for gpu in self._gpus)

    def _learn_topology(self, gpus: Sequence[GpuReport]) -> None:
        """Asks for the pairs that are not known, of GPUs that answer; what has been learnt never changes."""
        answering = [gpu.index for gpu in gpus if gpu.trouble is None]
        pairs = [(a, b) for a in answering for b in answering if a < b and frozenset((a, b)) not in self._levels]
        if pairs:
            self._main.offer(lambda: self._ask_levels(pairs), "nvmlDeviceGetTopologyCommonAncestor")
            self._main.wait(time.monotonic() + self._config.deadline_s)

    def _ask_levels(self, pairs: Iterable[tuple[int, int]]) -> None:
        for a, b in pairs:
            level = nvml.common_ancestor(a, b)
            if not isinstance(level, Unavailable):
                self._levels[frozenset((a, b))] = level

    def _find_buses(self, nvml_state: Reading[NvmlInfo], gpus: Sequence[GpuReport]) -> tuple[BusReport, ...]:
        levels, efficiency = dict(self._levels), self._config.pcie_efficiency
        found = find_buses(gpus, levels, self._buses, efficiency=efficiency)
        # With GPUs, whatever emulated devices were tried out here are of interest only if they are configured.
        made_here = [] if isinstance(nvml_state, NvmlInfo) else Bus.names()
        return (*found, *emulated_buses(self._buses, made_here))


class _Gpu:
    """A GPU's thread, and what it has read in this round."""

    def __init__(self, index: int) -> None:
        self.worker = Worker(f"gpu-{index}")
        self._probe = nvml.GpuProbe(index)
        self._round: dict[str, Reading[Any]] = {}

    def begin(self) -> None:
        """Has the thread read every counter, unless it still waits for an answer of an earlier round."""
        values: dict[str, Reading[Any]] = {}
        self._round = values
        self.worker.offer(lambda: self._read(values), "nvmlDeviceGetHandleByIndex")

    def report(self, deadline_s: float) -> GpuReport:
        """What has been read by the deadline, an instant of the monotonic clock; the rest has timed out."""
        self.worker.wait(deadline_s)
        missing = self.worker.timed_out()
        values: dict[str, Any] = {
            **self._probe.identity,
            **self._round,
        }  # what never changes is known though the driver hangs
        readings = {name: values.get(name, missing) for name in _COUNTERS}
        return GpuReport(index=self._probe.index, trouble=_trouble(readings.values()), **readings)

    def _read(self, values: dict[str, Reading[Any]]) -> None:
        for name, read in self._probe.readings():
            self.worker.doing = name
            values[name] = read()


def _trouble(readings: Iterable[Reading[Any]]) -> Unavailable | None:
    states = [each for each in readings if isinstance(each, Unavailable)]
    if len(states) == len(_COUNTERS):  # it cannot even be opened
        return states[0]
    for cause in _TROUBLE:
        for state in states:
            if state.cause == cause:
                return state
    return None


class Worker:
    """A thread that does one job at a time, for calls that may never return.

    A daemon, unlike an executor's threads: the interpreter must not wait at its end for a call that hangs.
    """

    def __init__(self, name: str) -> None:
        self.doing = ""
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._began_s = 0.0
        self._closing = False
        threading.Thread(target=self._run, name=f"telemetry-{name}", daemon=True).start()

    def offer(self, job: Callable[[], None], doing: str) -> bool:
        """Starts `job`, unless an earlier one is still running; says which."""
        with self._changed:
            if self._job is not None or self._closing:
                return False
            self._job, self.doing, self._began_s = job, doing, time.monotonic()
            self._changed.notify_all()
            return True

    def wait(self, deadline_s: float) -> bool:
        """Whether there is no job any more, as soon as there is none or at the deadline (monotonic clock)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._job is None, timeout=max(0.0, deadline_s - time.monotonic()))

    def is_busy(self) -> bool:
        return self._job is not None

    def timed_out(self) -> Unavailable:
        """The state of what this thread has not read."""
        waited_s = time.monotonic() - self._began_s
        return Unavailable(cause="timed_out", detail=f"no answer from the driver for {waited_s:.1f} s ({self.doing})")

    def close(self) -> None:
        """Ends the thread after its job."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closing)
                job = self._job
            if job is None:
                return
            try:
                job()
            except Exception:  # what it did not read has timed out; the thread is needed again
                logger.exception("telemetry thread: %s failed", self.doing)
            finally:
                with self._changed:
                    self._job = None
                    self._changed.notify_all()


def read_host(directory: Path = SHARED_MEMORY) -> HostReport:
    """Host memory, and what the file system of shared memory (`directory`) can still take."""
    return HostReport(
        memory=_host_reading(available_host_memory),
        pressure=_host_reading(memory_pressure),
        shared_memory_free_bytes=_host_reading(lambda: free_bytes(directory)),
    )


def _host_reading(read: Callable[[], T]) -> Reading[T]:
    try:
        return read()
    except FileNotFoundError as error:
        return Unavailable(cause="not_supported", detail=str(error))
    except (OSError, ValueError, KeyError) as error:
        return Unavailable(cause="failed", detail=f"{type(error).__name__}: {error}")
