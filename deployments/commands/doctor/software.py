"""Versions, the device and the model: whether what is installed and configured can be served at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.protocol.node_reports import NvmlInfo
from deployments.commands.doctor.findings import Finding, error, gib, note, ok, warning
from deployments.commands.doctor.subject import Subject
from deployments.config import AppArgs
from selectn_core.errors import ConfigError
from selectn_core.weights.embedded_model import cache_directory, embedded_weights

SHOWN = ("ray", "torch", "transformers", "nvidia-ml-py")


def check_versions(subject: Subject) -> Iterator[Finding]:
    """Python and every package against the ranges of pyproject.toml."""
    machine = subject.machine
    wanted = machine.requirements()
    wrong = [each for line in wanted.packages if (each := _wrong(Requirement(line), machine.version_of)) is not None]
    if not SpecifierSet(wanted.python).contains(machine.python, prereleases=True):
        wrong.append(error("versions", f"Python {machine.python}, and {wanted.python} is needed", "use another Python"))
    yield from wrong
    if not wrong:
        shown = ", ".join(f"{name} {machine.version_of(name)}" for name in SHOWN)
        yield ok("versions", f"Python {machine.python}, {shown}: within the ranges of pyproject.toml")


def _wrong(requirement: Requirement, version_of: Callable[[str], str | None]) -> Finding | None:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    version = version_of(requirement.name)
    install = f"pip install -c constraints.txt '{requirement}'"
    if version is None:
        return error("versions", f"{requirement.name} is not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{requirement.name} {version}, and {requirement.specifier} is needed"
        return error("versions", found, install)
    return None


def check_device(subject: Subject) -> Iterator[Finding]:
    """CUDA, or the emulated device in its place; and GPUs that are in trouble."""
    driver, cuda = subject.node.nvml, subject.cuda
    num_gpus = driver.num_gpus if isinstance(driver, NvmlInfo) else 0
    for gpu in subject.node.gpus:
        if gpu.trouble is not None:
            found = f"GPU {gpu.index}: {gpu.trouble.cause.replace('_', ' ')} ({gpu.trouble.detail})"
            yield error("device", found, "docs/telemetry.md says what each state means")
    names = ", ".join(f"{name}, {gib(total)}" for name, total in cuda.devices)
    seen = f"torch finds {names}" if names else f"torch finds no CUDA device (its build: CUDA {cuda.build or 'none'})"
    seen += f"; the driver{_driver_version(driver)} has {num_gpus} GPUs" if num_gpus else ""
    for args in subject.apps:
        yield _device_for(args, seen, has_cuda=bool(cuda.devices), num_gpus=num_gpus)
    if not subject.apps:
        yield note("device", seen)


def _driver_version(driver: object) -> str:
    version = getattr(driver, "driver_version", None)
    return f" {version}" if isinstance(version, str) else ""


def _device_for(args: AppArgs, seen: str, *, has_cuda: bool, num_gpus: int) -> Finding:
    kind = args.device.kind
    if kind == "emulated":
        return note("device", f"device.kind is emulated: times are those of an emulation; {seen}")
    if has_cuda:
        return ok("device", seen)
    advice = "install a CUDA build of torch, and see that CUDA_VISIBLE_DEVICES and the container pass the GPUs"
    if kind == "cuda":
        return error(
            "device", f"device.kind is cuda, and {seen}", advice if num_gpus else "set device.kind to emulated"
        )
    if num_gpus:
        return warning("device", f"device.kind is auto, and {seen}: a replica without Ray's GPUs is emulated", advice)
    return note("device", f"{seen}: with device.kind auto a replica on this machine is emulated")


def check_model(subject: Subject) -> Iterator[Finding]:
    """Where the model is, and whether what a first start makes can be kept. Downloads nothing."""
    for args in subject.apps:
        yield _model(args.model.source)
    cache = cache_directory()
    there = next(each for each in (cache, *cache.parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield error("cache", f"{cache} cannot be written", "set SELECTN_CACHE_DIR to a directory of this user")
    else:
        yield ok("cache", str(cache))


def _model(source: str) -> Finding:
    if source == "embedded":
        try:
            return ok("model", str(embedded_weights()))
        except ConfigError as reason:
            return error("model", "the embedded model is not installed", str(reason))
    if Path(os.path.expanduser(source)).exists():  # noqa: PTH111 -- raises nothing
        return ok("model", source)
    if source.startswith(("/", ".", "~")):
        return error("model", f"model.source={source!r}: there is no such file or directory", "correct the path")
    return note("model", f"{source} is a hub id: it is downloaded, unless it is in the hub's cache")
