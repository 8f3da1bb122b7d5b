"""Limits of processes: pages that may be locked, files, processes and threads, CPUs."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from deployments.commands.doctor.findings import Finding, error, gib, note, ok, warning
from deployments.commands.doctor.memory import pinned_bytes
from deployments.commands.doctor.subject import Subject
from selectn_core.device.host_memory import cgroup_directories

# Every stream is a connection to a proxy, one from there to an ingress, and Ray's processes connect to each other.
LEAST_FILES, GOOD_FILES = 4096, 65_536
# Ray starts a worker process per CPU, each with some tens of threads, and Serve a few more.
THREADS_PER_CPU, THREADS_BESIDE = 40, 300


def check_locked_memory(subject: Subject) -> Iterator[Finding]:
    """RLIMIT_MEMLOCK against what copies to a GPU are made from: the host store, and KV of preempted requests."""
    limit = subject.machine.limit(resource.RLIMIT_MEMLOCK).soft
    if limit is None:
        yield ok("locked memory", "unlimited")
        return
    found = f"RLIMIT_MEMLOCK is {gib(limit)}"
    if not any(subject.kind(args) == "cuda" for args in subject.apps):
        yield ok("locked memory", f"{found}; an emulated device locks no pages")
        return
    needed = [pinned_bytes(subject, args) for args in subject.apps]
    known = sum(each for each in needed if each is not None)
    if None not in needed and known <= limit:
        yield ok("locked memory", f"{found}, of which {gib(known)} are needed")
        return
    wanted = f"{gib(known)}{' and the weights' if None in needed else ''}"
    do = "LimitMEMLOCK=infinity in a systemd unit, `--ulimit memlock=-1` for Docker, `ulimit -l unlimited` in a shell"
    yield warning("locked memory", f"{found}, and {wanted} may have to be locked: some drivers count it", do)


def check_files(subject: Subject) -> Iterator[Finding]:
    """RLIMIT_NOFILE. Ray raises the soft limit to the hard one."""
    limit = subject.machine.limit(resource.RLIMIT_NOFILE)
    found = f"RLIMIT_NOFILE is {limit.soft}, at most {limit.hard}"
    if limit.hard is not None and limit.hard < LEAST_FILES:
        do = f"LimitNOFILE={GOOD_FILES} in a systemd unit, `--ulimit nofile={GOOD_FILES}` for Docker"
        yield warning("files", f"{found}: connections are refused when it is reached", do)
    elif limit.soft is not None and limit.soft < LEAST_FILES:
        yield note("files", f"{found}; Ray raises its own", f"`ulimit -n {GOOD_FILES}` for other processes")
    else:
        yield ok("files", found)


def check_processes(subject: Subject) -> Iterator[Finding]:
    """RLIMIT_NPROC and the cgroups' pids.max against the threads that Ray will start."""
    machine = subject.machine
    wanted = THREADS_BESIDE + THREADS_PER_CPU * machine.num_cpus
    rooms = list(_room_for_threads(subject))
    if not rooms:
        yield ok("processes", "no limit of processes and threads")
        return
    room, limited_by = min(rooms)
    found = f"{max(0, room)} more processes and threads may be started ({limited_by}); Ray takes about {wanted}"
    do = "LimitNPROC and TasksMax in a systemd unit, `--pids-limit` for Docker, podPidsLimit of the kubelet"
    if room < wanted / 4:
        yield error("processes", found, do)
    elif room < wanted:
        yield warning("processes", found, do)
    else:
        yield ok("processes", found)


def _room_for_threads(subject: Subject) -> Iterator[tuple[int, str]]:
    machine = subject.machine
    limit = machine.limit(resource.RLIMIT_NPROC).soft
    if limit is not None and machine.uid != 0:  # which root is not held to
        yield limit - _threads_of(machine.proc, machine.uid), "RLIMIT_NPROC"
    for kind, controller in (("cgroup2", ""), ("cgroup", "pids")):
        for directory in cgroup_directories(machine.proc, kind, controller):
            most = _text(directory / "pids.max")
            if most is not None and most != "max":
                yield int(most) - int(_text(directory / "pids.current") or 0), str(directory / "pids.max")


def _threads_of(proc: Path, uid: int) -> int:
    """Threads of this user's processes, as far as they can be seen."""
    total = 0
    for status in proc.glob("[0-9]*/status"):
        fields = dict(line.split(":", 1) for line in (_text(status) or "").splitlines() if ":" in line)
        if fields.get("Uid", "-1").split()[0] == str(uid):
            total += int(fields.get("Threads", "0"))
    return total


def check_cpus(subject: Subject) -> Iterator[Finding]:
    """A cgroup's CPU quota against the CPUs that are seen: libraries start a thread for each of these."""
    machine = subject.machine
    quotas = list(_quotas(machine.proc))
    quota, where = min(quotas, default=(float(machine.num_cpus), ""))
    if not quotas or quota >= machine.num_cpus:
        yield ok("cpus", f"{machine.num_cpus} CPUs, without a lower quota")
        return
    found = f"a quota of {quota:g} CPUs ({where}), and {machine.num_cpus} are seen"
    emulated = [args for args in subject.apps if subject.kind(args) == "emulated"]
    threads = max((args.device.compute_threads or max(1, machine.num_cpus - 1) for args in emulated), default=0)
    if threads > max(1.0, quota):
        do = f"set device.compute_threads to {max(1, int(quota) - 1)}, and give Ray `num-cpus`"
        yield warning("cpus", f"{found}: {threads} threads compute, and are stopped when it is used up", do)
    else:
        yield note("cpus", found, "give Ray `num-cpus`, and libraries OMP_NUM_THREADS")


def _quotas(proc: Path) -> Iterator[tuple[float, str]]:
    for directory in cgroup_directories(proc, "cgroup2", ""):
        words = (_text(directory / "cpu.max") or "max").split()
        if words[0] != "max":
            yield int(words[0]) / int(words[1]), str(directory / "cpu.max")
    for directory in cgroup_directories(proc, "cgroup", "cpu"):
        quota, period = (_text(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period is not None and int(quota) > 0:
            yield int(quota) / int(period), str(directory / "cpu.cfs_quota_us")


def _text(path: Path) -> str | None:
    """What a file of /proc or of a cgroup says; None: there is none, or its process has ended."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
