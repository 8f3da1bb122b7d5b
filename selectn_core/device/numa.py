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
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from selectn_core.device.host_pages import whole_pages

logger = logging.getLogger(__name__)

_SYS = Path("/sys")
_NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237},
}
_DEFAULT, _PREFERRED, _INTERLEAVE = 0, 1, 3
_LIBC = ctypes.CDLL(None, use_errno=True)


def nodes(sys: Path = _SYS) -> list[int]:
    """The machine's nodes that have memory, ascending; none where the kernel knows of none."""
    found = (re.fullmatch(r"node(\d+)", path.name) for path in (sys / "devices/system/node").glob("node*"))
    numbers = sorted(int(match[1]) for match in found if match)
    return [number for number in numbers if _has_memory(sys / f"devices/system/node/node{number}")]


def _has_memory(node: Path) -> bool:
    try:
        match = re.search(r"MemTotal:\s+(\d+)", (node / "meminfo").read_text())
    except OSError:
        return False
    return match is not None and int(match[1]) > 0


def node_of_pci(address: str, sys: Path = _SYS) -> int | None:
    """The node that the device at `address` (0000:3b:00.0) is on; None where there is one node, or none is known."""
    known = nodes(sys)
    try:
        number = int((sys / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if len(known) > 1 and number in known else None


def prefer_node(memory: torch.Tensor, node: int) -> None:
    """Pages of `memory`, which begins one, come from `node` while it has any: before they are first touched."""
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_ulong(whole_pages(memory.nbytes))
    _try("mbind", address, size, _PREFERRED, *_mask([node]), 0)


@contextlib.contextmanager
def on_all_nodes(sys: Path = _SYS) -> Iterator[None]:
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
