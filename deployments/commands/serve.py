"""`selectn serve`: one machine, one command, an OpenAI-compatible server until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shlex
import signal
import threading
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from deployments.commands.file_options import file_name
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.commands.serving import (
    DEFAULT_HOST,
    base_urls,
    cleaned_up,
    deployed,
    free_port,
    http_address,
    require_free_port,
    served_model,
    wait_until_serving,
    why_not_placed,
    why_waiting,
)
from deployments.config import IMPORT_PATH, AppArgs, parse
from deployments.ray_calls import never
from deployments.ray_private import direct_urls
from deployments.serve_file import PORT, app_args, load_yaml, select_n_applications
from selectn_core.bounds import require, require_number
from selectn_core.config import DEVICE_KINDS, OFFLOAD_UNITS, ModelConfig
from selectn_core.errors import ConfigError
from selectn_core.weights.embedded_model import cache_directory, embedded_weights, made_directory

DEFAULT_CONFIG = Path("serve_config.yaml")
PROGRESS_PERIOD_S = 5.0

EXAMPLES = """\
examples:
  selectn serve
      the embedded model; serve_config.yaml of this directory is used if there is one
  selectn serve --model ./llama-3-8b --device cuda --num-offloaded 8
      a local checkpoint on the GPU, 8 of its layers in host memory
  selectn serve --device emulated --device-memory-gib 0.5 --link-gb-per-s 4
      no GPU needed: a device of 512 MiB behind an emulated link
  selectn serve --config serve_config.yaml --port 0
      a config file, on any free port
"""

# Option, key in the application's args, and how to read the value.
OVERRIDES: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("--model", ("model", "source"), {"help": "directory, .gguf file, hub id, or 'embedded'"}),
    ("--served-name", ("model", "served_name"), {"help": "the model's name in the API"}),
    ("--dtype", ("model", "dtype"), {"help": "auto, float32, bfloat16 or float16"}),
    ("--device", ("device", "kind"), {"choices": DEVICE_KINDS, "help": "auto: CUDA where there is a GPU"}),
    ("--device-memory-gib", ("device", "memory_gib"), {"type": float, "help": "size of the device's memory"}),
    ("--link-gb-per-s", ("device", "link_gb_per_s"), {"type": float, "help": "speed of the emulated link"}),
    ("--kv-tokens", ("batch", "kv_tokens"), {"type": int, "help": "tokens that the KV cache holds"}),
    ("--offload-unit", ("offload", "unit"), {"choices": OFFLOAD_UNITS, "help": "what is offloaded, and counted"}),
    ("--num-offloaded", ("offload", "num_offloaded"), {"help": "units kept in host memory, or 'auto'"}),
    ("--num-slots", ("offload", "num_slots"), {"type": int, "help": "device buffers for offloaded units"}),
    ("--num-replicas", ("num_replicas",), {"type": int, "help": "replicas, each with a device of its own"}),
)


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serves a model over an OpenAI-compatible HTTP API until Ctrl-C.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=file_name, help=f"Serve config file (default: {DEFAULT_CONFIG} if there)")
    parser.add_argument("--port", type=int, help="HTTP port; 0: any free one (default: 8000)")
    for option, path, settings in OVERRIDES:
        parser.add_argument(option, dest=".".join(path), default=None, **settings)
    parser.add_argument("--address", help="join the Ray cluster at this address (default: $RAY_ADDRESS, or start one)")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard as well, on loopback")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. Raises SelectNError for whatever the user can put right."""
    interrupt_on_first_signal()
    require(args.address is None or bool(args.address.strip()), "--address", args.address, "host:port, or auto")
    try:
        cluster = ClusterConfig(address=args.address, dashboard=args.dashboard)
        document = configured_document(args)
        if cluster.resolved_address() is None:
            require_free_port(*http_address(document))
            resolve_local_models(document)
        _serve(document, cluster, _asked_options(args))
    except (KeyboardInterrupt, SystemExit):  # SystemExit: of Ray's own handler of SIGTERM, while Ray starts
        print("stopped", flush=True)
    return 0


def configured_document(args: argparse.Namespace) -> dict[str, Any]:
    """The Serve config to deploy: the file's, or the defaults, with the options of this call put in."""
    require_number("--port", args.port, bounds=PORT, is_whole=True)
    path = _config_path(args)
    document = load_yaml(path) if path else default_document()
    if path:
        print(f"using {path}", flush=True)
    document = copy.deepcopy(document)
    options = document["http_options"] = {"host": DEFAULT_HOST, **(document.get("http_options") or {})}
    if args.port is not None:
        options["port"] = args.port
    if options.get("port") == 0:
        options["port"] = free_port(http_address(document)[0])
    for app in select_n_applications(document):
        app["args"] = _with_overrides(app_args(app), args)
        parse(AppArgs, app["args"], where="options")
    return document


def _config_path(args: argparse.Namespace) -> Path | None:
    return args.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)


def _asked_options(args: argparse.Namespace) -> set[str]:
    """Which of the HTTP options somebody has asked for, in the file or here: port 0 is any."""
    path = _config_path(args)
    asked = set(load_yaml(path).get("http_options") or {}) if path else set()
    return (asked | ({"port"} if args.port else set())) - ({"port"} if args.port == 0 else set())


def resolve_local_models(document: dict[str, Any]) -> None:
    """Makes model paths absolute: a replica has another working directory.

    Raises ConfigError for one that is not there, and where this user has no place for what a first start makes.
    """
    for app in select_n_applications(document):
        args = parse(AppArgs, app_args(app), where="args")
        source, path = args.model.source, Path(os.path.expanduser(args.model.source))  # noqa: PTH111 -- raises nothing
        if source == "embedded" or args.offload.num_offloaded == "auto":
            made_directory(cache_directory())
        if source == "embedded":
            embedded_weights()
        elif _exists(path):
            _require_checkpoint(path, args.model)
            app["args"]["model"]["source"] = str(path.resolve())
        elif source.startswith(("/", ".", "~")):
            raise ConfigError(f"model.source={source!r}: there is no such file or directory")


def _require_checkpoint(path: Path, model: ModelConfig) -> None:
    """Raises ConfigError for what loading would refuse at a look, some time after Ray has started."""
    wanted = model.gguf_file or "config.json"
    if path.is_dir() and not os.path.lexists(path / wanted):
        from selectn_core.weights.checkpoint_files import (
            CheckpointFiles,  # late: it imports torch, and says what is there
        )

        CheckpointFiles(replace(model, source=str(path.resolve()))).get(wanted)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it, is no path
        return False


def default_document() -> dict[str, Any]:
    """What is served without a config file."""
    return {"applications": [{"name": "selectn", "route_prefix": "/", "import_path": IMPORT_PATH}]}


def _with_overrides(app_args: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    result = copy.deepcopy(app_args)
    for _, path, _ in OVERRIDES:
        value = getattr(args, ".".join(path))
        if value is None:
            continue
        section = result
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    return result


def _serve(document: dict[str, Any], config: ClusterConfig, asked: set[str]) -> None:
    is_own = config.resolved_address() is None
    print("starting Ray ..." if is_own else "joining Ray ...", flush=True)
    with cleaned_up(document) if is_own else contextlib.nullcontext(), local_cluster(config) as cluster:
        interrupt_on_first_signal()  # again: Ray has put its own handler of SIGTERM in place
        if cluster.is_own and (missing := why_not_placed(document)):
            raise ConfigError(missing)  # it will not grow
        with deployed(document, asked, is_gone=cluster.is_gone if cluster.is_own else never) as served:
            print(f"loading {', '.join(model_sources(document))} ...", flush=True)
            wait_until_serving(served, _Progress(served))
            for url in base_urls(served):
                print(ready_message(url), flush=True)
            for url in direct_urls():
                print(f"without Serve's proxy: {url}/v1", flush=True)
            if cluster.dashboard_url:
                token = f" (token: {cluster.token})" if cluster.token else ""
                print(f"dashboard: {cluster.dashboard_url}{token}", flush=True)
            print("Ctrl-C stops the server.", flush=True)
            threading.Event().wait()  # until a signal interrupts it


def model_sources(document: dict[str, Any]) -> list[str]:
    """What each Select-N application of a Serve config serves."""
    applications = select_n_applications(document)
    return [parse(AppArgs, app_args(app), where="args").model.source for app in applications]


def ready_message(base_url: str) -> str:
    """Where the server is, and a line to try it with: every model can complete, not every one can chat.

    A server with API keys tells its model's name to who has one, which this command has not.
    """
    model, key = "MODEL", " -H 'Authorization: Bearer KEY'"
    try:
        model, key = served_model(base_url), ""
    except HTTPError as error:
        with error:
            if error.code != HTTPStatus.UNAUTHORIZED:
                raise
    body = json.dumps({"model": model, "prompt": "The sky is", "max_tokens": 16})
    curl = f"curl {base_url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return f"ready: {base_url}/v1\nstatus: {base_url}/status\n{curl}"


class _Progress:
    """Says now and then that the model is still loading, and what Serve says of it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document, self._next_s = document, PROGRESS_PERIOD_S

    def __call__(self, elapsed_s: float) -> None:
        if elapsed_s >= self._next_s:
            why = why_waiting(self._document)
            print(f"  still loading ({elapsed_s:.0f} s){f': {why}' if why else ''}", flush=True)
            self._next_s = elapsed_s + PROGRESS_PERIOD_S


def interrupt_on_first_signal() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt once; more of them cannot cut the clean-up short."""

    def interrupt(*_: object) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
