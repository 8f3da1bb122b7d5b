"""A CUDA GPU: one copy stream beside the stream that computes, CUDA events, page-locked host memory.

Nothing here blocks the host inside a step; waiting is a stream's work.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selectn_core.device import numa
from selectn_core.device.alignment import align_up
from selectn_core.device.base import Device, Event, Timestamp
from selectn_core.device.host_pages import anonymous_pages, whole_pages, writable
from selectn_core.device.link_usage import LinkUsage
from selectn_core.errors import DeviceMemoryExceeded, PinningRefused

_MAX_TIMED_COPIES = 256
_MAX_IDLE_EVENTS = 1024
_DRIVER = Path("/proc/driver/nvidia/gpus")
_LEAST_KEPT_BACK_BYTES = 1 << 30
_REGISTER_PORTABLE = 1  # cudaHostRegister's flag: for every context of the process


class CudaEvents:
    """CUDA's events, used again when what they stood for is not asked for any more.

    What waits for an event waits for what it was recorded at when the wait was issued: it may be recorded anew then.
    """

    def __init__(self, *, timed: bool) -> None:
        self._is_timed = timed
        self._idle: deque[torch.cuda.Event] = deque(maxlen=_MAX_IDLE_EVENTS)

    def recorded(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        try:
            event = self._idle.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=self._is_timed)
        event.record(stream)
        return event

    def give_back(self, event: torch.cuda.Event) -> None:
        """Any thread may."""
        self._idle.append(event)


class CudaEvent(Event):
    """A CUDA event of its own, recorded when it was made, until it is gone."""

    def __init__(self, stream: torch.cuda.Stream, events: CudaEvents) -> None:
        self._events = events
        self.event = events.recorded(stream)

    def __del__(self) -> None:
        if (event := self.__dict__.pop("event", None)) is not None:
            self._events.give_back(event)

    def is_done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: CudaEvent) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3


class CudaTimestamp(Timestamp):
    """A CUDA event. CUDA gives the time between two as a float32 of milliseconds: exact only where they are close."""

    def __init__(self, event: CudaEvent) -> None:
        self._event = event

    def since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, CudaTimestamp)
        return self._event.seconds_since(earlier._event)


class CudaDevice(Device):
    """Device memory up to `capacity_bytes` of the GPU's; what other libraries allocate is not in the accounts."""

    kind = "cuda"
    provenance = "measured"

    def __init__(self, capacity_bytes: int | None = None, *, index: int = 0) -> None:
        """`capacity_bytes` None takes what is free now, but for what is kept back (`kept_back_bytes`)."""
        self.torch_device = torch.device("cuda", index)
        # SDPA would prefer cuDNN, which plans anew, for tens of ms, at every new length: here that is at every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        most_bytes = max(0, free_bytes - kept_back_bytes(total_bytes))
        self.capacity_bytes = capacity_bytes if capacity_bytes is not None else most_bytes
        if self.capacity_bytes > most_bytes:
            raise DeviceMemoryExceeded(
                f"device.memory_gib asks for {self.capacity_bytes:,} bytes; {free_bytes:,} are free, of which "
                f"{free_bytes - most_bytes:,} are kept back for what libraries load later"
            )
        self._properties = torch.cuda.get_device_properties(self.torch_device)
        self._pci_address = _pci_address(self._properties)
        self._numa_node = numa.node_of_pci(self._pci_address)
        self._copy_stream = torch.cuda.Stream(self.torch_device)
        self._events, self._timed_events = CudaEvents(timed=False), CudaEvents(timed=True)
        self._sizes: dict[int, int] = {}
        # By address. The tensors stay: locked memory must not be unmapped.
        self._registered: dict[int, torch.Tensor] = {}
        self._host: dict[int, torch.Tensor] = {}
        self._usage = LinkUsage(copied_bytes=0, num_copies=0, busy_s=0.0)
        self._under_way: deque[tuple[CudaEvent, CudaEvent, int]] = deque()  # start, end, bytes
        self._usage_lock = threading.Lock()  # of both: any thread may ask

    @property
    def gpu_uuid(self) -> str | None:
        """The driver's own list has it by PCI address: for a MIG slice CUDA's properties may name the slice."""
        return _uuid_of(self._pci_address) or f"GPU-{self._properties.uuid}"

    @property
    def allocated_bytes(self) -> int:
        return sum(self._sizes.values())

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        size = align_up(num_bytes)
        if size > self.free_bytes:
            raise DeviceMemoryExceeded(
                f"{purpose} wants {num_bytes:,} bytes of device memory; {self.free_bytes:,} of "
                f"{self.capacity_bytes:,} are free"
            )
        try:
            tensor = torch.empty(size, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryExceeded(
                f"{purpose} wants {num_bytes:,} bytes of device memory; of what this process may use "
                f"{self.free_bytes:,} are free, but {self.room_bytes:,} on the GPU: others use it, or "
                "device.memory_gib is too large"
            ) from error
        # The copy stream writes to it, and the allocator knows only the stream that asked for it.
        tensor.record_stream(self._copy_stream)
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        self._sizes[tensor.data_ptr()] = size
        return tensor[:num_bytes]

    @property
    def room_bytes(self) -> int | None:
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        cached_bytes = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free_bytes + cached_bytes

    def free(self, tensor: torch.Tensor) -> None:
        if self._sizes.pop(tensor.data_ptr(), None) is None:
            raise ValueError("not a tensor that this device has allocated")

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        memory = anonymous_pages(num_bytes)
        if self._numa_node is not None:
            numa.prefer_node(memory, self._numa_node)
        self._lock_pages(memory, "pinned host memory")
        self._host[memory.data_ptr()] = memory
        return memory

    @property
    def host_allocated_bytes(self) -> int:
        return sum(whole_pages(memory.nbytes) for memory in self._host.values())

    def register_host(self, memory: torch.Tensor) -> None:
        # CUDA asks for write access to what it locks. Discrete GPUs refuse the flag that says otherwise.
        try:
            with writable(memory):
                self._lock_pages(memory, "the shared host store")
        except OSError as error:
            raise PinningRefused(f"the shared host store cannot be made writable to lock its pages: {error}") from error
        self._registered[memory.data_ptr()] = memory

    def _lock_pages(self, memory: torch.Tensor, what: str) -> None:
        num_bytes = whole_pages(memory.nbytes)
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, _REGISTER_PORTABLE))
        if status != 0:
            with contextlib.suppress(RuntimeError):  # CUDA reports the error once more, to the next kernel
                torch.zeros(1, device=self.torch_device)
            raise PinningRefused(
                f"CUDA cannot lock {num_bytes:,} bytes of {what} (cudaHostRegister: error {status}). Memory that a "
                "disk backs cannot be locked on some kernels, and limits of the container or of memlock may be lower"
            )

    def unregister_host(self, memory: torch.Tensor) -> None:
        if self._registered.pop(memory.data_ptr(), None) is None:
            raise ValueError("not memory that was registered with this device")
        self._unlock_pages(memory)

    def _unlock_pages(self, memory: torch.Tensor) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))

    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        if source.nbytes != target.nbytes:
            raise ValueError(f"cannot copy {source.nbytes} bytes to {target.nbytes}: expected equal sizes")
        stream = self._copy_stream
        if after is not None:
            assert isinstance(after, CudaEvent)
            stream.wait_event(after.event)
        started = CudaEvent(stream, self._timed_events)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = CudaEvent(stream, self._timed_events)
        with self._usage_lock:
            self._under_way.append((started, done, source.nbytes))
            if len(self._under_way) > _MAX_TIMED_COPIES:
                self._count_finished_copies()
        return done

    def copies_issued(self) -> Event:
        return CudaEvent(self._copy_stream, self._events)

    def record(self) -> Event:
        return CudaEvent(torch.cuda.current_stream(self.torch_device), self._events)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def timestamp(self) -> Timestamp:
        return CudaTimestamp(CudaEvent(torch.cuda.current_stream(self.torch_device), self._timed_events))

    def peak_bytes(self, run: Callable[[], None]) -> int:
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_reserved(self.torch_device)
        run()
        self.synchronize()
        # Reserved, not allocated: what the allocator holds in pieces is gone all the same.
        return torch.cuda.max_memory_reserved(self.torch_device) - before

    def link_usage(self) -> LinkUsage:
        with self._usage_lock:
            self._count_finished_copies()
            return self._usage

    def close(self) -> None:
        self._copy_stream.synchronize()
        for locked in (self._registered, self._host):
            while locked:
                self._unlock_pages(locked.popitem()[1])
        self._sizes.clear()
        torch.cuda.empty_cache()  # else what this device had is missing from what the next one finds free

    def _count_finished_copies(self) -> None:
        """Counts bytes and seconds of a copy together, when it is done: else a bandwidth would be of unequal parts."""
        num_bytes, num_copies, busy_s = self._usage.copied_bytes, self._usage.num_copies, self._usage.busy_s
        while self._under_way and self._under_way[0][1].is_done():  # they end in the order they were issued
            started, done, copied_bytes = self._under_way.popleft()
            num_bytes, num_copies = num_bytes + copied_bytes, num_copies + 1
            busy_s += done.seconds_since(started)
        self._usage = LinkUsage(copied_bytes=num_bytes, num_copies=num_copies, busy_s=busy_s)


def _pci_address(properties: Any) -> str:
    """As Linux names it: 0000:3b:00.0."""
    domain, bus, device = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _uuid_of(pci_address: str) -> str | None:
    """Of the whole GPU at this address, as NVML names it; None where the driver does not show it."""
    with contextlib.suppress(OSError):
        match = re.search(r"^GPU UUID:\s*(GPU-\S+)", (_DRIVER / pci_address / "information").read_text(), re.MULTILINE)
        return match[1] if match else None
    return None


def kept_back_bytes(total_bytes: int) -> int:
    """What no account has: kernels that are loaded when first called, cuBLAS's workspaces, inputs, holes."""
    return max(_LEAST_KEPT_BACK_BYTES, total_bytes * 3 // 100)
