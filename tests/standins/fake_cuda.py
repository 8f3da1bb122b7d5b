"""A fake of `torch.cuda`, for what `CudaDevice` itself decides: there is no GPU here, and none is claimed.

Memory is the CPU's and copies happen at once. What is faked is time and answers. Streams and events have times of a
clock that advances when somebody waits. Registration refuses what a discrete GPU refuses. Whether a GPU does all this
alike, only a GPU can tell.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selectn_core.device import cuda as cuda_module

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801
_READ_ONLY = 8
_CPU = torch.device("cpu")


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.free_at_s = cuda, 0.0

    def wait_stream(self, other: FakeStream) -> None:
        self.free_at_s = max(self.free_at_s, other.free_at_s)

    def wait_event(self, event: FakeEvent) -> None:
        self.free_at_s = max(self.free_at_s, event.at_s)

    def synchronize(self) -> None:
        self.cuda.advance_to(self.free_at_s)


class FakeEvent:
    def __init__(self, cuda: FakeCuda, enable_timing: bool) -> None:
        self.cuda, self.is_timed, self.at_s = cuda, enable_timing, 0.0

    def record(self, stream: FakeStream) -> None:
        self.at_s = max(stream.free_at_s, self.cuda.now_s)

    def query(self) -> bool:
        return self.cuda.now_s >= self.at_s

    def synchronize(self) -> None:
        self.cuda.advance_to(self.at_s)

    def elapsed_time(self, later: FakeEvent) -> float:
        """Milliseconds, as a float32: with hours between two events nothing is left of microseconds."""
        if not (self.is_timed and later.is_timed and self.query() and later.query()):
            raise RuntimeError("both events must be timed and done")
        self.cuda.on_elapsed()
        milliseconds: float = struct.unpack("f", struct.pack("f", (later.at_s - self.at_s) * 1e3))[0]
        return milliseconds


class FakeCuda:
    """Stands for `torch.cuda`. Attributes say what it answers; `registered` is what it has locked, by address."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._ahead_s, self._started_s = clock, 0.0, clock()
        self.total_bytes = self.driver_free_bytes = 8 << 30
        self.cached_bytes = 0  # that torch's allocator keeps of it
        self.use_s = 1e-3  # what the work of a `with stream` block takes
        self.registration_status = SUCCESS
        self.registered: dict[int, tuple[int, int, str]] = {}  # bytes, flags, and how it was mapped at that time
        self.on_elapsed: Callable[[], None] = lambda: None  # called where the time between two events is asked for
        self.calls: list[str] = []
        self.num_events = 0  # that were made
        self.properties = SimpleNamespace(
            uuid="11111111-2222-3333-4444-555555555555", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0
        )
        self._current = FakeStream(self)
        self._streams = [self._current]

    @property
    def now_s(self) -> float:
        return self._clock() - self._started_s + self._ahead_s

    def advance_to(self, instant_s: float) -> None:
        self._ahead_s += max(0.0, instant_s - self.now_s)

    # -- what torch.cuda has ------------------------------------------------------------------------------------

    def mem_get_info(self, _: object) -> tuple[int, int]:
        return self.driver_free_bytes - self.cached_bytes, self.total_bytes

    def memory_reserved(self, _: object) -> int:
        return self.cached_bytes

    def memory_allocated(self, _: object) -> int:
        return 0

    def Stream(self, _: object) -> FakeStream:  # noqa: N802  (torch's name)
        self._streams.append(FakeStream(self))
        return self._streams[-1]

    def Event(self, enable_timing: bool = False) -> FakeEvent:  # noqa: N802
        self.num_events += 1
        return FakeEvent(self, enable_timing)

    def current_stream(self, _: object) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            stream.free_at_s = max(stream.free_at_s, self.now_s) + self.use_s
            self._current = before

    def synchronize(self, _: object) -> None:
        self.calls.append("synchronize")
        self.advance_to(max(stream.free_at_s for stream in self._streams))

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.cached_bytes = 0

    def get_device_properties(self, _: object) -> SimpleNamespace:
        return self.properties

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        mapped = how_mapped(address)
        status = self.registration_status
        if status == SUCCESS and flags & _READ_ONLY:
            status = NOT_SUPPORTED  # by discrete cards
        if status == SUCCESS and "w" not in mapped:
            status = INVALID_VALUE  # without that flag it asks for write access
        if status == SUCCESS:
            self.registered[address] = (num_bytes, flags, mapped)
        return status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return SUCCESS if self.registered.pop(address, None) else INVALID_VALUE

    def check_error(self, status: int) -> None:
        if status != SUCCESS:
            raise RuntimeError(f"CUDA error {status}")


class FakeTorch:
    """Stands for torch where `CudaDevice` looks it up; `torch.cuda` is the fake, and its device the CPU."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.is_out_of_memory = False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, kind: str, index: int) -> torch.device:
        assert kind == "cuda"
        return _CPU

    def empty(self, size: int, **kwargs: Any) -> torch.Tensor:
        if self.is_out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        raw = torch.empty(size + 256, **kwargs)  # aligned, as a GPU's memory is
        offset = -raw.data_ptr() % 256
        return raw[offset : offset + size]


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeTorch:
    """From now on `CudaDevice` runs on `cuda`."""
    fake = FakeTorch(cuda)
    monkeypatch.setattr(cuda_module, "torch", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return fake


def how_mapped(address: int) -> str:
    """Permissions of this process's mapping at `address`, as the kernel lists them: `rw-s` and the like."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split(maxsplit=2)
        start, _, end = span.partition("-")
        if int(start, 16) <= address < int(end, 16):
            return permissions
    raise ValueError(f"nothing is mapped at {ctypes.c_void_p(address)}")
