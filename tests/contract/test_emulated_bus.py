"""The emulated link and its bus: paced, shared between processes, and not to be wedged by one that dies."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
import torch

from selectn_core.device.bus import Bus
from selectn_core.device.emulated import EmulatedDevice, EmulatedEvent
from selectn_core.errors import ConfigError, LinkError
from tests.support.paths import ROOT

MIB = 1 << 20
BYTES_PER_S = 200e6


@pytest.fixture
def bus_name() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    Bus.unlink(name)


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process of its own; it says "ready" when it has got to where the test wants it."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_reservations_follow_one_another_at_the_bandwidth() -> None:
    bus = Bus(None, BYTES_PER_S)
    now_ns = time.monotonic_ns()
    spans = [bus.reserve(MIB, ready_ns=now_ns) for _ in range(20)]
    assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] - spans[0][0] == pytest.approx(20 * MIB / BYTES_PER_S * 1e9, rel=1e-6)
    bus.close()


def test_nodes_on_one_machine_may_have_directories_of_their_own(bus_name, tmp_path) -> None:
    code = "import sys; from selectn_core.device.bus import Bus; Bus(sys.argv[1], 1e9); print(Bus.names())"
    environment = {**os.environ, "SELECTN_SHARED_MEMORY": str(tmp_path)}
    names = subprocess.check_output([sys.executable, "-c", code, bus_name], cwd=ROOT, env=environment, text=True)
    assert names == f"{[bus_name]}\n"
    assert Bus.peek(bus_name) is None


def test_a_named_bus_can_be_looked_at_without_joining_it(bus_name) -> None:
    assert Bus.peek(bus_name) is None
    assert bus_name not in Bus.names()
    bus = Bus(bus_name, BYTES_PER_S)
    assert Bus.peek(bus_name) == BYTES_PER_S
    assert bus_name in Bus.names()
    bus.bytes_per_s = 2 * BYTES_PER_S
    with bus._locked_file():  # a process that was stopped there holds nobody up
        assert Bus.peek(bus_name) == 2 * BYTES_PER_S
    bus.close()


def test_a_copy_is_not_done_before_its_bytes_could_have_arrived() -> None:
    with EmulatedDevice(8 * MIB, bytes_per_s=BYTES_PER_S) as device:
        source, target = device.allocate_host(6 * MIB), device.allocate(6 * MIB, "target")
        started_ns = time.monotonic_ns()
        device.copy_async(source, target).synchronize()
        # A lower bound, which no slowness of the machine can break.
        assert time.monotonic_ns() - started_ns >= 6 * MIB / BYTES_PER_S * 1e9
        assert device.link_usage().bytes_per_s == pytest.approx(BYTES_PER_S, rel=1e-3)


def test_a_change_of_bandwidth_holds_from_the_next_chunk(bus_name) -> None:
    mine, other = Bus(bus_name, BYTES_PER_S), Bus(bus_name, 1.0)
    assert other.bytes_per_s == BYTES_PER_S, "the second to open a bus must not change it"
    other.bytes_per_s = BYTES_PER_S / 4
    start, end = mine.reserve(MIB, ready_ns=time.monotonic_ns())
    assert end - start == pytest.approx(4 * MIB / BYTES_PER_S * 1e9, rel=1e-6)
    with pytest.raises(ValueError, match="more than 0"):
        mine.bytes_per_s = 0
    mine.close()
    other.close()


def test_a_bus_that_has_another_bandwidth_says_so_with_both(bus_name, caplog: pytest.LogCaptureFixture) -> None:
    first, alike = Bus(bus_name, 2e9), Bus(bus_name, 2e9)
    private = Bus(None, 1e9)
    assert caplog.messages == []
    other = Bus(bus_name, 50e9)
    (message,) = caplog.messages
    assert "link_gb_per_s=50 " in message
    assert "stays at 2 GB/s" in message
    assert bus_name in message
    for bus in (first, alike, private, other):
        bus.close()


COPY_FOREVER = """
import sys
from selectn_core.device.emulated import EmulatedDevice
device = EmulatedDevice(16 << 20, bytes_per_s=1.0, bus_name=sys.argv[1])
source, target = device.allocate_host(8 << 20), device.allocate(8 << 20, "target")
device.copy_async(source, target).synchronize()
print("ready", flush=True)
while True:
    device.copy_async(source, target).synchronize()
"""


def test_two_processes_share_one_bus_and_a_killed_one_gives_its_part_back(bus_name) -> None:
    with EmulatedDevice(16 * MIB, bytes_per_s=BYTES_PER_S, bus_name=bus_name) as device:
        source, target = device.allocate_host(8 * MIB), device.allocate(8 * MIB, "target")

        def time_of_copies() -> int:
            started_ns = time.monotonic_ns()
            for _ in range(4):
                device.copy_async(source, target).synchronize()
            return time.monotonic_ns() - started_ns

        alone_ns = 4 * 8 * MIB / BYTES_PER_S * 1e9
        other = run_python(COPY_FOREVER, bus_name)
        together_ns = time_of_copies()
        kill(other)
        # Both take a chunk in turn. Again a lower bound: only sharing can make it hold.
        assert together_ns > 1.5 * alone_ns
        start, _ = device.bus.reserve(1, ready_ns=time.monotonic_ns())
        assert start - time.monotonic_ns() < 1e9, "the killed process still holds more than its chunk"
        device.copy_async(source, target).synchronize()


HOLD_LOCK = """
import fcntl, sys, time
from selectn_core.device.bus import Bus
bus = Bus(sys.argv[1], 1.0)
fcntl.flock(bus._fd, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_killed_with_the_lock_does_not_wedge_the_bus(bus_name) -> None:
    bus = Bus(bus_name, BYTES_PER_S)
    kill(run_python(HOLD_LOCK, bus_name))
    start, end = bus.reserve(MIB, ready_ns=time.monotonic_ns())
    assert end > start
    bus.close()


def test_a_timeline_that_makes_no_sense_is_not_believed(bus_name) -> None:
    bus = Bus(bus_name, BYTES_PER_S)
    struct.pack_into("<q", bus._memory, 16, time.monotonic_ns() + 10**18)
    start, _ = bus.reserve(MIB, ready_ns=time.monotonic_ns())
    assert start <= time.monotonic_ns()
    bus.close()


def test_a_bus_without_a_bandwidth_is_refused(bus_name) -> None:
    bus = Bus(bus_name, BYTES_PER_S)
    struct.pack_into("<d", bus._memory, 8, 0.0)
    with pytest.raises(ConfigError, match="holds no valid state"):
        bus.reserve(MIB, ready_ns=0)
    bus.close()


@pytest.mark.parametrize("name", ["", "a/b", "../up", "x" * 65, "with space"])
def test_names_that_are_no_file_names_are_refused(name) -> None:
    with pytest.raises(ConfigError, match=r"device\.bus="):
        Bus(name, BYTES_PER_S)


def test_only_its_owner_can_read_a_named_bus(bus_name) -> None:
    bus = Bus(bus_name, BYTES_PER_S)
    assert os.fstat(bus._fd).st_mode & 0o077 == 0
    bus.close()


def test_a_failed_copy_is_an_error_of_who_waits_for_it_and_of_nothing_else() -> None:
    with EmulatedDevice(4 * MIB, bytes_per_s=50e9) as device:
        source, target = device.allocate_host(MIB), device.allocate(MIB, "target")
        poisoned = device.record()
        assert isinstance(poisoned, EmulatedEvent)
        poisoned.done_ns = "never"  # type: ignore[assignment]  # makes the link's own arithmetic fail
        failed = device.copy_async(source, target, after=poisoned)
        fine = device.copy_async(source, target)
        with pytest.raises(LinkError, match="host-to-device copy failed"):
            device.wait(failed)
        device.wait(fine)
        assert torch.equal(source, target)


def test_a_closed_device_copies_nothing() -> None:
    device = EmulatedDevice(4 * MIB, bytes_per_s=50e9)
    source, target = device.allocate_host(MIB), device.allocate(MIB, "target")
    device.close()
    with pytest.raises(LinkError, match="closed"):
        device.copy_async(source, target)
