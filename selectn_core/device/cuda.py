"""A CUDA GPU: one copy stream beside the stream that computes, CUDA events, page-locked host memory.

Nothing here blocks the host inside a step; waiting is a stream's work.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

from selectn_core.device.alignment import ALIGNMENT_BYTES, align_up
from selectn_core.device.base import Device, Event
from selectn_core.device.link_usage import LinkUsage
from selectn_core.errors import DeviceMemoryExceeded

logger = logging.getLogger(__name__)

_MAX_TIMED_COPIES = 256
_REGISTER_PORTABLE, _REGISTER_READ_ONLY = 1, 8  # cudaHostRegister's flags


class CudaEvent(Event):
    """A CUDA event, recorded when it was made."""

    def __init__(self, stream: torch.cuda.Stream, *, timed: bool = False) -> None:
        self.event = torch.cuda.Event(enable_timing=timed)
        self.event.record(stream)

    def is_done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaDevice(Device):
    """Device memory up to `capacity_bytes` of the GPU's; what other libraries allocate is not in the accounts."""

    kind = "cuda"
    provenance = "measured"

    def __init__(self, capacity_bytes: int | None = None, *, index: int = 0) -> None:
        """`capacity_bytes` None takes what is free now."""
        self.torch_device = torch.device("cuda", index)
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        self.capacity_bytes = capacity_bytes if capacity_bytes is not None else free_bytes
        if self.capacity_bytes > free_bytes:
            raise DeviceMemoryExceeded(
                f"device.memory_gib asks for {self.capacity_bytes:,} bytes; {free_bytes:,} are free"
            )
        self._copy_stream = torch.cuda.Stream(self.torch_device)
        self._sizes: dict[int, int] = {}
        # By address; with whether CUDA has locked its pages. The tensor stays: locked memory must not be unmapped.
        self._registered: dict[int, tuple[torch.Tensor, bool]] = {}
        self._copied_bytes, self._num_copies, self._busy_s = 0, 0, 0.0
        self._timed: list[tuple[CudaEvent, CudaEvent]] = []
        self._origin = CudaEvent(torch.cuda.current_stream(self.torch_device), timed=True)

    @property
    def gpu_uuid(self) -> str | None:
        return f"GPU-{torch.cuda.get_device_properties(self.torch_device).uuid}"

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
        tensor = torch.empty(size, dtype=torch.uint8, device=self.torch_device)
        # The copy stream writes to it, and the allocator knows only the stream that asked for it.
        tensor.record_stream(self._copy_stream)
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        self._sizes[tensor.data_ptr()] = size
        return tensor[:num_bytes]

    def free(self, tensor: torch.Tensor) -> None:
        if self._sizes.pop(tensor.data_ptr(), None) is None:
            raise ValueError("not a tensor that this device has allocated")

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        raw = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8, pin_memory=True)
        offset = -raw.data_ptr() % ALIGNMENT_BYTES
        return raw[offset : offset + num_bytes]

    def register_host(self, memory: torch.Tensor) -> None:
        # Without the read-only flag CUDA asks for write access, which a read-only mapping does not have.
        flags = _REGISTER_PORTABLE | _REGISTER_READ_ONLY
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)
        is_locked = int(status) == 0
        self._registered[memory.data_ptr()] = (memory, is_locked)
        if not is_locked:
            with contextlib.suppress(RuntimeError):  # CUDA reports the error once more, to the next kernel
                torch.zeros(1, device=self.torch_device)
            logger.warning(
                "CUDA cannot lock the pages of the shared host store (error %s; it takes a GPU and driver that can "
                "register read-only memory, and a memlock limit above %s bytes): copies from it are slow and block. "
                "Set host.weights to 'private' for pinned memory of this process's own",
                status,
                f"{memory.nbytes:,}",
            )

    def unregister_host(self, memory: torch.Tensor) -> None:
        if memory.data_ptr() not in self._registered:
            raise ValueError("not memory that was registered with this device")
        self._unregister(memory.data_ptr())

    def _unregister(self, address: int) -> None:
        _, is_locked = self._registered.pop(address)
        if is_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        if source.nbytes != target.nbytes:
            raise ValueError(f"cannot copy {source.nbytes} bytes to {target.nbytes}: expected equal sizes")
        stream = self._copy_stream
        if after is not None:
            assert isinstance(after, CudaEvent)
            stream.wait_event(after.event)
        started = CudaEvent(stream, timed=True)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = CudaEvent(stream, timed=True)
        self._copied_bytes += source.nbytes
        self._num_copies += 1
        self._timed.append((started, done))
        if len(self._timed) > _MAX_TIMED_COPIES:
            self._account_finished_copies()
        return done

    def record(self) -> Event:
        return CudaEvent(torch.cuda.current_stream(self.torch_device))

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def timestamp(self) -> Callable[[], float]:
        mark = CudaEvent(torch.cuda.current_stream(self.torch_device), timed=True)
        return lambda: self._origin.event.elapsed_time(mark.event) / 1e3

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
        self._account_finished_copies()
        return LinkUsage(copied_bytes=self._copied_bytes, num_copies=self._num_copies, busy_s=self._busy_s)

    def close(self) -> None:
        self._copy_stream.synchronize()
        for address in list(self._registered):
            self._unregister(address)
        self._sizes.clear()

    def _account_finished_copies(self) -> None:
        waiting = []
        for started, done in self._timed:
            if done.is_done():
                self._busy_s += started.event.elapsed_time(done.event) / 1e3
            else:
                waiting.append((started, done))
        self._timed = waiting
