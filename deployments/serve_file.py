"""A whole Serve config file, checked before anything starts: `args:`, `user_config:` and Serve's own settings.

Apart from `config.py`, which knows `args:` alone, and from `declared.py`, which knows `user_config:`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.config import (
    COUNT,
    IMPORT_PATH,
    INGRESS_NAME,
    REPLICA_NAME,
    AppArgs,
    nearest,
    parse,
    problems_in,
    refuse_unknown_keys,
    require_calls,
)
from deployments.declared import declared
from selectn_core.bounds import MOST_WHOLE, Bounds, require, require_number
from selectn_core.errors import ConfigError
from selectn_core.yaml_file import read_yaml

PORT = Bounds(at_least=0, at_most=65_535)
_SECONDS = Bounds(at_least=0, at_most=86_400)
_PERIOD_S = Bounds(above=0, at_most=86_400)
_AMOUNT = Bounds(at_least=0, at_most=1 << 20)
# Of Serve's own settings, wherever they are.
_SERVE_NUMBERS = {
    "port": PORT,
    "num_replicas": COUNT,
    "request_timeout_s": _SECONDS,
    "keep_alive_timeout_s": _SECONDS,
    "graceful_shutdown_timeout_s": _SECONDS,
    "graceful_shutdown_wait_loop_s": _PERIOD_S,
    "health_check_period_s": _PERIOD_S,
    "health_check_timeout_s": _PERIOD_S,
}
_RESOURCES = {"num_cpus": _AMOUNT, "num_gpus": _AMOUNT, "memory": Bounds(at_least=0, at_most=1 << 60)}


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


def most_replicas(app: Mapping[str, Any]) -> int | None:
    """The replicas that `deployments:` of a checked application allows at most; None where it does not say."""
    for entry in _deployments(app):
        if entry.get("name") == REPLICA_NAME:
            scaling = entry.get("autoscaling_config")
            most = scaling.get("max_replicas") if isinstance(scaling, Mapping) else entry.get("num_replicas")
            return most if isinstance(most, int) else None
    return None


def _deployments(app: Mapping[str, Any]) -> list[dict[str, Any]]:
    deployments = app.get("deployments")
    entries = [] if deployments is None else deployments
    if not isinstance(entries, list) or not all(isinstance(each, dict) and "name" in each for each in entries):
        raise ConfigError("deployments: expected a list of deployments, each with a name")
    return entries


def _check_deployment(deployment: Mapping[str, Any], args: AppArgs, *, where: str) -> None:
    """Raises ConfigError for what Serve would take, and this application cannot do."""
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
        raise ConfigError(problems_in(error, where=str(path))) from None
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
            require_number(f"{where}.{name}", value, bounds=each, is_whole=each in (PORT, COUNT))
