"""Deploys a checked Serve config, the way `serve run` does, and follows it until it answers."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from deployments.config import AppArgs, parse
from deployments.neighbours import missing_resources, with_neighbours
from deployments.ray_calls import RayIsGone, answer, never
from deployments.ray_private import begin_to_delete, running_serve, start_serve
from deployments.serve_file import app_args, select_n_applications
from selectn_core.device.host_memory import SHARED_MEMORY
from selectn_core.errors import ConfigError, SelectNError
from selectn_core.weights.store_files import FILES, remove_abandoned

logger = logging.getLogger(__name__)

# The start of an exception's line below a traceback: its type, with the module unless it is a built-in.
_EXCEPTION = re.compile(r"^(?:\w+\.)*(?:\w+\.\w+|\w+(?:Error|Exception)): ")
POLL_PERIOD_S = 0.25
HEALTH_TIMEOUT_S = 6.0
# An application that runs answers as soon as the proxies know its route.
ANSWER_TIMEOUT_S = 60.0
# A cluster that is joined may grow; one that lacks resources for this long is taken not to.
PLACEMENT_TIMEOUT_S = 300.0
# What it takes Serve to delete an application once its replicas have stopped, or are killed.
DELETE_S = 30.0
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


class DeployFailed(SelectNError):
    """The application did not start; the message is the reason that Serve gives."""


def http_address(document: dict[str, Any]) -> tuple[str, int]:
    """Host and port that a Serve config listens on."""
    options = document.get("http_options") or {}
    return options.get("host", DEFAULT_HOST), options.get("port", DEFAULT_PORT)


def require_free_port(host: str, port: int) -> None:
    """Raises ConfigError when `port` is taken: the proxy itself would fail late, and at length."""
    _bound_port(host, port, reuse=True)


def free_port(host: str) -> int:
    """A port that is free now. Raises ConfigError for a host that is none of this machine's."""
    return _bound_port(host, 0, reuse=False)


def _bound_port(host: str, port: int, *, reuse: bool) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if reuse:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, ValueError, TypeError) as error:  # but OSError: of a name that is no host's
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use" if in_use else f"cannot be used: {getattr(error, 'strerror', None) or error}"
            shown = host if host.isprintable() else repr(host)
            raise ConfigError(f"port {port} on {shown} {reason}; choose another with --port") from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def deployed(
    document: dict[str, Any],
    asked: Collection[str] = ("host", "port"),
    *,
    is_gone: Callable[[], bool] = never,
) -> Iterator[dict[str, Any]]:
    """Starts Serve and submits the config; deletes its applications at the end. Yields it as it is served.

    Where Serve runs already, what runs there stays, and its HTTP options count: `asked` are those that must be as in
    `document`. An application that was there before is updated, and stays at the end. `is_gone` is of a cluster that
    ends with this process: whether it has ended already. What it fails to delete is not an error then.

    Raises ConfigError for what is in the way.
    """
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process only
    running = running_serve()
    whole = document if running is None else with_neighbours(document, running, asked)
    before = {app.name for app in running.apps} if running is not None else set()
    schema = ServeDeploySchema.model_validate(whole)
    client = start_serve(schema)
    try:
        client.deploy_apps(schema)
        yield {**document, "http_options": whole.get("http_options") or {}}
    finally:
        names = [app.get("name", "default") for app in document["applications"]]
        _delete([name for name in names if name not in before], _longest_grace_s(document) + DELETE_S, is_gone)


@contextlib.contextmanager
def cleaned_up(document: dict[str, Any]) -> Iterator[None]:
    """Removes what the replicas of a cluster that ends within the block have left in host memory.

    They are not asked whether they were done: one that was loading may have built its host store, and used it.
    """
    try:
        yield
    finally:
        args = [parse(AppArgs, app_args(app), where="args") for app in select_n_applications(document)]
        configured = {Path(each.host.directory) for each in args if each.host.directory is not None}
        for directory in {SHARED_MEMORY, FILES, *configured}:
            with contextlib.suppress(OSError):
                remove_abandoned(directory)


def _delete(names: list[str], at_most_s: float, is_gone: Callable[[], bool]) -> None:
    """Deletes applications, and returns when what runs in them has stopped, or should have; or there is no Ray."""
    from ray import serve
    from ray.exceptions import RayError

    def left() -> set[str]:
        return serve.status().applications.keys() & set(names)

    ends_s = time.monotonic() + at_most_s
    try:
        for name in names:  # all of them: or the second would be told when the first has stopped
            answer(partial(begin_to_delete, name), is_gone=is_gone, at_most_s=DELETE_S)
        while still := answer(left, is_gone=is_gone, at_most_s=DELETE_S):
            if time.monotonic() >= ends_s:  # Serve goes on with it
                logger.warning("not deleted yet: %s", ", ".join(sorted(still)))
                return
            time.sleep(POLL_PERIOD_S)
    except RayIsGone:
        logger.info("Ray has ended already: there is nothing to delete")
    except RayError as error:
        if is_gone is never:  # a cluster that goes on, and the applications with it
            raise
        logger.info("not deleted: Ray, which stops with this process, has failed: %s", error)


def _longest_grace_s(document: dict[str, Any]) -> float:
    args = [parse(AppArgs, app_args(app), where="args") for app in select_n_applications(document)]
    return max(each.resolved_shutdown_grace_s for each in args)


def wait_until_serving(
    document: dict[str, Any],
    on_wait: Callable[[float], None],
    *,
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
    answer_timeout_s: float = ANSWER_TIMEOUT_S,
) -> None:
    """Returns when every Select-N application of the config answers; calls `on_wait(elapsed_s)` meanwhile.

    Raises DeployFailed with Serve's reason, with the resources that the cluster lacks, or with why nothing answers.
    """
    began_s = time.monotonic()
    while not _all_run(document):
        on_wait(time.monotonic() - began_s)
        missing = why_not_placed(document)
        if missing and time.monotonic() >= began_s + placement_timeout_s:
            raise DeployFailed(missing)
        time.sleep(POLL_PERIOD_S)
    running_s = time.monotonic()
    while reasons := [reason for url in base_urls(document) if (reason := _why_no_answer(url)) is not None]:
        if time.monotonic() >= running_s + answer_timeout_s:
            raise DeployFailed(f"the application runs and does not answer: {'; '.join(reasons)}")
        on_wait(time.monotonic() - began_s)
        time.sleep(POLL_PERIOD_S)


def why_not_placed(document: dict[str, Any]) -> str | None:
    """The resources that this cluster, as large as it is now, lacks for the config; None: it has them all."""
    import ray

    return missing_resources(document, answer(ray.cluster_resources))


def why_waiting(document: dict[str, Any]) -> str:
    """What Serve says of the replicas that are not ready yet, in a line; empty where it says nothing."""
    if missing := why_not_placed(document):
        return missing
    messages = [each.message for state in _states(document) for each in state.deployments.values() if each.message]
    return " ".join("; ".join(messages).split())


def _states(document: dict[str, Any]) -> list[Any]:
    from ray import serve

    applications = answer(serve.status).applications
    names = [app.get("name", "default") for app in select_n_applications(document)]
    return [applications[name] for name in names if name in applications]


def _all_run(document: dict[str, Any]) -> bool:
    states = _states(document)
    for state in states:
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise DeployFailed(_reason(state))
    return len(states) == len(select_n_applications(document)) and all(state.status == "RUNNING" for state in states)


def base_urls(document: dict[str, Any]) -> list[str]:
    """Where each Select-N application of the config is served, without a slash at the end."""
    host, port = http_address(document)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    routes = [app.get("route_prefix", "/") for app in select_n_applications(document)]
    prefixes = [route.rstrip("/") for route in routes if route is not None]  # None: it has no HTTP
    return [f"http://{f'[{shown}]' if ':' in shown else shown}:{port}{prefix}" for prefix in prefixes]


def served_model(base_url: str) -> str:
    """The name under which the server at `base_url` serves its model."""
    return str(_get_json(f"{base_url}/v1/models")["data"][0]["id"])


def _why_no_answer(base_url: str) -> str | None:
    url = f"{base_url}/health"
    try:
        _get_json(url)
        return None
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors, for 503 too, among the first
        return f"{url}: {error}"


def _get_json(url: str) -> Any:
    # The server is on this machine: not through $http_proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=HEALTH_TIMEOUT_S) as response:
        return json.load(response)


def _reason(state: Any) -> str:
    messages = [*(each.message for each in state.deployments.values()), state.message]
    message = next((message for message in messages if "Error" in message), messages[-1])
    logger.info("Serve says: %s", message)
    return last_error(message) or "no reason was given; see Ray's logs"


def last_error(message: str) -> str:
    """What the last exception in Serve's message says, without the tracebacks around it."""
    lines = message.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    text = "\n".join(lines[starts[-1] :] if starts else lines)
    return _EXCEPTION.sub("", text, count=1)
