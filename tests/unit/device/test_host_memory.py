"""How much host memory may be used: the tightest of cgroup v2, cgroup v1 and the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from selectn_core.device.host_memory import available_host_memory, free_bytes, is_in_memory, memory_pressure

GIB = 1 << 30
MACHINE_TOTAL_BYTES = 128 * GIB
NO_LIMIT_V1 = 9223372036854771712


class FakeMachine:
    """A /proc that describes cgroup hierarchies mounted in a directory of the test."""

    def __init__(self, root: Path, *, available_bytes: int) -> None:
        self.proc, self.mounts = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(
            f"MemTotal: {MACHINE_TOTAL_BYTES >> 10} kB\nMemAvailable: {available_bytes >> 10} kB\n"
        )
        (self.proc / "self" / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
        (self.proc / "self" / "cgroup").write_text("")

    def v2(self, own: str, *, mounted: str = "/") -> None:
        self._mount("cgroup2", "v2", "cgroup2 rw", mounted)
        self._own(f"0::{own}")

    def v1(self, own: str) -> None:
        self._mount("cgroup", "cpu", "cgroup rw,cpu", "/")
        self._mount("cgroup", "memory", "cgroup rw,memory", "/")
        self._own(f"5:cpu,cpuacct:/elsewhere\n4:memory:{own}")

    def limit_v2(self, path: str, limit: object, used_bytes: int, cached_bytes: int = 0) -> None:
        stat = f"anon 5\nfile 7\ninactive_file {cached_bytes}\nactive_file 0"
        self._write("v2", path, {"memory.max": limit, "memory.current": used_bytes, "memory.stat": stat})

    def limit_v1(self, path: str, limit_bytes: int, used_bytes: int, cached_bytes: int = 0) -> None:
        stat = f"inactive_file 3\ntotal_inactive_file {cached_bytes}\ntotal_active_file 0"
        values = {"memory.limit_in_bytes": limit_bytes, "memory.usage_in_bytes": used_bytes, "memory.stat": stat}
        self._write("memory", path, values)

    def _mount(self, kind: str, name: str, source_and_options: str, mounted: str) -> None:
        (self.mounts / name).mkdir(parents=True, exist_ok=True)
        with (self.proc / "self" / "mountinfo").open("a") as file:
            # Some mounts have optional fields before the dash.
            file.write(f"31 22 0:28 {mounted} {self.mounts / name} rw shared:9 - {kind} {source_and_options}\n")

    def _own(self, lines: str) -> None:
        with (self.proc / "self" / "cgroup").open("a") as file:
            file.write(f"{lines}\n")

    def _write(self, name: str, path: str, values: dict[str, object]) -> None:
        directory = self.mounts / name / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for file, value in values.items():
            (directory / file).write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path) -> FakeMachine:
    return FakeMachine(tmp_path, available_bytes=100 * GIB)


def test_without_cgroups_it_is_what_the_machine_has_left(machine) -> None:
    memory = available_host_memory(machine.proc)
    assert (memory.available_bytes, memory.limited_by) == (100 * GIB, "the machine's free memory")
    assert memory.limit_bytes == MACHINE_TOTAL_BYTES


def test_a_v2_limit_counts_less_what_is_used_page_cache_aside(machine) -> None:
    machine.v2("/pod/container")
    machine.limit_v2("/pod/container", 8 * GIB, 6 * GIB, cached_bytes=3 * GIB)
    memory = available_host_memory(machine.proc)
    assert (memory.available_bytes, memory.limit_bytes) == (5 * GIB, 8 * GIB)
    assert memory.limited_by.endswith("/pod/container/memory.max")


def test_a_v2_ancestor_may_be_tighter(machine) -> None:
    machine.v2("/pod/container")
    machine.limit_v2("/pod", 4 * GIB, 3 * GIB)
    machine.limit_v2("/pod/container", "max", 2 * GIB)
    memory = available_host_memory(machine.proc)
    assert memory.available_bytes == GIB
    assert memory.limited_by.endswith("/pod/memory.max")


@pytest.mark.parametrize(("own", "mounted"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/../other", "/")])
def test_in_a_container_the_mount_is_its_own_cgroup(machine, own, mounted) -> None:
    machine.v2(own, mounted=mounted)
    machine.limit_v2("/", 2 * GIB, GIB)
    assert available_host_memory(machine.proc).available_bytes == GIB


def test_more_in_use_than_allowed_is_none_left(machine) -> None:
    machine.v2("/a")
    machine.limit_v2("/a", GIB, 2 * GIB)
    assert available_host_memory(machine.proc).available_bytes == 0


def test_v1_limits_and_ancestors(machine) -> None:
    machine.v1("/docker/abc")
    machine.limit_v1("/", NO_LIMIT_V1, 50 * GIB)
    machine.limit_v1("/docker", 9 * GIB, 7 * GIB, cached_bytes=GIB)
    machine.limit_v1("/docker/abc", 9 * GIB, 2 * GIB)
    memory = available_host_memory(machine.proc)
    assert memory.available_bytes == 3 * GIB
    assert memory.limited_by.endswith("memory/docker/memory.limit_in_bytes")


def test_v1_without_a_limit_is_what_the_machine_has_left(machine) -> None:
    machine.v1("/docker/abc")
    machine.limit_v1("/docker/abc", NO_LIMIT_V1, GIB)
    assert available_host_memory(machine.proc).available_bytes == 100 * GIB


def test_on_a_mixed_machine_the_tightest_counts(machine) -> None:
    machine.v1("/a")
    machine.v2("/b")
    machine.limit_v1("/a", 30 * GIB, 0)
    machine.limit_v2("/b", 20 * GIB, 0)
    assert available_host_memory(machine.proc).available_bytes == 20 * GIB


class TestPressure:
    MACHINES = "some avg10=1.50 avg60=0.50 avg300=0.00 total=2500000\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=9\n"
    OWN = MACHINES.replace("avg10=1.50", "avg10=7.00")

    def test_it_is_the_machines_where_the_cgroup_has_none(self, machine) -> None:
        machine.v1("/a")
        (machine.proc / "pressure").mkdir()
        (machine.proc / "pressure" / "memory").write_text(self.MACHINES)
        pressure = memory_pressure(machine.proc)
        assert (pressure.some_avg10_percent, pressure.some_avg60_percent, pressure.some_total_s) == (1.5, 0.5, 2.5)
        assert (pressure.full_avg10_percent, pressure.full_total_s) == (0.25, 9e-6)
        assert pressure.scope.endswith("/pressure/memory")

    def test_a_v2_cgroups_own_comes_first(self, machine) -> None:
        machine.v2("/a")
        machine.limit_v2("/a", "max", 0)
        (machine.mounts / "v2" / "a" / "memory.pressure").write_text(self.OWN)
        pressure = memory_pressure(machine.proc)
        assert pressure.some_avg10_percent == 7
        assert pressure.scope.endswith("/v2/a/memory.pressure")

    def test_a_kernel_without_it_is_an_error_that_names_the_file(self, machine) -> None:
        with pytest.raises(FileNotFoundError, match="pressure/memory"):
            memory_pressure(machine.proc)


def test_this_machine_can_be_asked(tmp_path) -> None:
    assert available_host_memory().available_bytes > 0
    assert free_bytes(tmp_path) > 0


def test_what_is_in_memory_and_what_is_not_is_told_apart() -> None:
    assert is_in_memory(Path("/dev/shm"))
    assert not is_in_memory(Path("/proc/self"))
