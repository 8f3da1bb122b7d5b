"""The machine as the doctor sees it: every reading is a field, so that a test can describe another machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.node.telemetry import Telemetry, TelemetryConfig
from cluster.protocol.node_reports import NodeTelemetry
from deployments.commands.serving import require_free_port
from selectn_core.config import ModelConfig
from selectn_core.device.host_memory import SHARED_MEMORY, free_bytes, is_in_memory
from selectn_core.errors import ConfigError
from selectn_core.profiling.record_files import cached_records
from selectn_core.weights.embedded_model import converted_directory
from selectn_core.weights.store_files import FILES

# Longer than an agent waits: without a persistent driver NVML takes seconds to start.
DRIVER_DEADLINE_S = 10.0
_PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What pyproject.toml asks for: a range of Python, and lines such as "torch>=2.11"."""

    python: str
    packages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """What torch finds: the CUDA it was built for (None: a build for CPUs), and each device's name and memory."""

    build: str | None = None
    devices: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A resource limit, soft and hard; None: unlimited."""

    soft: int | None
    hard: int | None


def read_requirements() -> Requirements:
    """Of the installed distribution; in a checkout that is not installed, of its pyproject.toml."""
    try:
        requires = importlib.metadata.requires("selectn") or []
        python = importlib.metadata.metadata("selectn")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        requires, python = project["dependencies"], project["requires-python"]
    return Requirements(python=python, packages=tuple(line for line in requires if "extra ==" not in line))


def read_version(package: str) -> str | None:
    """The version that is installed; None: none is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_cuda() -> Cuda:
    """Asks torch, which takes seconds to load, and makes no context on a device."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Cuda(build=torch.version.cuda, devices=tuple((each.name, each.total_memory) for each in devices))


def checkpoint_directory(model: ModelConfig) -> Path | None:
    """The directory with the model's safetensors; None: it has none here, or none yet."""
    try:
        directory = converted_directory() if model.source == "embedded" else Path(os.path.expanduser(model.source))  # noqa: PTH111 -- raises nothing
    except ConfigError:  # it is not installed
        return None
    return directory if (directory / "config.json").is_file() else None


def read_model_hash(model: ModelConfig) -> str | None:
    """What a performance record calls the model, from its checkpoint's configuration; None: that is not here."""
    directory = checkpoint_directory(model)
    if directory is None or model.trust_remote_code:  # whose configuration is code, which is not run here
        return None
    from transformers import AutoConfig

    from selectn_core.engine.fingerprint import model_hash

    return model_hash(AutoConfig.from_pretrained(directory, local_files_only=True))


def read_limit(which: int) -> Limit:
    """One of resource.RLIMIT_*."""
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return Limit(soft=soft, hard=hard)


def sample_node(config: TelemetryConfig) -> NodeTelemetry:
    """The hardware, as a node agent would report it."""
    with Telemetry(replace(config, deadline_s=DRIVER_DEADLINE_S), node_names={socket.gethostname()}) as telemetry:
        return telemetry.sample()


def why_port_is_not_free(host: str, port: int) -> str | None:
    """None where it can be listened on. The port is free again at once."""
    try:
        require_free_port(host, port)
    except ConfigError as reason:
        return str(reason).partition(";")[0]
    return None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The real one by default. No reading starts a process, and none leaves a file behind."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shared_memory: Path = SHARED_MEMORY
    files: Path = FILES
    uid: int = field(default_factory=os.geteuid)
    num_cpus: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = field(default_factory=platform.python_version)
    requirements: Callable[[], Requirements] = read_requirements
    version_of: Callable[[str], str | None] = read_version
    cuda: Callable[[], Cuda] = read_cuda
    sample: Callable[[TelemetryConfig], NodeTelemetry] = sample_node
    limit: Callable[[int], Limit] = read_limit
    free_bytes: Callable[[Path], int] = free_bytes
    is_in_memory: Callable[[Path], bool] = is_in_memory
    why_port_is_not_free: Callable[[str, int], str | None] = why_port_is_not_free
    cached_records: Callable[[], list[Path]] = cached_records
    model_hash: Callable[[ModelConfig], str | None] = read_model_hash
    checkpoint: Callable[[ModelConfig], Path | None] = checkpoint_directory
