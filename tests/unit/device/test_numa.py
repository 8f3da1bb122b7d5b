"""Placing host memory by NUMA node: a machine with several nodes is described in files, the system calls are real."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from selectn_core.device import numa
from selectn_core.device.host_pages import anonymous_pages

ADDRESS = "0000:3b:00.0"
DEFAULT, PREFERRED, INTERLEAVE = 0, 1, 3
OF_AN_ADDRESS = 2  # a flag of get_mempolicy


@pytest.fixture(autouse=True)
def warn_anew() -> None:
    numa._warn.cache_clear()


def machine(root: Path, memory_kb: list[int], gpu_node: int | None = None) -> Path:
    """A /sys of nodes with so much memory, and a GPU on one of them."""
    for number, size in enumerate(memory_kb):
        node = root / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "meminfo").write_text(f"Node {number} MemTotal:       {size} kB\nNode {number} MemFree: 5 kB\n")
    if gpu_node is not None:
        device = root / "bus/pci/devices" / ADDRESS
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{gpu_node}\n")
    return root


def policy(address: int | None = None) -> int:
    mode = ctypes.c_int(-1)
    where = (ctypes.c_void_p(address), OF_AN_ADDRESS) if address is not None else (None, 0)
    assert numa._call("get_mempolicy", ctypes.byref(mode), None, 0, *where) == 0
    return mode.value


try:
    policy()
    IS_ALLOWED = True
except AssertionError:
    IS_ALLOWED = False
NEEDS_CALLS = pytest.mark.skipif(not IS_ALLOWED, reason="system calls about NUMA are refused here")


@pytest.mark.parametrize(
    ("memory_kb", "gpu_node", "expected"),
    [([8, 8], 1, 1), ([8, 8], 0, 0), ([8], 0, None), ([8, 8], -1, None), ([8, 8], None, None), ([], 0, None)],
)
def test_the_node_of_a_gpu_is_that_of_its_pci_address(tmp_path, memory_kb, gpu_node, expected) -> None:
    assert numa.node_of_pci(ADDRESS, machine(tmp_path, memory_kb, gpu_node)) == expected


def test_a_node_without_memory_is_none(tmp_path) -> None:
    """A GPU's own memory may be such a node, or that of an accelerator that is switched off."""
    sys = machine(tmp_path, [8, 0, 8], gpu_node=1)
    assert numa.nodes(sys) == [0, 2]
    assert numa.node_of_pci(ADDRESS, sys) is None


@NEEDS_CALLS
def test_memory_prefers_a_node_before_it_is_touched() -> None:
    memory = anonymous_pages(100_000)
    numa.prefer_node(memory, numa.nodes()[0] if numa.nodes() else 0)
    assert policy(memory.data_ptr()) == PREFERRED
    assert policy() == DEFAULT, "other memory of this thread has moved"
    memory.fill_(1)


@NEEDS_CALLS
def test_what_all_read_comes_from_all_nodes_and_the_thread_is_as_before(tmp_path) -> None:
    with numa.on_all_nodes(machine(tmp_path, [8, 8])):
        assert policy() == INTERLEAVE
    assert policy() == DEFAULT


@NEEDS_CALLS
def test_a_policy_that_was_chosen_outside_stays(tmp_path) -> None:
    assert numa._call("set_mempolicy", PREFERRED, *numa._mask([0])) == 0
    try:
        with numa.on_all_nodes(machine(tmp_path, [8, 8])):
            assert policy() == PREFERRED
    finally:
        numa._call("set_mempolicy", DEFAULT, None, 0)


def test_with_one_node_nothing_is_asked_of_the_kernel(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(numa, "_call", lambda *_: pytest.fail("a system call"))
    with numa.on_all_nodes(machine(tmp_path, [8])):
        pass


def test_a_kernel_that_refuses_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(numa, "_call", lambda *_: errno.EPERM)
    sys = machine(tmp_path, [8, 8])
    for _ in range(2):
        with numa.on_all_nodes(sys):
            pass
    (message,) = caplog.messages
    assert "not placed by NUMA node" in message
    assert os.strerror(errno.EPERM) in message


def test_masks_name_nodes_beyond_the_first_word() -> None:
    words, num_bits = numa._mask([1, 70])
    assert (list(words), num_bits.value) == ([2, 1 << 6], 129)
