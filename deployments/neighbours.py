"""What runs in a cluster already that is joined: what of it is in the way, and what must be deployed again beside ours.

Serve takes a config for everything that is to run: what is not in it is deleted. So the others' configs go in as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config import REPLICA_NAME, AppArgs, parse
from deployments.serve_file import app_args, select_n_applications
from selectn_core.errors import ConfigError

# A share for Ray's placement, not a limit: a replica's arithmetic is bounded by device.compute_threads.
NUM_CPUS = 0.1
# Never in a message.
SECRET_OPTIONS = ("ssl_keyfile_password",)


@dataclass(frozen=True, kw_only=True)
class RunningApp:
    """An application of a running Serve. `config` is what it was deployed from; None: it was made in code."""

    name: str
    route_prefix: str | None
    config: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RunningServe:
    """A Serve that runs: its HTTP options, which stay until it ends, and its applications."""

    http_options: Mapping[str, Any]
    target_capacity: float | None
    apps: tuple[RunningApp, ...]


def with_neighbours(document: Mapping[str, Any], running: RunningServe, asked: Collection[str]) -> dict[str, Any]:
    """The config to deploy so that `document`'s applications are added or updated, and all others stay as they are.

    `asked`: which of `http_options` somebody asked for. Raises ConfigError naming everything that is in the way.
    """
    ours = {app.get("name", "default"): app for app in document["applications"]}
    problems = [*_other_options(document, running, asked)]
    for app in running.apps:
        mine = ours.get(app.name)
        if mine is None:
            problems += [
                f"application '{app.name}' has route_prefix '{app.route_prefix}': choose another for '{name}'"
                for name, each in ours.items()
                if app.route_prefix is not None and each.get("route_prefix", "/") == app.route_prefix
            ]
        elif app.config is None or app.config.get("import_path") != mine.get("import_path"):
            problems.append(f"there is another application named '{app.name}': choose another name")
    if problems:
        raise ConfigError("what runs in this cluster is in the way: " + "; ".join(problems))
    others = [dict(app.config) for app in running.apps if app.name not in ours and app.config is not None]
    return {
        **document,
        "http_options": dict(running.http_options),
        "target_capacity": running.target_capacity,
        "applications": [*others, *document["applications"]],
    }


def _other_options(document: Mapping[str, Any], running: RunningServe, asked: Collection[str]) -> list[str]:
    wanted, have = document.get("http_options") or {}, running.http_options
    problems = []
    for key in sorted(asked):
        if key in wanted and key not in have:
            problems.append(f"http_options.{key} cannot be looked up of the Serve that runs: leave it out")
        elif key in wanted and wanted[key] != have[key]:
            values = f"={wanted[key]!r}, but Serve runs with {have[key]!r}"
            differs = " is not what Serve runs with: it" if key in SECRET_OPTIONS else values
            problems.append(f"http_options.{key}{differs} and cannot change it: leave it out")
    return problems


def missing_resources(document: Mapping[str, Any], total: Mapping[str, float]) -> str | None:
    """Why not all replicas of `document` can be placed in a cluster that has `total`; None if they can."""
    for app in select_n_applications(document):
        args = parse(AppArgs, app_args(app), where="args")
        for resource, (each, num_replicas) in _needs(app, args).items():
            if each * num_replicas > total.get(resource, 0.0):
                why = "; device.kind 'emulated' needs none" if resource == "GPU" else ""
                return (
                    f"{num_replicas} replica(s) need {each:g} {resource} each and the cluster has "
                    f"{total.get(resource, 0.0):g}{why}"
                )
    return None


def _needs(app: Mapping[str, Any], args: AppArgs) -> dict[str, tuple[float, int]]:
    """Per resource what a replica needs, and how many replicas there are."""
    entries = [each for each in app.get("deployments") or () if each["name"] == REPLICA_NAME]
    entry = entries[0] if entries else {}
    num_replicas = entry.get("num_replicas") or args.num_replicas
    if not isinstance(num_replicas, int):  # "auto"
        num_replicas = 1
    options = entry.get("ray_actor_options") or {}
    per_replica = {
        "CPU": options.get("num_cpus", NUM_CPUS),
        "GPU": options.get("num_gpus", 1 if args.device.kind == "cuda" else 0),
        **(options.get("resources") or {}),
    }
    return {name: (float(amount or 0), num_replicas) for name, amount in per_replica.items() if amount}
