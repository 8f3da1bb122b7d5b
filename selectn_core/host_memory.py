"""How much host memory this process may still use: its cgroups' limits first, then what the machine has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes that may still be used, and what sets that limit."""

    available_bytes: int
    limited_by: str


def available_host_memory(proc: Path = _PROC) -> HostMemory:
    """The tightest of the limits that apply to this process, its cgroup's ancestors included.

    Page cache counts as available: a cgroup that has just read a checkpoint is full of it and can drop it. Pages of
    shared memory are no page cache in this sense; they count as used, in the cgroup of the process that wrote them.
    """
    limits = [_machine(proc), *_cgroup_v2(proc), *_cgroup_v1(proc)]
    return min(limits, key=lambda limit: limit.available_bytes)


def free_bytes(directory: Path) -> int:
    """Bytes that the file system of `directory` (a tmpfs has a size too) can still take."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _machine(proc: Path) -> HostMemory:
    values = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available_kib = int(values["MemAvailable"].split()[0])
    return HostMemory(available_bytes=available_kib << 10, limited_by="the machine's free memory")


def _cgroup_v2(proc: Path) -> Iterator[HostMemory]:
    for directory in _cgroup_directories(proc, "cgroup2", ""):
        yield from _headroom(directory, "memory.max", "memory.current", ("inactive_file", "active_file"))


def _cgroup_v1(proc: Path) -> Iterator[HostMemory]:
    for directory in _cgroup_directories(proc, "cgroup", "memory"):
        cached = ("total_inactive_file", "total_active_file")
        yield from _headroom(directory, "memory.limit_in_bytes", "memory.usage_in_bytes", cached)


def _headroom(directory: Path, limit: str, usage: str, cached: tuple[str, ...]) -> Iterator[HostMemory]:
    """The limit of one cgroup; nothing where it has none ("max", or v1's number near 2^63, which never is least)."""
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
        available_bytes=max(0, int(text) - used_bytes + reclaimable_bytes), limited_by=f"{directory / limit}"
    )


def _cgroup_directories(proc: Path, kind: str, controller: str) -> Iterator[Path]:
    """This process's cgroup and its ancestors, as far up as they are mounted, in one hierarchy."""
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
