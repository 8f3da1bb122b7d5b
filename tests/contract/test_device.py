"""What the executor relies on, held by every device."""

from __future__ import annotations

import mmap
import os
import random

import pytest
import torch

from selectn_core.device import ALIGNMENT_BYTES, align_up
from selectn_core.errors import DeviceMemoryExceeded
from selectn_core.weights.shared_store import map_read_only
from tests.contract.conftest import CAPACITY_BYTES

KIB = 1 << 10


def host_bytes(device, num_bytes: int, seed: int) -> torch.Tensor:
    memory = device.allocate_host(num_bytes)
    generator = torch.Generator().manual_seed(seed)
    memory.copy_(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator))
    return memory


def test_memory_is_fixed_and_says_what_is_missing(device) -> None:
    assert device.capacity_bytes == CAPACITY_BYTES
    device.allocate(CAPACITY_BYTES - 4 * KIB, "most of it")
    with pytest.raises(DeviceMemoryExceeded, match=r"the rest wants 8,192 .* 4,096 of 1,048,576 are free"):
        device.allocate(8 * KIB, "the rest")
    assert device.free_bytes == 4 * KIB


@pytest.mark.parametrize("num_bytes", [1, 255, 256, 257, 10_000])
def test_allocations_are_aligned_and_rounded_up_in_the_accounts(device, num_bytes) -> None:
    first, second = device.allocate(num_bytes, "first"), device.allocate(num_bytes, "second")
    for memory in (first, second):
        assert memory.shape == (num_bytes,)
        assert memory.dtype == torch.uint8
        assert memory.data_ptr() % ALIGNMENT_BYTES == 0
    assert device.allocated_bytes == 2 * align_up(num_bytes)
    device.free(first)
    device.free(second)
    assert device.allocated_bytes == 0


def test_only_what_was_allocated_can_be_freed_and_only_once(device) -> None:
    memory = device.allocate(KIB, "memory")
    device.free(memory)
    for wrong in (memory, torch.empty(KIB, dtype=torch.uint8, device=device.torch_device)):
        with pytest.raises(ValueError, match="not a tensor that this device has allocated"):
            device.free(wrong)


@pytest.mark.parametrize("seed", range(5))
def test_live_allocations_never_overlap_and_accounts_are_exact(device, seed) -> None:
    chance, live = random.Random(seed), list[torch.Tensor]()
    for _ in range(200):
        if live and chance.random() < 0.5:
            device.free(live.pop(chance.randrange(len(live))))
        else:
            size = chance.randint(1, 64 * KIB)
            if align_up(size) > device.free_bytes:
                continue
            try:
                live.append(device.allocate(size, "memory"))
            except DeviceMemoryExceeded:
                continue  # free, but in pieces
        spans = sorted((memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert device.allocated_bytes == sum(align_up(memory.nbytes) for memory in live)
    for memory in live:
        device.free(memory)
    assert device.allocate(CAPACITY_BYTES, "all of it").nbytes == CAPACITY_BYTES


def test_copies_bring_the_bytes_in_the_order_they_were_issued(device) -> None:
    sources = [host_bytes(device, 96 * KIB, seed) for seed in range(4)]
    target = device.allocate(96 * KIB, "target")
    events = [device.copy_async(source, target) for source in sources]
    for event in events:
        event.synchronize()
    assert all(event.is_done() for event in events)
    assert torch.equal(target.cpu(), sources[-1])


def test_compute_after_wait_sees_the_copy(device) -> None:
    source, target = host_bytes(device, 64 * KIB, 1), device.allocate(64 * KIB, "target")
    device.wait(device.copy_async(source, target))
    assert int(target.long().sum()) == int(source.long().sum())


def test_a_copy_waits_for_the_compute_it_comes_after(device) -> None:
    """What computes on a slot must have read it before the next copy overwrites it."""
    first, second = host_bytes(device, 256 * KIB, 1), host_bytes(device, 256 * KIB, 2)
    slot = device.allocate(256 * KIB, "slot")
    device.wait(device.copy_async(first, slot))
    total = slot.long().sum()
    done = device.copy_async(second, slot, after=device.record())
    done.synchronize()
    assert int(total) == int(first.long().sum())
    assert torch.equal(slot.cpu(), second)


def test_compute_that_waits_for_all_copies_sees_the_last(device) -> None:
    sources, target = [host_bytes(device, 128 * KIB, seed) for seed in range(5)], device.allocate(128 * KIB, "target")
    events = [device.copy_async(source, target) for source in sources]
    all_copied = device.copies_issued()
    device.wait(all_copied)
    assert int(target.long().sum()) == int(sources[-1].long().sum())
    all_copied.synchronize()
    assert all(event.is_done() for event in events)


def test_synchronize_waits_for_all_copies(device) -> None:
    source, target = host_bytes(device, 128 * KIB, 3), device.allocate(128 * KIB, "target")
    events = [device.copy_async(source, target) for _ in range(5)]
    device.synchronize()
    assert all(event.is_done() for event in events)


def test_copies_of_unequal_size_are_refused(device) -> None:
    with pytest.raises(ValueError, match="cannot copy 1024 bytes to 512"):
        device.copy_async(device.allocate_host(1024), device.allocate(512, "target"))


def test_the_link_counts_what_it_carried(device) -> None:
    source, target = host_bytes(device, 32 * KIB, 4), device.allocate(32 * KIB, "target")
    before = device.link_usage()
    for _ in range(3):
        device.copy_async(source, target)
    device.synchronize()
    after = device.link_usage()
    assert after.copied_bytes - before.copied_bytes == 3 * 32 * KIB
    assert after.num_copies - before.num_copies == 3
    assert after.busy_s > before.busy_s
    assert after.bytes_per_s > 0


def test_timestamps_advance_with_compute(device) -> None:
    marks = [device.timestamp()]
    for _ in range(3):
        memory = torch.randn(256, 256, device=device.torch_device)
        (memory @ memory).sum()
        marks.append(device.timestamp())
    device.synchronize()
    times = [mark.since(marks[0]) for mark in marks]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_host_memory_is_aligned_like_device_memory(device) -> None:
    assert device.allocate_host(1000).data_ptr() % ALIGNMENT_BYTES == 0


def test_host_memory_takes_whole_pages_and_is_counted(device) -> None:
    """No more than that: powers of two would be half as much again."""
    device.allocate_host(5 * mmap.PAGESIZE)
    device.allocate_host(2 * mmap.PAGESIZE + 1)
    assert device.host_allocated_bytes == 8 * mmap.PAGESIZE


@pytest.fixture
def shared_page(tmp_path):
    """A page that a file backs, mapped read-only as a shared host store is."""
    path = tmp_path / "page"
    path.write_bytes(bytes(range(256)) * 16)
    fd = os.open(path, os.O_RDWR)
    try:
        yield map_read_only(fd, 4096)
    finally:
        os.close(fd)


def test_registered_memory_can_be_copied_from(device, shared_page) -> None:
    device.register_host(shared_page)
    target = device.allocate(4096, "target")
    device.copy_async(shared_page, target).synchronize()
    assert torch.equal(target.cpu(), shared_page)
    device.unregister_host(shared_page)


def test_only_registered_memory_can_be_unregistered_and_only_once(device, shared_page) -> None:
    device.register_host(shared_page)
    device.unregister_host(shared_page)
    for wrong in (shared_page, torch.empty(4096, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not memory that was registered"):
            device.unregister_host(wrong)


def test_closing_unregisters_what_is_left(device, shared_page) -> None:
    device.register_host(shared_page)
    device.close()
    with pytest.raises(ValueError, match="not memory that was registered"):
        device.unregister_host(shared_page)


def test_closing_twice_is_allowed(device) -> None:
    device.close()
    device.close()
