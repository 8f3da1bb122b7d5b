"""What `args:` in serve_config.yaml may say, checked before anything starts.

The engine's sections are selectn_core's own dataclasses, so there is one list of their fields. Unknown keys
are refused at every level, naming the nearest known one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.node.telemetry import TelemetryConfig
from cluster.services import CoordinationConfig
from selectn_core.bounds import MOST_WHOLE, Bounds, require, require_number
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
from selectn_core.yaml_file import read_yaml

IMPORT_PATH = "deployments.app:build_app"
REPLICA_NAME, INGRESS_NAME = "SelectNReplica", "SelectNIngress"
PORT = Bounds(at_least=0, at_most=65_535)
# Calls that must get through to a replica whose queue is full: health, snapshot, plan changes.
NUM_CONTROL_CALLS = 16
# Callers take a report for stale after 5 s (deployments/routing/shared_board.py), and one may be lost.
MOST_HEADROOM_PERIOD_S = 2.5
_COUNT = Bounds(at_least=1, at_most=1 << 20)
_SECONDS = Bounds(at_least=0, at_most=86_400)
_PERIOD_S = Bounds(above=0, at_most=86_400)
_AMOUNT = Bounds(at_least=0, at_most=1 << 20)
# Of Serve's own settings, wherever they are.
_SERVE_NUMBERS = {
    "port": PORT,
    "num_replicas": _COUNT,
    "request_timeout_s": _SECONDS,
    "keep_alive_timeout_s": _SECONDS,
    "graceful_shutdown_timeout_s": _SECONDS,
    "graceful_shutdown_wait_loop_s": _PERIOD_S,
    "health_check_period_s": _PERIOD_S,
    "health_check_timeout_s": _PERIOD_S,
}
_RESOURCES = {"num_cpus": _AMOUNT, "num_gpus": _AMOUNT, "memory": Bounds(at_least=0, at_most=1 << 60)}
# What objectives that a server finds for itself are taken for where its grace is derived: more than on a small machine.
GRACE_TTFT_S, GRACE_TPOT_S = 10.0, 0.25
LEAST_GRACE_S, MOST_GRACE_S = 10.0, 600.0


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

    A body has `max_body_bytes` at most, and comes within `body_timeout_s`.
    `default_max_tokens` is what a chat request gets that names no max_tokens, if the model's length allows. Of requests
    that find no room `max_queued_requests` wait in each ingress, no longer than `admission_timeout_s`, and with
    `refuse_late` no longer than `slo.ttft_ms` allows. API keys, lines of "name key", are in a file and in an
    environment variable of that name, on the nodes where the ingress runs; without any everybody may ask.
    """

    max_body_bytes: Annotated[int, Bounds(at_least=1024, at_most=1 << 30)] = 4 * 2**20
    body_timeout_s: Annotated[float, Bounds(above=0, at_most=86_400)] = 30.0
    default_max_tokens: Annotated[int, Bounds(at_least=1, at_most=(1 << 31) - 1)] = 256
    max_queued_requests: Annotated[int, Bounds(at_least=0, at_most=1 << 20)] = 256
    admission_timeout_s: Annotated[float, Bounds(above=0, at_most=86_400)] = 30.0
    refuse_late: bool = True
    api_keys_file: str | None = None
    api_keys_env: str | None = None

    @model_validator(mode="after")
    def _require_names(self) -> RequestLimits:
        for name in ("api_keys_file", "api_keys_env"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), f"limits.{name}", value, "some text, or null: no keys")
        return self


class AppArgs(Strict):
    """`args:` of the application. Every key may be left out.

    `max_ongoing_requests` (per replica) None: as many as the engine runs and queues, so that all waiting is
    done where the scheduler sees it. `shutdown_grace_s`: how long requests in flight may go on at shutdown; None: as
    long as an answer of `limits.default_max_tokens` may take within the objectives.
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
    num_replicas: Annotated[int, _COUNT] = 1
    num_ingress_replicas: Annotated[int, _COUNT] = 1
    headroom_period_s: Annotated[float, Bounds(at_least=0.01, at_most=MOST_HEADROOM_PERIOD_S)] = 0.5
    max_ongoing_requests: Annotated[int | None, _COUNT] = None
    shutdown_grace_s: Annotated[float | None, _SECONDS] = None

    @model_validator(mode="after")
    def _require_calls_for_every_request(self) -> AppArgs:
        if self.max_ongoing_requests is not None:
            require_calls(self, "max_ongoing_requests", self.max_ongoing_requests)
        return self

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

    @property
    def resolved_shutdown_grace_s(self) -> float:
        """`shutdown_grace_s`, or what the answers that were admitted may take."""
        if self.shutdown_grace_s is not None:
            return self.shutdown_grace_s
        ttft_s = GRACE_TTFT_S if self.slo.ttft_ms == "auto" else self.slo.ttft_ms / 1e3
        tpot_s = GRACE_TPOT_S if self.slo.tpot_ms == "auto" else self.slo.tpot_ms / 1e3
        return min(max(ttft_s + self.limits.default_max_tokens * tpot_s, LEAST_GRACE_S), MOST_GRACE_S)

    def resolved_max_ongoing_requests(self) -> int:
        """`max_ongoing_requests`, or what the engine holds plus room for control calls."""
        if self.max_ongoing_requests is not None:
            return self.max_ongoing_requests
        return self.batch.max_requests + self.batch.max_waiting + NUM_CONTROL_CALLS


class Changeable(Strict):
    """What `user_config` of the replicas may change while they run; see `deployments/declared.py`."""

    slo: SloConfig
    offload: OffloadConfig


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
        value = problem["input"]
        if problem["type"] == "value_error":  # ours: names the field itself
            lines.append(f"{where}: {message}")
        elif problem["type"] == "number":  # of Bounds: reads as where a section is made without pydantic
            lines.append(f"{where}: {'.'.join(map(str, problem['loc']))}={value!r} is not allowed: {message}")
        else:
            shown = "" if isinstance(value, Mapping | list) else f"{value!r} is not allowed: "
            lines.append(f"{'.'.join([where, *map(str, problem['loc'])])}: {shown}{message}")
    return "\n".join(lines)


def refuse_unknown_keys(section: Any, values: Any, path: str = "") -> None:
    """Raises ConfigError for a key of `values`, at any depth, that `section` has no field for.

    What is no section is left alone: whoever knows its type says what is wrong with it.
    """
    if isinstance(values, list):
        for index, value in enumerate(values):
            refuse_unknown_keys(section, value, f"{path}{index}.")
    if not isinstance(values, Mapping) or section is None:
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


def require_calls(args: AppArgs, name: str, max_ongoing_requests: Any) -> None:
    """Raises ConfigError where Serve would keep requests from an engine that has room for them, or health checks."""
    most = Bounds(at_least=args.batch.max_requests + NUM_CONTROL_CALLS, at_most=1 << 20)
    require_number(name, max_ongoing_requests, bounds=most, is_whole=True)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A serve_config.yaml, checked: every Select-N application's args and user_config are valid.

    Raises ConfigError for a file that cannot be read, is no Serve config, or has a wrong value.
    """
    document = read_yaml(Path(path), ConfigError)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with the key 'applications'")
    refuse_unusable_values(document, where=str(path))
    for app in select_n_applications(document):
        check_application(app, where=str(path))
    _check_serve_schema(document, path)
    return document


def refuse_unusable_values(document: Any, *, where: str) -> None:
    """Raises ConfigError, naming the place, for a value that no setting means: endless, immense, text with NUL."""
    left: list[tuple[str, Any]] = [("", document)]
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left.extend((f"{name}.{key}".removeprefix("."), each) for key, each in value.items())
            texts = [key for key in value if isinstance(key, str)]
        elif isinstance(value, list | tuple):
            left.extend((f"{name}.{index}".removeprefix("."), each) for index, each in enumerate(value))
            continue
        else:
            texts = [value] if isinstance(value, str) else []
        for text in texts:
            require("\0" not in text, f"{where}: {name}", text, "text without NUL")
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_sound = abs(value) <= MOST_WHOLE if isinstance(value, int) else math.isfinite(value)
            require(is_sound, f"{where}: {name}", value, "a finite number, less than 2^63 where it is whole")


def select_n_applications(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The applications of a Serve config that this package builds; ConfigError when there is none."""
    applications = document.get("applications")
    if not isinstance(applications, list) or not all(isinstance(app, dict) for app in applications):
        raise ConfigError("applications: expected a list of applications, each with an import_path")
    ours = [app for app in applications if app.get("import_path") == IMPORT_PATH]
    if not ours:
        raise ConfigError(f"applications: none has import_path {IMPORT_PATH}")
    return ours


def check_application(app: Mapping[str, Any], *, where: str) -> None:
    """Raises ConfigError for what is wrong with a Select-N application's `args:` and `deployments:`."""
    args = parse(AppArgs, app_args(app), where=f"{where}: args")
    route = app.get("route_prefix")  # of another type: Serve says so
    is_route = not isinstance(route, str) or route.startswith("/")
    require(is_route, f"{where}: route_prefix", route, "a path that begins with /, or null")
    for deployment in _deployments(app):
        _check_deployment(deployment, args, where=where)


def app_args(app: Mapping[str, Any]) -> Any:
    """An application's `args:`, to be parsed; {} where there are none."""
    args = app.get("args")
    return {} if args is None else args


def _deployments(app: Mapping[str, Any]) -> list[dict[str, Any]]:
    deployments = app.get("deployments")
    entries = [] if deployments is None else deployments
    if not isinstance(entries, list) or not all(isinstance(each, dict) and "name" in each for each in entries):
        raise ConfigError("deployments: expected a list of deployments, each with a name")
    return entries


def _check_deployment(deployment: Mapping[str, Any], args: AppArgs, *, where: str) -> None:
    """Raises ConfigError for what Serve would take, and this application cannot do."""
    from deployments.declared import declared  # late: it is made of this module

    name, names = deployment["name"], (REPLICA_NAME, INGRESS_NAME)
    if name not in names:
        raise ConfigError(f"{where}: deployments: there is no deployment {name!r}{nearest(str(name), names)}")
    require_waking(deployment.get("autoscaling_config"), where=f"{where}: {name}")
    if name == INGRESS_NAME:
        user_config = deployment.get("user_config")
        require(user_config is None, f"{where}: {name}.user_config", user_config, "none: it has nothing to change")
        return
    declared(args.engine, deployment.get("user_config"), where=f"{where}: user_config")
    if deployment.get("max_ongoing_requests") is not None:
        require_calls(args, f"{where}: {name}.max_ongoing_requests", deployment["max_ongoing_requests"])


def require_waking(autoscaling_config: Any, *, where: str) -> None:
    """Raises ConfigError for an autoscaling that may end the last replica: no request would bring one back."""
    if not isinstance(autoscaling_config, Mapping):
        return
    for key in ("min_replicas", "initial_replicas"):
        value = autoscaling_config.get(key)
        allowed = "at least 1: a request does not start a replica where there is none"
        require(value != 0, f"{where}.autoscaling_config.{key}", value, allowed)


def _check_serve_schema(document: Mapping[str, Any], path: str | Path) -> None:
    # Late: importing Ray takes a second, which `selectn --help` should not.
    from ray.serve.schema import ServeDeploySchema

    try:
        refuse_unknown_keys(ServeDeploySchema, document)  # Serve itself would drop them silently
        schema = ServeDeploySchema.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(describe(error, where=str(path))) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # of Serve's own validators, which import what the file names
        raise ConfigError(f"{path}: Serve cannot read it: {error}") from None
    _check_serve_numbers(schema.model_dump(exclude_unset=True), str(path))


def _check_serve_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a number that Serve would take, and nobody can mean. `values` are what is set."""
    for section in ("http_options", "grpc_options"):
        _check_each(values.get(section), _SERVE_NUMBERS, f"{where}: {section}")
    for app in values["applications"]:
        for deployment in app.get("deployments") or ():
            name, options = deployment["name"], deployment.get("ray_actor_options") or {}
            _check_each(deployment, _SERVE_NUMBERS, f"{where}: {name}")
            _check_each(options, _RESOURCES, f"{where}: {name}.ray_actor_options")
            resources = options.get("resources") or {}
            _check_each(resources, dict.fromkeys(resources, _AMOUNT), f"{where}: {name}.ray_actor_options.resources")


def _check_each(values: Mapping[str, Any] | None, bounds: Mapping[str, Bounds], where: str) -> None:
    for name, each in bounds.items():
        value = (values or {}).get(name)
        if not isinstance(value, str):  # "auto"
            require_number(f"{where}.{name}", value, bounds=each, is_whole=each in (PORT, _COUNT))


def _field_types(section: type) -> dict[str, Any]:
    if is_dataclass(section):
        hints = get_type_hints(section)
        return {each.name: _section_of(hints[each.name]) for each in fields(section)}
    return {name: _section_of(info.annotation) for name, info in section.model_fields.items()}  # type: ignore[attr-defined]


def _section_of(annotation: Any) -> Any:
    """The section type in `Section`, `Section | None`, `tuple[Section, ...]` and the like; None where there is none."""
    if isinstance(annotation, type) and (is_dataclass(annotation) or issubclass(annotation, BaseModel)):
        return annotation
    found = (_section_of(part) for part in get_args(annotation))
    return next((each for each in found if each is not None), None)
