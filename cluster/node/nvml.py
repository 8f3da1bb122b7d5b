"""What NVML says about one GPU, each counter a value or a state. Blocks as long as the driver does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pynvml

from cluster.protocol.node_reports import Cause, DeviceMemory, NvmlInfo, Reading, Unavailable, Utilisation, XidErrors

T = TypeVar("T")

# An NVML that claims more is not believed: threads and metric labels are made per GPU.
MAX_GPUS = 64
NUM_LAST_XIDS = 8
# The most events that are taken from the driver's queue at a time, so that a storm of them cannot keep the thread.
MAX_EVENTS_PER_READ = 64

_CAUSES: dict[int, Cause] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "nvml_absent",
    pynvml.NVML_ERROR_UNINITIALIZED: "nvml_failed",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "nvml_failed",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "nvml_failed",
    pynvml.NVML_ERROR_GPU_IS_LOST: "gpu_lost",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "gpu_lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset_required",
    pynvml.NVML_ERROR_TIMEOUT: "timed_out",
    pynvml.NVML_ERROR_NO_PERMISSION: "no_permission",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not_supported",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "not_supported",
    pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED: "not_supported",
    pynvml.NVML_ERROR_NO_DATA: "not_supported",
    pynvml.NVML_ERROR_DEPRECATED: "not_supported",
}
THROTTLE_REASONS = {
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}
_OTHER_REASONS = ~(sum(THROTTLE_REASONS) | pynvml.nvmlClocksEventReasonGpuIdle)


def reading(call: Callable[..., T], *args: Any) -> Reading[T]:
    """`call(*args)`, or the state that its error means."""
    try:
        return call(*args)
    except pynvml.NVMLError as error:
        return Unavailable(cause=_CAUSES.get(error.value, "failed"), detail=str(error))
    except Exception as error:  # an answer that the binding cannot decode is a state too
        return Unavailable(cause="failed", detail=f"{type(error).__name__}: {error}")


def start_nvml() -> Reading[NvmlInfo]:
    """Loads and initialises NVML. Without a persistent driver this takes seconds. What fails may be tried again."""

    def start() -> NvmlInfo:
        pynvml.nvmlInit()
        num_gpus = min(pynvml.nvmlDeviceGetCount(), MAX_GPUS)
        return NvmlInfo(driver_version=reading(pynvml.nvmlSystemGetDriverVersion), num_gpus=num_gpus)

    return reading(start)


def stop_nvml() -> None:
    """Undoes `start_nvml`, as far as the driver lets it."""
    reading(pynvml.nvmlShutdown)


def common_ancestor(index: int, other: int) -> Reading[int]:
    """How near two GPUs are: one of NVML_TOPOLOGY_*, less is nearer."""

    def ask() -> int:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(each) for each in (index, other)]
        return int(pynvml.nvmlDeviceGetTopologyCommonAncestor(*handles))

    return reading(ask)


class GpuProbe:
    """One GPU: its handle, what never changes about it, and the Xid errors seen so far.

    `identity` holds the names of the GPU once they are known; another thread may read it while a call hangs.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.identity: dict[str, str] = {}
        self._handle: Any = None
        self._events: Any = None
        self._num_xids = 0
        self._last_xids: deque[int] = deque(maxlen=NUM_LAST_XIDS)

    def readings(self) -> Iterator[tuple[str, Callable[[], Reading[Any]]]]:
        """Every counter of a GpuReport with what reads it, in order: the link first, which a lost GPU still knows."""
        for name, call in (
            ("uuid", pynvml.nvmlDeviceGetUUID),
            ("name", pynvml.nvmlDeviceGetName),
            ("pci_bus_id", _pci_bus_id),
        ):
            yield name, lambda name=name, call=call: self._once(name, call)  # type: ignore[misc]
        for name, call in _COUNTERS.items():
            yield name, lambda call=call: self._read(call)  # type: ignore[misc]
        yield "xid_errors", lambda: self._read(self._xid_errors)

    def _read(self, call: Callable[[Any], T]) -> Reading[T]:
        return reading(lambda: call(self._open()))

    def _once(self, name: str, call: Callable[[Any], str]) -> Reading[str]:
        if name not in self.identity:
            value = self._read(call)
            if isinstance(value, Unavailable):
                return value
            self.identity[name] = value
        return self.identity[name]

    def _open(self) -> Any:
        # Kept: a handle goes on working when the GPU is lost, where asking for it again is refused.
        if self._handle is None:
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
        return self._handle

    def _xid_errors(self, handle: Any) -> XidErrors:
        if self._events is None:
            self._events = _register_events(handle)
        for _ in range(MAX_EVENTS_PER_READ):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError as error:
                if error.value != pynvml.NVML_ERROR_TIMEOUT:  # which means that there is none
                    raise
                break
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                self._num_xids += 1
                self._last_xids.append(event.eventData)
        return XidErrors(total=self._num_xids, last_codes=tuple(self._last_xids))


def _register_events(handle: Any) -> Any:
    events = pynvml.nvmlEventSetCreate()
    try:
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        reading(pynvml.nvmlEventSetFree, events)
        raise
    return events


def _pci_bus_id(handle: Any) -> str:
    bus_id = pynvml.nvmlDeviceGetPciInfo(handle).busId
    return (bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id)).lower()


def _memory(handle: Any) -> DeviceMemory:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return DeviceMemory(total_bytes=memory.total, used_bytes=memory.used, free_bytes=memory.free)


def _utilisation(handle: Any) -> Utilisation:
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return Utilisation(compute_percent=rates.gpu, memory_percent=rates.memory)


def _throughput(counter: int) -> Callable[[Any], int]:
    return lambda handle: pynvml.nvmlDeviceGetPcieThroughput(handle, counter) * 1000  # it answers in KB/s


def _ecc_errors(kind: int) -> Callable[[Any], int]:
    return lambda handle: pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, pynvml.NVML_VOLATILE_ECC)


def _temperature_c(handle: Any) -> int:
    return _newest(pynvml.nvmlDeviceGetTemperatureV, pynvml.nvmlDeviceGetTemperature)(
        handle, pynvml.NVML_TEMPERATURE_GPU
    )


def _throttle_reasons(handle: Any) -> tuple[str, ...]:
    """What holds the clocks down now; that the GPU is idle is not one."""
    bits = _newest(pynvml.nvmlDeviceGetCurrentClocksEventReasons, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)(
        handle
    )
    names = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    return (*names, "other") if bits & _OTHER_REASONS else tuple(names)


def _newest(call: Callable[..., T], older: Callable[..., T]) -> Callable[..., T]:
    """`call`, or what it replaces where the driver is too old to have it."""

    def either(*args: Any) -> T:
        try:
            return call(*args)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            return older(*args)

    return either


_COUNTERS: dict[str, Callable[[Any], Any]] = {
    "pcie_generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration,
    "pcie_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth,
    "pcie_max_generation": pynvml.nvmlDeviceGetMaxPcieLinkGeneration,
    "pcie_max_width": pynvml.nvmlDeviceGetMaxPcieLinkWidth,
    "memory": _memory,
    "utilisation": _utilisation,
    "temperature_c": _temperature_c,
    "power_w": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    "power_limit_w": lambda handle: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
    "throttle_reasons": _throttle_reasons,
    "ecc_corrected_errors": _ecc_errors(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
    "ecc_uncorrected_errors": _ecc_errors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
    "pcie_replays": pynvml.nvmlDeviceGetPcieReplayCounter,
    # These measure for 20 ms each.
    "pcie_rx_bytes_per_s": _throughput(pynvml.NVML_PCIE_UTIL_RX_BYTES),
    "pcie_tx_bytes_per_s": _throughput(pynvml.NVML_PCIE_UTIL_TX_BYTES),
}
