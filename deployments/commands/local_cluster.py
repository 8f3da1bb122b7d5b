"""Ray for one machine, on loopback only, while a `with` block lasts; or a cluster that already runs."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil

from deployments.ray_private import forbid_multi_node_addresses, use_auth_token
from selectn_core.bounds import Bounds, check_numbers
from selectn_core.errors import SelectNError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Ray rewrites 127.0.0.1 to the machine's address, and listens on all interfaces, unless it is told that this
# is no cluster.
LOOPBACK_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
RAY_ENVIRONMENT = {
    # Serve's proxy calls ingresses by gRPC, at half of what a streamed item costs both by Ray's own calls.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Ray starts workers, and so replicas, at 15: anything else that runs would hold up the engine's steps.
    "RAY_worker_niceness": "0",
}
CONTROL_PROCESSES = ("gcs_server", "raylet")
MOST_PORT = 65_535
EXIT_GRACE_S = CONNECT_TIMEOUT_S = 5.0


class ClusterError(SelectNError):
    """Ray could not be started or joined as asked."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use. `address` None: $RAY_ADDRESS if set, else a cluster of our own on loopback.

    `num_cpus` is what a cluster of our own has for Ray's placement; None: what the machine has.
    """

    address: str | None = None
    dashboard: bool = False
    num_cpus: Annotated[int | None, Bounds(at_least=0, at_most=1 << 16)] = None

    def __post_init__(self) -> None:
        check_numbers(self, "cluster")

    def resolved_address(self) -> str | None:
        """The cluster to join, or None to start one."""
        address = self.address or os.environ.get("RAY_ADDRESS") or None
        return None if address == "local" else address


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connected Ray. `is_own`: started here, and gone when the `with` block ends.

    `token` is what its dashboard asks for; None: what Ray keeps for its user, if anything (`ray get-auth-token`).
    `control` are the processes of a cluster of our own that all calls go to.
    """

    is_own: bool
    dashboard_url: str | None
    token: str | None = None
    control: tuple[psutil.Process, ...] = ()

    def is_gone(self) -> bool:
        """Whether one of the processes has ended without which this cluster does nothing; unknown of one joined."""
        return any(_has_ended(process) for process in self.control)


@contextlib.contextmanager
def local_cluster(config: ClusterConfig) -> Iterator[Cluster]:
    """Connects to Ray, and disconnects at the end. A cluster that was started here leaves no process behind.

    Raises ClusterError if Ray cannot be reached, or would listen outside loopback.
    """
    address = config.resolved_address()
    with _joined(address) if address else _started(config) as cluster:
        yield cluster


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Cluster]:
    import ray

    _require_reachable(address)
    if _is_loopback(address):  # Ray itself does so for "auto"; a token is not for any machine that somebody names
        use_auth_token()
    try:
        context = ray.init(address=address, namespace="serve", logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "if it asks for a token, set RAY_AUTH_MODE=token"
        raise ClusterError(f"cannot join the Ray cluster at {address}: {_first_line(error)} ({hint})") from error
    try:
        yield Cluster(is_own=False, dashboard_url=_dashboard_url(context.dashboard_url))
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _started(config: ClusterConfig) -> Iterator[Cluster]:
    import ray

    keep_ray_on_loopback()
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    token = _token_of_its_own()
    try:
        context = ray.init(
            address="local",
            namespace="serve",
            num_cpus=config.num_cpus,
            include_dashboard=config.dashboard,
            dashboard_host=LOOPBACK,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address=LOOPBACK,
        )
        _require_loopback(context.address_info["node_ip_address"])
        control = tuple(each for each in psutil.Process().children() if _is_control(each))
        cluster = Cluster(
            is_own=True, dashboard_url=_dashboard_url(context.dashboard_url), token=token, control=control
        )
        yield cluster
    finally:
        _shut_down()


def _shut_down() -> None:
    import ray

    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    end_processes(processes)


def _is_control(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() in CONTROL_PROCESSES
    return False


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_processes(processes: list[psutil.Process]) -> None:
    """Waits for `processes` to end, and ends those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=EXIT_GRACE_S)
    for process in alive:
        logger.warning("killing process %d (%s), which did not end", process.pid, process.name())
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=EXIT_GRACE_S)


def keep_ray_on_loopback() -> None:
    """Has the Ray that this process will start stay on loopback, whether `ray` is imported yet or not."""
    os.environ.update(LOOPBACK_ENVIRONMENT)
    forbid_multi_node_addresses()


def _token_of_its_own() -> str | None:
    """Has the cluster that is started ask for a token that ends with this process, where the user has none.

    Ray would write one to ~/.ray/auth_token; every `ray start` after that turns authentication on, and `serve deploy`
    then fails unless RAY_AUTH_MODE=token is set for it.
    """
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    is_disabled = os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    if is_disabled or has_token or Path(os.path.expanduser("~/.ray/auth_token")).exists():  # noqa: PTH111
        return None
    token = os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return token


def _is_loopback(address: str) -> bool:
    host = address.removeprefix("ray://").rpartition(":")[0]
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def _require_reachable(address: str) -> None:
    """Raises ClusterError if nothing listens at host:port: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", which Ray looks up
        return
    if not 1 <= int(port) <= MOST_PORT:
        raise ClusterError(f"cannot join the Ray cluster at {address}: expected a port from 1 to {MOST_PORT:,}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {error.strerror or error}") from error
    if _is_loopback(address):
        keep_ray_on_loopback()  # or it takes the address for the machine's own


def _require_loopback(node_ip_address: str) -> None:
    if not ipaddress.ip_address(node_ip_address).is_loopback:
        raise ClusterError(f"Ray listens on {node_ip_address}, which is not loopback")


def _dashboard_url(address: str | None) -> str | None:
    return f"http://{address}" if address else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
