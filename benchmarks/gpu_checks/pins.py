"""Whether the driver locks the host memory that copies come from, how, and what the accounts say it takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu_checks.finding import Finding, failed, noted
from selectn_core.device import Device
from selectn_core.errors import PinningRefused
from selectn_core.weights.shared_store import map_read_only

CHECK = "registration"
NUM_BYTES = 64 << 20
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE
_READ_ONLY_SUPPORTED = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED

FlagsOf = Callable[[torch.Tensor], int | None]


def check_registration(
    device: Device, flags_of: FlagsOf, *, memory_dir: Path = Path("/dev/shm"), disk_dir: Path | None = None
) -> list[Finding]:
    """Private memory, a mapping in memory as a shared store is, and one that a disk backs, which may be refused."""
    findings = [_private(device, flags_of)]
    with _mapped_file(memory_dir) as memory:
        findings.append(_registered(device, memory, flags_of, "a shared store in memory", is_needed=True))
    with _mapped_file(disk_dir) as memory:
        findings.append(_registered(device, memory, flags_of, "a shared store on a disk", is_needed=False))
    return findings


def _private(device: Device, flags_of: FlagsOf) -> Finding:
    name, before = "private memory", device.host_allocated_bytes
    try:
        memory = device.allocate_host(NUM_BYTES + 1)
    except PinningRefused as error:
        return failed(CHECK, name, str(error))
    taken = device.host_allocated_bytes - before
    figure = f"locked, {_named(flags_of(memory))}, {taken / (NUM_BYTES + 1):.4f} bytes taken for each asked for"
    return Finding(check=CHECK, name=name, figure=figure, holds=taken < 1.01 * NUM_BYTES)


def _registered(device: Device, memory: torch.Tensor, flags_of: FlagsOf, name: str, *, is_needed: bool) -> Finding:
    """Where it is not needed, a refusal is only noted: weights go to private memory then."""
    try:
        device.register_host(memory)
    except PinningRefused as error:
        return failed(CHECK, name, str(error)) if is_needed else noted(CHECK, name, str(error))
    flags = flags_of(memory)
    is_portable = flags is None or bool(flags & _PORTABLE)
    device.unregister_host(memory)
    return Finding(check=CHECK, name=name, figure=f"locked, {_named(flags)}", holds=is_portable)


@contextlib.contextmanager
def _mapped_file(parent: Path | None) -> Iterator[torch.Tensor]:
    """uint8 [NUM_BYTES], mapped as a process maps a shared store: read-only, of a file that is open for writing."""
    with TemporaryDirectory(prefix="selectn-gpu-check-", dir=parent) as folder:
        fd = os.open(Path(folder) / "store", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, NUM_BYTES)
            yield map_read_only(fd, NUM_BYTES)
        finally:
            os.close(fd)


def _named(flags: int | None) -> str:
    return "flags unknown" if flags is None else f"flags {flags} ({'' if flags & _PORTABLE else 'not '}portable)"


# -- what the driver says ---------------------------------------------------------------------------------------------


def driver_flags(memory: torch.Tensor) -> int | None:
    """The flags that memory is locked with; None where the driver does not say."""
    flags = ctypes.c_uint()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuMemHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(memory.data_ptr())) == 0:
            return flags.value
    return None


def read_only_support(index: int = 0) -> Finding:
    """Whether the card could lock read-only memory: discrete ones cannot, and nothing here needs it."""
    value = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), _READ_ONLY_SUPPORTED, index) == 0:
            return noted(CHECK, "read-only registration", "supported" if value.value else "unsupported", value.value)
    return noted(CHECK, "read-only registration", "the driver does not say")
