"""What `CudaDevice` itself decides, on a fake of torch.cuda: the hardware is not here."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selectn_core.device import cuda as cuda_module
from selectn_core.device import numa
from selectn_core.device.cuda import CudaDevice
from selectn_core.errors import DeviceMemoryExceeded, PinningRefused
from selectn_core.weights.shared_store import map_read_only
from tests.standins.fake_cuda import FakeCuda, FakeTorch, how_mapped, install

CAPACITY_BYTES = 1 << 20
PORTABLE = 1


class Clock:
    """Stands still until a test moves it."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cuda(clock) -> FakeCuda:
    return FakeCuda(clock)


@pytest.fixture
def fake_torch(cuda, monkeypatch) -> FakeTorch:
    return install(monkeypatch, cuda)


@pytest.fixture
def device(fake_torch) -> Iterator[CudaDevice]:
    with CudaDevice(CAPACITY_BYTES) as device:
        yield device


def mapped_file(directory: Path, flags: int = os.O_RDWR) -> torch.Tensor:
    """uint8 [10_000], as a process has a shared store."""
    path = directory / "store"
    path.write_bytes(bytes(10_000))
    fd = os.open(path, flags)
    try:
        return map_read_only(fd, 10_000)
    finally:
        os.close(fd)


class TestPins:
    def test_a_shared_mapping_is_locked_while_it_is_writable_and_is_read_only_afterwards(
        self, device, cuda, tmp_path
    ) -> None:
        memory = mapped_file(tmp_path)
        assert how_mapped(memory.data_ptr()) == "r--s"
        device.register_host(memory)
        num_bytes, flags, mapped = cuda.registered[memory.data_ptr()]
        assert (num_bytes, flags) == (3 * mmap.PAGESIZE, PORTABLE)
        assert mapped == "rw-s", "a private mapping would be a copy for every process"
        assert how_mapped(memory.data_ptr()) == "r--s"
        device.unregister_host(memory)
        assert not cuda.registered

    @pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
    def test_pages_that_cannot_be_locked_are_an_error_and_leave_nothing_behind(
        self, device, cuda, tmp_path, flags
    ) -> None:
        cuda.registration_status = 2 if flags == os.O_RDWR else 0
        memory = mapped_file(tmp_path, flags)
        with pytest.raises(PinningRefused, match="error 2" if flags == os.O_RDWR else os.strerror(errno.EACCES)):
            device.register_host(memory)
        assert how_mapped(memory.data_ptr()) == "r--s"
        with pytest.raises(ValueError, match="not memory that was registered"):
            device.unregister_host(memory)

    def test_private_host_memory_is_locked_to_the_page_and_unlocked_at_the_end(self, device, cuda) -> None:
        memory = device.allocate_host(416 * 1000)
        assert cuda.registered[memory.data_ptr()][:2] == (102 * mmap.PAGESIZE, PORTABLE)
        assert device.host_allocated_bytes == 102 * mmap.PAGESIZE < 512 * 1000
        device.close()
        assert not cuda.registered
        assert device.host_allocated_bytes == 0

    def test_private_host_memory_that_cannot_be_locked_is_an_error(self, device, cuda) -> None:
        cuda.registration_status = 2
        with pytest.raises(PinningRefused, match=r"4,096 bytes of pinned host memory .* error 2"):
            device.allocate_host(100)


class TestLinkUsage:
    BYTES_PER_S = 25e9
    NUM_BYTES = 400_000

    def copies(self, device: CudaDevice, cuda: FakeCuda, number: int) -> None:
        cuda.use_s = self.NUM_BYTES / self.BYTES_PER_S
        source, target = device.allocate_host(self.NUM_BYTES), device.allocate(self.NUM_BYTES, "target")
        for _ in range(number):
            device.copy_async(source, target)

    def test_the_bandwidth_is_right_whenever_it_is_read(self, device, cuda, clock) -> None:
        """Bytes that count before their seconds do would make a link look infinite, then twice as fast."""
        self.copies(device, cuda, 4)
        assert (device.link_usage().copied_bytes, device.link_usage().busy_s) == (0, 0)
        for done in range(1, 5):
            clock.now_s += cuda.use_s
            usage = device.link_usage()
            assert (usage.num_copies, usage.copied_bytes) == (done, done * self.NUM_BYTES)
            assert usage.bytes_per_s == pytest.approx(self.BYTES_PER_S, rel=1e-5)

    def test_every_copy_counts_once_though_two_threads_look_at_them(self, device, cuda) -> None:
        self.copies(device, cuda, 2)
        device.synchronize()
        other = threading.Thread(target=device.link_usage)

        def look_too() -> None:
            """While the first thread counts the first copy."""
            cuda.on_elapsed = lambda: None
            other.start()
            other.join(0.2)

        cuda.on_elapsed = look_too
        usage = device.link_usage()
        other.join()
        assert usage == device.link_usage()
        assert (usage.num_copies, usage.busy_s) == (2, pytest.approx(2 * cuda.use_s, rel=1e-5))


class TestEvents:
    def test_those_that_are_not_asked_for_any_more_are_used_again(self, device, cuda) -> None:
        source, target = device.allocate_host(100), device.allocate(100, "target")

        def step() -> None:
            for _ in range(20):
                device.wait(device.copy_async(source, target, after=device.record()))
                device.timestamp()
            device.synchronize()
            device.link_usage()

        step()
        made = cuda.num_events
        for _ in range(5):
            step()
        assert cuda.num_events == made

    def test_one_that_is_still_asked_for_stays_what_it_was(self, device, cuda, clock) -> None:
        source, target = device.allocate_host(100), device.allocate(100, "target")
        first = device.copy_async(source, target)
        before = device.timestamp()
        for _ in range(20):
            clock.now_s += 1.0
            device.synchronize()
            device.link_usage()
            last = device.copy_async(source, target)
            after = device.timestamp()
        assert first.is_done()
        assert not last.is_done()
        assert after.since(before) == pytest.approx(20, rel=0.01)


class TestBudget:
    GIB = 1 << 30

    @pytest.mark.parametrize(("total_gib", "kept_back_bytes"), [(8, GIB), (80, 80 * GIB * 3 // 100)])
    def test_by_default_it_is_what_is_free_but_for_a_gib_or_three_percent(
        self, fake_torch, cuda, total_gib, kept_back_bytes
    ) -> None:
        cuda.total_bytes, cuda.driver_free_bytes = total_gib * self.GIB, (total_gib - 2) * self.GIB
        with CudaDevice() as device:
            assert device.capacity_bytes == cuda.driver_free_bytes - kept_back_bytes

    def test_more_than_that_is_refused_with_what_is_kept_back(self, fake_torch, cuda) -> None:
        with pytest.raises(DeviceMemoryExceeded, match=r"8,589,934,592 are free, of which 1,073,741,824 are kept back"):
            CudaDevice(cuda.driver_free_bytes - self.GIB + 1)

    def test_what_an_earlier_device_left_in_torchs_cache_is_free(self, fake_torch, cuda) -> None:
        cuda.cached_bytes = 3 * self.GIB
        with CudaDevice() as device:
            assert device.capacity_bytes == 7 * self.GIB

    def test_torchs_error_is_ours_and_names_what_it_was_for(self, device, fake_torch, cuda) -> None:
        fake_torch.is_out_of_memory, cuda.driver_free_bytes = True, 1000
        with pytest.raises(DeviceMemoryExceeded, match=r"the KV cache wants 5,000 .* 1,048,576 are free, but 1,000 on"):
            device.allocate(5000, "the KV cache")
        assert device.allocated_bytes == 0

    def test_room_is_what_the_driver_has_and_what_torch_keeps_for_later(self, device, cuda) -> None:
        cuda.driver_free_bytes, cuda.cached_bytes = 1500, 500
        assert cuda.mem_get_info(None)[0] == 1000
        assert device.room_bytes == 1500


class TestWhichGpu:
    def test_its_uuid_is_the_drivers_as_a_mig_slice_is_no_gpu(self, device, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(cuda_module, "_DRIVER", tmp_path)
        assert device.gpu_uuid == "GPU-11111111-2222-3333-4444-555555555555", "where the driver shows nothing"
        (tmp_path / "0000:3b:00.0").mkdir()
        (tmp_path / "0000:3b:00.0" / "information").write_text(
            "Model: \t\t NVIDIA H100\nIRQ:   \t\t 71\nGPU UUID: \t GPU-99999999-aaaa-bbbb-cccc-dddddddddddd\n"
        )
        assert device.gpu_uuid == "GPU-99999999-aaaa-bbbb-cccc-dddddddddddd"

    @pytest.mark.parametrize("node", [None, 1])
    def test_its_host_memory_is_on_its_node(self, fake_torch, cuda, monkeypatch, node) -> None:
        asked: list[str] = []
        preferred: list[tuple[int, int]] = []

        def node_of(address: str) -> int | None:
            asked.append(address)
            return node

        def prefer(memory: torch.Tensor, node: int) -> None:
            assert not cuda.registered, "its pages are there already"
            preferred.append((memory.nbytes, node))

        monkeypatch.setattr(numa, "node_of_pci", node_of)
        monkeypatch.setattr(numa, "prefer_node", prefer)
        with CudaDevice(CAPACITY_BYTES) as device:
            device.allocate_host(5000)
        assert asked == ["0000:3b:00.0"]
        assert preferred == ([] if node is None else [(5000, 1)])


def test_times_are_exact_after_a_day(device, clock) -> None:
    """CUDA's times are float32 of milliseconds: a day after the start of all, one is worth 8 ms."""
    clock.now_s = 86_400.0
    before = device.timestamp()
    clock.now_s += 50e-6
    after = device.timestamp()
    device.synchronize()
    assert after.since(before) == pytest.approx(50e-6, rel=1e-4)


@pytest.mark.usefixtures("fake_torch")
def test_attention_is_not_planned_anew_at_every_length() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    with CudaDevice(CAPACITY_BYTES):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_closed_device_gives_torchs_cache_back_to_the_driver(device, cuda) -> None:
    cuda.calls.clear()
    device.close()
    assert "empty_cache" in cuda.calls
