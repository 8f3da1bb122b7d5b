"""How much host memory this process may still use: its cgroups' limits first, then what the machine has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Where processes of a node share things: stores of weights, emulated buses. Nodes that are one machine (raylets side by
# side, containers with one /dev/shm) each name a directory of their own, or they share these too.
SHARED_MEMORY = Path(os.environ.get("SELECTN_SHARED_MEMORY", "/dev/shm"))


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes that may still be used, what sets that limit, and how much it allows in all."""

    available_bytes: int
    limit_bytes: int
    limited_by: str


@dataclass(frozen=True, kw_only=True)
class MemoryPressure:
    """How long tasks have waited for memory (the kernel's PSI): percent of the last 10 and 60 s, seconds in all.

    "some": at least one task waited; "full": all of them did. `scope` is the file that says so.
    """

    some_avg10_percent: float
    some_avg60_percent: float
    some_total_s: float
    full_avg10_percent: float
    full_avg60_percent: float
    full_total_s: float
    scope: str


def available_host_memory(proc: Path = _PROC) -> HostMemory:
    """The tightest of the limits that apply to this process, its cgroup's ancestors included.

    Page cache counts as available: a cgroup that has just read a checkpoint is full of it and can drop it. Pages of
    shared memory are no page cache in this sense; they count as used, in the cgroup of the process that wrote them.
    """
    limits = [_machine(proc), *_cgroup_v2(proc), *_cgroup_v1(proc)]
    return min(limits, key=lambda limit: limit.available_bytes)


def memory_pressure(proc: Path = _PROC) -> MemoryPressure:
    """The pressure in this process's v2 cgroup where it has one, else the machine's.

    Raises OSError where the kernel does not keep count of it (built without PSI, or started with psi=0).
    """
    own = next(cgroup_directories(proc, "cgroup2", ""), None)
    paths = [*([own / "memory.pressure"] if own else []), proc / "pressure" / "memory"]
    path = next((each for each in paths if each.exists()), paths[-1])
    return _parse_pressure(path.read_text(), scope=str(path))


def free_bytes(directory: Path) -> int:
    """Bytes that the file system of `directory` (a tmpfs has a size too) can still take."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def is_in_memory(directory: Path, proc: Path = _PROC) -> bool:
    """Whether what is written to `directory` stays in memory: it is on a tmpfs or the like."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split(" ", 1)[0] in ("tmpfs", "ramfs", "hugetlbfs")
    return False


def _machine(proc: Path) -> HostMemory:
    values = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total_bytes, available_bytes = (int(values[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return HostMemory(available_bytes=available_bytes, limit_bytes=total_bytes, limited_by="the machine's free memory")


def _parse_pressure(text: str, *, scope: str) -> MemoryPressure:
    """Two lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, the total in microseconds."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        for field in fields:
            name, _, value = field.partition("=")
            values[f"{kind}_{name}"] = float(value)
    return MemoryPressure(
        some_avg10_percent=values["some_avg10"],
        some_avg60_percent=values["some_avg60"],
        some_total_s=values["some_total"] / 1e6,
        full_avg10_percent=values["full_avg10"],
        full_avg60_percent=values["full_avg60"],
        full_total_s=values["full_total"] / 1e6,
        scope=scope,
    )


def _cgroup_v2(proc: Path) -> Iterator[HostMemory]:
    for directory in cgroup_directories(proc, "cgroup2", ""):
        yield from _left_in(directory, "memory.max", "memory.current", ("inactive_file", "active_file"))


def _cgroup_v1(proc: Path) -> Iterator[HostMemory]:
    for directory in cgroup_directories(proc, "cgroup", "memory"):
        cached = ("total_inactive_file", "total_active_file")
        yield from _left_in(directory, "memory.limit_in_bytes", "memory.usage_in_bytes", cached)


def _left_in(directory: Path, limit: str, usage: str, cached: tuple[str, ...]) -> Iterator[HostMemory]:
    """What one cgroup has left of its limit.

    Nothing where it has none: "max", or v1's number near 2^63, which never is least.
    """
    try:
        text = (directory / limit).read_text().strip()
        if text == "max":
            return
        used_bytes = int((directory / usage).read_text())
        statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # the root cgroup has no limit, nor has one without the memory controller
        return
    reclaimable_bytes = sum(int(statistics.get(name, 0)) for name in cached)
    yield HostMemory(
        available_bytes=max(0, int(text) - used_bytes + reclaimable_bytes),
        limit_bytes=int(text),
        limited_by=f"{directory / limit}",
    )


def cgroup_directories(proc: Path, kind: str, controller: str) -> Iterator[Path]:
    """This process's cgroup and its ancestors, as far up as they are mounted, in one hierarchy.

    `kind` and `controller` are "cgroup2" and "" for v2, or "cgroup" and a controller of v1.
    """
    mount = _mount(proc, kind, controller)
    own = _own_cgroup(proc, controller)
    if mount is None or own is None:
        return
    mount_point, mounted_root = mount
    # In a container the mount may show only this process's part of the hierarchy, or a path from outside of it.
    inside = own.removeprefix(mounted_root.rstrip("/"))
    directory = mount_point / inside.strip("/")
    if not directory.is_dir() or ".." in directory.parts:
        directory = mount_point
    while True:
        yield directory
        if directory == mount_point:
            return
        directory = directory.parent


def _mount(proc: Path, kind: str, controller: str) -> tuple[Path, str] | None:
    """Mount point of a cgroup hierarchy, and which part of it is mounted there."""
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fs_type, _, super_options = after.split(" ", 2)
        if fs_type == kind and (not controller or controller in super_options.split(",")):
            fields = before.split()
            return Path(fields[4]), fields[3]
    return None


def _own_cgroup(proc: Path, controller: str) -> str | None:
    """This process's path in the v2 hierarchy (controller "") or in that of a v1 controller."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None
