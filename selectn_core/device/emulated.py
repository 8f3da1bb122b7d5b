"""A device for machines without a GPU: memory of a fixed size, and a link that really copies, paced to a bandwidth.

Nothing is simulated with sleeps in place of work: the model computes on the CPU, and a copy thread moves every byte.
Pacing only makes that thread wait until the bytes could have arrived over a link of the configured bandwidth.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from selectn_core.device.alignment import align_up
from selectn_core.device.base import Device, Event, Timestamp
from selectn_core.device.bus import Bus
from selectn_core.device.cpu_peak import CpuPeak
from selectn_core.device.host_pages import anonymous_pages, whole_pages
from selectn_core.device.link_usage import LinkUsage
from selectn_core.device.range_allocator import FirstFit
from selectn_core.errors import DeviceMemoryExceeded, LinkError

CHUNK_BYTES = 2 << 20


class EmulatedEvent(Event):
    """Done when set; carries the error of a copy that failed."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: Exception | None = None
        self.done_ns = 0

    def is_done(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise LinkError(f"host-to-device copy failed: {self.error}") from self.error

    def finish(self, error: Exception | None = None) -> None:
        self.error = error
        self.done_ns = time.monotonic_ns()
        self._done.set()


class EmulatedTimestamp(Timestamp):
    """When it was made: compute on the CPU is over when the call that asked for it returns."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def since(self, earlier: Timestamp) -> float:
        assert isinstance(earlier, EmulatedTimestamp)
        return self._at_s - earlier._at_s


class EmulatedDevice(Device):
    """CPU memory that refuses to grow, behind a paced link."""

    kind = "emulated"
    provenance = "emulated"
    torch_device = torch.device("cpu")

    def __init__(self, capacity_bytes: int, *, bytes_per_s: float, bus_name: str | None = None) -> None:
        """`bytes_per_s` is the bandwidth of the bus; devices that name the same bus share it."""
        self.capacity_bytes = align_up(capacity_bytes)
        self.bus = Bus(bus_name, bytes_per_s)
        self._memory = anonymous_pages(self.capacity_bytes)
        self._ranges = FirstFit(self.capacity_bytes)
        self._link = _PacedLink(self.bus)
        self._registered: dict[int, torch.Tensor] = {}
        self._host_allocated_bytes = 0
        self._closed = False

    @property
    def allocated_bytes(self) -> int:
        return self._ranges.num_taken

    def allocate(self, num_bytes: int, purpose: str) -> torch.Tensor:
        offset = self._ranges.take(align_up(num_bytes))
        if offset is None:
            raise DeviceMemoryExceeded(
                f"{purpose} wants {num_bytes:,} bytes of device memory; {self.free_bytes:,} of "
                f"{self.capacity_bytes:,} are free"
            )
        return self._memory[offset : offset + num_bytes]

    def free(self, tensor: torch.Tensor) -> None:
        try:
            self._ranges.give_back(tensor.data_ptr() - self._memory.data_ptr())
        except ValueError:
            raise ValueError("not a tensor that this device has allocated") from None

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        self._host_allocated_bytes += whole_pages(num_bytes)
        return anonymous_pages(num_bytes)

    @property
    def host_allocated_bytes(self) -> int:
        return self._host_allocated_bytes

    def register_host(self, memory: torch.Tensor) -> None:
        self._registered[memory.data_ptr()] = memory

    def unregister_host(self, memory: torch.Tensor) -> None:
        if self._registered.pop(memory.data_ptr(), None) is None:
            raise ValueError("not memory that was registered with this device")

    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        if source.nbytes != target.nbytes or not (source.is_contiguous() and target.is_contiguous()):
            raise ValueError(f"cannot copy {source.nbytes} bytes to {target.nbytes}: expected equal, contiguous")
        assert after is None or isinstance(after, EmulatedEvent)
        return self._link.submit(source, target, after)

    def copies_issued(self) -> Event:
        return self._link.submit_marker()

    def record(self) -> Event:
        # Compute on the CPU is over when the call that asked for it returns.
        event = EmulatedEvent()
        event.finish()
        return event

    def wait(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self._link.submit_marker().synchronize()

    def timestamp(self) -> Timestamp:
        return EmulatedTimestamp()

    def peak_bytes(self, run: Callable[[], None]) -> int:
        with CpuPeak() as peak:
            run()
        return peak.peak_bytes

    def link_usage(self) -> LinkUsage:
        return self._link.usage()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._link.close()
            self._registered.clear()
            self._memory = self._memory[:0].clone()  # whoever still refers to the device keeps none of its memory
            self.bus.close()


class _PacedLink:
    """One thread that carries out copies in order, chunk by chunk, at the pace of the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._jobs: deque[_Copy] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # Written by the link's thread alone; others see the usage of whole copies, as one object.
        self._idle_since_ns = 0
        self._copied_bytes, self._num_copies, self._busy_ns, self._waited_ns = 0, 0, 0, 0
        self._usage = LinkUsage(copied_bytes=0, num_copies=0, busy_s=0.0)
        # Not a daemon: a thread that copies into freed memory at interpreter exit aborts the process.
        self._thread = threading.Thread(target=self._run, name="selectn-link", daemon=False)
        self._thread.start()

    def submit(self, source: torch.Tensor, target: torch.Tensor, after: EmulatedEvent | None) -> EmulatedEvent:
        return self._enqueue(_Copy(source, target, after))

    def submit_marker(self) -> EmulatedEvent:
        nothing = torch.empty(0, dtype=torch.uint8)
        return self._enqueue(_Copy(nothing, nothing, None))

    def usage(self) -> LinkUsage:
        return self._usage

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, job: _Copy) -> EmulatedEvent:
        with self._changed:
            if self._closing:
                raise LinkError("the device is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.event

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                self._carry_out(job)
            except Exception as error:  # handed to whoever waits for the copy
                job.event.finish(error)
            else:
                job.event.finish()

    def _next_job(self) -> _Copy | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            return self._jobs.popleft() if self._jobs else None

    def _carry_out(self, job: _Copy) -> None:
        if job.after is not None:
            job.after.synchronize()
            self._idle_since_ns = max(self._idle_since_ns, job.after.done_ns)
        end_ns = max(self._idle_since_ns, job.issued_ns)
        for offset in range(0, job.num_bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, job.num_bytes - offset)
            ready_ns = end_ns
            start_ns, end_ns = self._bus.reserve(size, ready_ns=ready_ns)
            self._waited_ns += max(0, start_ns - ready_ns)
            ctypes.memmove(job.target + offset, job.source + offset, size)
            _sleep_until(end_ns)
            self._busy_ns += end_ns - start_ns
        self._idle_since_ns = end_ns
        self._copied_bytes += job.num_bytes
        self._num_copies += job.num_bytes > 0
        self._usage = LinkUsage(
            copied_bytes=self._copied_bytes,
            num_copies=self._num_copies,
            busy_s=self._busy_ns / 1e9,
            waited_s=self._waited_ns / 1e9,
        )


class _Copy:
    """A copy that waits its turn; keeps both tensors alive until it is done."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, after: EmulatedEvent | None) -> None:
        self.source, self.target = source.data_ptr(), target.data_ptr()
        self.num_bytes = source.nbytes
        self.after = after
        self.issued_ns = time.monotonic_ns()
        self.event = EmulatedEvent()
        self._tensors = (source, target)


def _sleep_until(instant_ns: int) -> None:
    remaining_ns = instant_ns - time.monotonic_ns()
    if remaining_ns > 0:
        time.sleep(remaining_ns / 1e9)
