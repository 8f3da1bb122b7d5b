"""What `args:` in serve_config.yaml may say, checked before anything starts.

The engine's sections are selectn_core's own dataclasses, so there is one list of their fields. Unknown keys
are refused at every level, naming the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.node.telemetry import TelemetryConfig
from cluster.services import CoordinationConfig
from selectn_core.bounds import Bounds, require, require_number
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
REPLICA_NAME, INGRESS_NAME = "SelectNReplica", "SelectNIngress"
# Calls that must get through to a replica whose queue is full: health, snapshot, plan changes.
NUM_CONTROL_CALLS = 16
# Callers take a report for stale after 5 s (deployments/routing/shared_board.py), and one may be lost.
MOST_HEADROOM_PERIOD_S = 2.5
COUNT = Bounds(at_least=1, at_most=1 << 20)
# An ingress uses half a core at some 7,000 tokens/s; what generates as many has more cores than this beside it. Two
# such use three quarters of a core of their node's proxy, which is one process (docs/operations.md).
CORES_PER_INGRESS, MOST_INGRESSES_PER_NODE = 16, 2
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
    `refuse_late` no longer than `slo.ttft_ms` allows. The streams of an ingress share `stream_writes_per_s`; null: each
    text is written as it comes. API keys, lines of "name key", are in a file and in an
    environment variable of that name, on the nodes where the ingress runs; without any everybody may ask.
    """

    max_body_bytes: Annotated[int, Bounds(at_least=1024, at_most=1 << 30)] = 4 * 2**20
    body_timeout_s: Annotated[float, Bounds(above=0, at_most=86_400)] = 30.0
    default_max_tokens: Annotated[int, Bounds(at_least=1, at_most=(1 << 31) - 1)] = 256
    max_queued_requests: Annotated[int, Bounds(at_least=0, at_most=1 << 20)] = 256
    admission_timeout_s: Annotated[float, Bounds(above=0, at_most=86_400)] = 30.0
    refuse_late: bool = True
    stream_writes_per_s: Annotated[float | None, Bounds(above=0, at_most=1e6)] = 500.0
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
    `headroom_period_s`: how often replicas report what they can take. `num_ingress_replicas` None: by the cores of the
    cluster's nodes.
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
    num_replicas: Annotated[int, COUNT] = 1
    num_ingress_replicas: Annotated[int | None, COUNT] = None
    headroom_period_s: Annotated[float, Bounds(at_least=0.01, at_most=MOST_HEADROOM_PERIOD_S)] = 0.5
    max_ongoing_requests: Annotated[int | None, COUNT] = None
    shutdown_grace_s: Annotated[float | None, Bounds(at_least=0, at_most=86_400)] = None

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

    def resolved_num_ingress_replicas(self, cores_by_node: Iterable[float]) -> int:
        """`num_ingress_replicas`, or one for every `CORES_PER_INGRESS` cores of a node, at least one in all."""
        if self.num_ingress_replicas is not None:
            return self.num_ingress_replicas
        by_node = (min(int(cores / CORES_PER_INGRESS), MOST_INGRESSES_PER_NODE) for cores in cores_by_node)
        return max(1, sum(by_node))


class Changeable(Strict):
    """What `user_config` of the replicas may change while they run; see `deployments/declared.py`."""

    slo: SloConfig
    offload: OffloadConfig


def parse(section: type[Section], values: Any, *, where: str) -> Section:
    """`values` as a `section`; ConfigError with one line per wrong field otherwise."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_in(error, where=where)) from None


def problems_in(error: ValidationError, *, where: str) -> str:
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
