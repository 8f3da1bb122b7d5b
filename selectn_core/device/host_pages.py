"""Pages of host memory for a link, mapped here: torch's own allocator of pinned memory rounds up to powers of two."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

import torch

from selectn_core.device.alignment import align_up

_LIBC = ctypes.CDLL(None, use_errno=True)


def whole_pages(num_bytes: int) -> int:
    """Bytes that `num_bytes` take in pages of their own."""
    return align_up(max(1, num_bytes), mmap.PAGESIZE)


def anonymous_pages(num_bytes: int) -> torch.Tensor:
    """Zeroed memory uint8 [num_bytes] that begins a page; the pages are there when they are first touched.

    In huge pages where the kernel gives them, as weights are read whole.
    """
    raw = mmap.mmap(-1, whole_pages(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        raw.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(raw, dtype=torch.uint8)[:num_bytes]


@contextlib.contextmanager
def writable(memory: torch.Tensor) -> Iterator[None]:
    """Meanwhile the pages of `memory`, a read-only mapping, may be written; afterwards they may only be read again.

    Raises OSError where that is not allowed: the file was not opened for writing.
    """
    _protect(memory, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield
    finally:
        _protect(memory, mmap.PROT_READ)


def _protect(memory: torch.Tensor, protection: int) -> None:
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(whole_pages(memory.nbytes))
    if _LIBC.mprotect(address, size, protection) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
