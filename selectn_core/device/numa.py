"""NUMA: which node a PCI device is on, and memory on a node, or on all in turn. On a machine with one node, nothing.

By system calls, as glibc has no functions for them. Where they are refused (a container's seccomp profile, another
architecture), memory stays where the kernel puts it, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from selectn_core.device.host_pages import whole_pages
from selectn_core.device.numa_nodes import SYS, node_of_pci, nodes

__all__ = ["node_of_pci", "nodes", "on_all_nodes", "prefer_node"]

logger = logging.getLogger(__name__)

_NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237},
}
_DEFAULT, _PREFERRED, _INTERLEAVE = 0, 1, 3
_LIBC = ctypes.CDLL(None, use_errno=True)


def prefer_node(memory: torch.Tensor, node: int) -> None:
    """Pages of `memory`, which begins one, come from `node` while it has any: before they are first touched."""
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_ulong(whole_pages(memory.nbytes))
    _try("mbind", address, size, _PREFERRED, *_mask([node]), 0)


@contextlib.contextmanager
def on_all_nodes(sys: Path = SYS) -> Iterator[None]:
    """Pages that this thread is the first to touch meanwhile come from all nodes in turn, those of files too.

    For what processes on all nodes read. A policy that the thread has already (numactl) stays.
    """
    known = nodes(sys)
    if len(known) < 2 or not _has_default_policy() or not _try("set_mempolicy", _INTERLEAVE, *_mask(known)):
        yield
        return
    try:
        yield
    finally:
        _try("set_mempolicy", _DEFAULT, None, 0)


def _has_default_policy() -> bool:
    mode = ctypes.c_int(-1)
    return _try("get_mempolicy", ctypes.byref(mode), None, 0, None, 0) and mode.value == _DEFAULT


def _mask(numbers: Sequence[int]) -> tuple[ctypes.Array[ctypes.c_ulong], ctypes.c_ulong]:
    """A node mask and its length in bits, as the kernel wants it: it takes one bit fewer than it is told."""
    words = [0] * (max(numbers) // 64 + 1)
    for number in numbers:
        words[number // 64] |= 1 << number % 64
    return (ctypes.c_ulong * len(words))(*words), ctypes.c_ulong(64 * len(words) + 1)


def _try(name: str, *arguments: object) -> bool:
    error = _call(name, *arguments)
    if error:
        _warn(name, error)
    return not error


def _call(name: str, *arguments: object) -> int:
    """Makes the system call; 0, or what errno says."""
    number = _NUMBERS.get(platform.machine(), {}).get(name)
    if number is None:
        return errno.ENOSYS
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return ctypes.get_errno() if _LIBC.syscall(ctypes.c_long(number), *words) != 0 else 0


@cache  # once for each
def _warn(name: str, error: int) -> None:
    logger.warning("host memory is not placed by NUMA node: %s: %s", name, os.strerror(error))
