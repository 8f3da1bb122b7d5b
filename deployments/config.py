"""What `args:` in serve_config.yaml may say, checked before anything starts.

The engine's sections are selectn_core's own dataclasses, so there is one list of their fields. Unknown keys
are refused at every level, naming the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.services import CoordinationConfig
from cluster.telemetry import TelemetryConfig
from selectn_core.config import (
    BatchConfig,
    DeviceConfig,
    EngineConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    SloConfig,
)
from selectn_core.errors import ConfigError

IMPORT_PATH = "deployments.app:build_app"
REPLICA_NAME = "SelectNReplica"
# Calls that must get through to a replica whose queue is full: health, snapshot, plan changes.
NUM_CONTROL_CALLS = 16


class Strict(BaseModel):
    """A frozen section whose unknown keys are an error that names the nearest known key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        refuse_unknown_keys(cls, values)
        return values


Section = TypeVar("Section", bound=Strict)


class RequestLimits(Strict):
    """What one HTTP request may ask for, and who may ask.

    `default_max_tokens` is what a chat request gets that names no max_tokens, if the model's length allows. Of requests
    that find no room `max_queued_requests` wait in each ingress, no longer than `admission_timeout_s`, and with
    `refuse_late` no longer than `slo.ttft_ms` allows. API keys, lines of "name key", are in a file and in an
    environment variable of that name, on the nodes where the ingress runs; without any everybody may ask.
    """

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    default_max_tokens: int = Field(default=256, ge=1)
    max_queued_requests: int = Field(default=256, ge=0)
    admission_timeout_s: float = Field(default=30.0, gt=0)
    refuse_late: bool = True
    api_keys_file: str | None = None
    api_keys_env: str | None = None


class AppArgs(Strict):
    """`args:` of the application. Every key may be left out.

    `max_ongoing_requests` (per replica) None: as many as the engine runs and queues, so that all waiting is
    done where the scheduler sees it. `shutdown_grace_s`: how long requests in flight may go on at shutdown.
    `headroom_period_s`: how often replicas report what they can take.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    device: DeviceConfig = Field(default_factory=DeviceConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    offload: OffloadConfig = Field(default_factory=OffloadConfig)
    host: HostConfig = Field(default_factory=HostConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    cluster: CoordinationConfig = Field(default_factory=CoordinationConfig)
    limits: RequestLimits = Field(default_factory=RequestLimits)
    num_replicas: int = Field(default=1, ge=1)
    num_ingress_replicas: int = Field(default=1, ge=1)
    headroom_period_s: float = Field(default=0.5, gt=0)
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    shutdown_grace_s: float = Field(default=10.0, ge=0)

    @property
    def engine(self) -> EngineConfig:
        """The part of the configuration that makes an engine."""
        return EngineConfig(
            model=self.model,
            device=self.device,
            batch=self.batch,
            offload=self.offload,
            host=self.host,
            slo=self.slo,
        )

    def resolved_max_ongoing_requests(self) -> int:
        """`max_ongoing_requests`, or what the engine holds plus room for control calls."""
        if self.max_ongoing_requests is not None:
            return self.max_ongoing_requests
        return self.batch.max_requests + self.batch.max_waiting + NUM_CONTROL_CALLS


class OffloadChange(Strict):
    """`user_config.offload`: a running replica's plan, in its `offload.unit`s. Slots None: as many as there are."""

    num_offloaded: int = Field(ge=0)
    num_slots: int | None = Field(default=None, ge=1)


class ReplicaUserConfig(Strict):
    """`user_config` of the replica deployment: what may change without a restart.

    `slo` has the keys of the `slo` section. `offload` is a plan by hand; without it the policy decides.
    """

    slo: SloConfig | None = None
    offload: OffloadChange | None = None


def parse(section: type[Section], values: Any, *, where: str) -> Section:
    """`values` as a `section`; ConfigError with one line per wrong field otherwise."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, where=where)) from None


def describe(error: ValidationError, *, where: str) -> str:
    """One line per problem: which field, which value, what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if problem["type"] == "value_error":  # ours: names the field itself
            lines.append(f"{where}: {message}")
            continue
        path = ".".join([where, *map(str, problem["loc"])])
        value = problem["input"]
        shown = "" if isinstance(value, Mapping | list) else f"{value!r} is not allowed: "
        lines.append(f"{path}: {shown}{message}")
    return "\n".join(lines)


def refuse_unknown_keys(section: type, values: Any, path: str = "") -> None:
    """Raises ConfigError for a key of `values`, at any depth, that `section` has no field for."""
    if isinstance(values, list):
        for index, value in enumerate(values):
            refuse_unknown_keys(section, value, f"{path}{index}.")
    if not isinstance(values, Mapping):
        return
    known = _field_types(section)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key '{path}{key}'{nearest(str(key), known)}")
        refuse_unknown_keys(known[key], value, f"{path}{key}.")


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of an error message: the known key that `key` was probably meant to be, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(known)}"


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A serve_config.yaml, checked: every Select-N application's args and user_config are valid.

    Raises ConfigError for a file that cannot be read, is no Serve config, or has a wrong value.
    """
    document = _read_yaml(Path(path))
    for app in select_n_applications(document):
        where = f"{path}: args"
        parse(AppArgs, app.get("args") or {}, where=where)
        for deployment in app.get("deployments") or ():
            if deployment.get("name") == REPLICA_NAME and deployment.get("user_config"):
                parse(ReplicaUserConfig, deployment["user_config"], where=f"{path}: user_config")
    _check_serve_schema(document, path)
    return document


def select_n_applications(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The applications of a Serve config that this package builds; ConfigError when there is none."""
    applications = document.get("applications")
    if not isinstance(applications, list) or not all(isinstance(app, dict) for app in applications):
        raise ConfigError("applications: expected a list of applications, each with an import_path")
    ours = [app for app in applications if app.get("import_path") == IMPORT_PATH]
    if not ours:
        raise ConfigError(f"applications: none has import_path {IMPORT_PATH}")
    return ours


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with the key 'applications'")
    return document


def _check_serve_schema(document: Mapping[str, Any], path: str | Path) -> None:
    # Late: importing Ray takes a second, which `selectn --help` should not.
    from ray.serve.schema import ServeDeploySchema

    unknown = set(document) - set(ServeDeploySchema.model_fields)
    for key in sorted(unknown):  # Serve itself would drop them silently
        raise ConfigError(f"{path}: unknown key '{key}'{nearest(key, ServeDeploySchema.model_fields)}")
    try:
        ServeDeploySchema.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(describe(error, where=str(path))) from None


def _field_types(section: type) -> dict[str, Any]:
    if is_dataclass(section):
        hints = get_type_hints(section)
        return {each.name: _section_of(hints[each.name]) for each in fields(section)}
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: _section_of(info.annotation) for name, info in section.model_fields.items()}
    return {}


def _section_of(annotation: Any) -> Any:
    """The section type in `Section`, `Section | None` or `tuple[Section, ...]`."""
    sections = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return next((each for each in sections if is_dataclass(each) or issubclass(each, BaseModel)), object)
