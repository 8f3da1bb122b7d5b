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
from collections.abc import Callable, Iterator
from typing import Any

from deployments.config import select_n_applications
from deployments.ray_private import start_serve
from selectn_core.errors import ConfigError, SelectNError

logger = logging.getLogger(__name__)

# The start of an exception's line below a traceback: its type, with the module unless it is a built-in.
_EXCEPTION = re.compile(r"^(?:\w+\.)*(?:\w+\.\w+|\w+(?:Error|Exception)): ")
POLL_PERIOD_S = 0.25
HEALTH_TIMEOUT_S = 6.0
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


class DeployFailed(SelectNError):
    """The application did not start; the message is the reason that Serve gives."""


def http_address(document: dict[str, Any]) -> tuple[str, int]:
    """Host and port that a Serve config listens on."""
    options = document.get("http_options") or {}
    return options.get("host", DEFAULT_HOST), options.get("port", DEFAULT_PORT)


def require_free_port(host: str, port: int) -> None:
    """Raises ConfigError when `port` is taken: the proxy itself would fail late, and at length."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise ConfigError(f"port {port} on {host} {reason}; choose another with --port") from None


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def deployed(document: dict[str, Any]) -> Iterator[None]:
    """Starts Serve and submits the config; deletes its applications at the end."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process only
    schema = ServeDeploySchema.model_validate(document)
    client = start_serve(schema)
    try:
        client.deploy_apps(schema)
        yield
    finally:
        for app in schema.applications:
            serve.delete(app.name)


def wait_until_serving(document: dict[str, Any], on_wait: Callable[[float], None]) -> None:
    """Returns when every Select-N application of the config answers; calls `on_wait(elapsed_s)` meanwhile.

    Raises DeployFailed with Serve's reason.
    """
    from ray import serve

    names = [app.get("name", "default") for app in select_n_applications(document)]
    began_s = time.monotonic()
    while True:
        applications = serve.status().applications
        states = [applications[name] for name in names if name in applications]
        for state in states:
            if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise DeployFailed(_reason(state))
        if len(states) == len(names) and all(state.status == "RUNNING" for state in states):
            break
        on_wait(time.monotonic() - began_s)
        time.sleep(POLL_PERIOD_S)
    while not all(_answers(url) for url in base_urls(document)):
        on_wait(time.monotonic() - began_s)
        time.sleep(POLL_PERIOD_S)


def base_urls(document: dict[str, Any]) -> list[str]:
    """Where each Select-N application of the config is served, without a slash at the end."""
    host, port = http_address(document)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    prefixes = [app.get("route_prefix", "/").rstrip("/") for app in select_n_applications(document)]
    return [f"http://{f'[{shown}]' if ':' in shown else shown}:{port}{prefix}" for prefix in prefixes]


def served_model(base_url: str) -> str:
    """The name under which the server at `base_url` serves its model."""
    return str(_get_json(f"{base_url}/v1/models")["data"][0]["id"])


def _answers(base_url: str) -> bool:
    try:
        return bool(_get_json(f"{base_url}/health"))
    except OSError:  # urllib's own errors, for 503 too, among them
        return False


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
