"""Host memory: what the configuration needs of it, shared memory, and the limits of cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deployments.commands.doctor.findings import Finding, error, gib, note, ok, warning
from deployments.commands.doctor.records import record_for
from deployments.commands.doctor.subject import Subject
from deployments.config import AppArgs
from selectn_core.device.host_memory import available_host_memory
from selectn_core.weights.store_files import store_name

# What a container of Docker has without --shm-size.
DOCKERS_BYTES = 64 << 20
LARGER = "docker run --shm-size, or in Kubernetes an emptyDir with medium: Memory mounted there"


def store_bytes(subject: Subject, args: AppArgs) -> int | None:
    """What the host copy of the weights takes: by the record, else by the checkpoint's files; None: not known."""
    record = record_for(subject, args).record
    if record is not None:
        return sum(record.unit_bytes) + record.memory.resident_bytes
    directory = subject.machine.checkpoint(args.model)
    files = [] if directory is None else list(directory.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None


def pinned_bytes(subject: Subject, args: AppArgs) -> int | None:
    """Pages that a GPU copies from: the store, and the KV of preempted requests of each replica here."""
    weights = store_bytes(subject, args)
    return None if weights is None else weights + args.num_replicas * _kv_bytes(args)


def _kv_bytes(args: AppArgs) -> int:
    return int(args.host.kv_gib * (1 << 30))


def check_shared_memory(subject: Subject) -> Iterator[Finding]:
    """Where the host store is to be: its file system's free bytes against what the store takes."""
    for args in subject.apps:
        yield _place(subject, args)
    if not subject.apps:
        free = subject.machine.free_bytes(subject.machine.shared_memory)
        yield note("shared memory", f"{subject.machine.shared_memory} has {gib(free)} free")


def _place(subject: Subject, args: AppArgs) -> Finding:
    machine, weights = subject.machine, args.host.weights
    if weights == "private":
        return ok("shared memory", "host.weights is private: the weights are not shared")
    default = machine.files if weights == "file" else machine.shared_memory
    directory = Path(args.host.directory) if args.host.directory else default
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        return _no_place(directory, weights)
    free, needed = machine.free_bytes(directory), store_bytes(subject, args)
    found = f"{directory} has {gib(free)} free"
    if needed is None:
        if free <= DOCKERS_BYTES:
            return warning("shared memory", f"{found}, which no model's weights fit in", f"make it larger: {LARGER}")
        return note("shared memory", f"{found}; what the weights take is not known before `selectn profile`")
    if any(file.stat().st_size >= needed for file in directory.glob(f"{store_name('')}*")):
        return ok("shared memory", f"{found}; a store of weights is there already")
    if needed <= free:
        if weights != "file" and not machine.is_in_memory(directory):
            return warning("shared memory", f"{directory} is no memory: its pages are a disk's", "mount a tmpfs there")
        return ok("shared memory", f"{found}, and the weights take {gib(needed)}")
    return _too_small(f"{found}, and the weights take {gib(needed)}", weights)


def _no_place(directory: Path, weights: str) -> Finding:
    found = f"{directory} is no directory that this user can write to"
    if weights == "auto":
        return warning("shared memory", f"{found}: the weights go to a file in /var/tmp", "set host.directory to one")
    return error("shared memory", found, "set host.directory to one")


def _too_small(found: str, weights: str) -> Finding:
    if weights == "auto":
        return warning("shared memory", f"{found}: they go to a mapped file in /var/tmp", f"make it larger: {LARGER}")
    if weights == "file":
        return error("shared memory", found, "set host.directory to a larger disk")
    return error("shared memory", found, f"make it larger: {LARGER}; or set host.weights to auto")


def check_host_memory(subject: Subject) -> Iterator[Finding]:
    """The tightest limit of this process, cgroups' too, against the store and the KV of every replica here."""
    memory = available_host_memory(subject.machine.proc)
    found = f"{gib(memory.available_bytes)} may be used, limited by {memory.limited_by}"
    for args in subject.apps:
        weights = store_bytes(subject, args)
        if weights is None:
            yield note("host memory", f"{found}; what the weights take is not known before `selectn profile`")
            continue
        copies = args.num_replicas if args.host.weights == "private" else 1
        stored = 0 if args.host.weights == "file" else copies * weights
        needed = stored + args.num_replicas * _kv_bytes(args)
        replicas = "a replica takes" if args.num_replicas == 1 else f"{args.num_replicas} replicas here take"
        found_here = f"{found}, and {replicas} {gib(needed)} for weights and KV"
        if needed <= memory.available_bytes:
            yield ok("host memory", found_here)
        elif stored <= memory.available_bytes:
            yield warning("host memory", found_here, "lower host.kv_gib, or raise the limit")
        else:
            yield error("host memory", found_here, "raise the limit, or set host.weights to file")
    if not subject.apps:
        yield note("host memory", found)
