"""The one place that touches private names of Ray, each for want of a public one.

tests/unit/deployments/test_ray_private.py fails, naming the culprit, when an upgrade moves one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from deployments.neighbours import RunningApp, RunningServe

logger = logging.getLogger(__name__)

ADD_PORT = "add_port_to_grpc_server"
GRACEFUL_SHUTDOWN = "_perform_graceful_shutdown"


def forbid_multi_node_addresses() -> None:
    """Has Ray keep a node address of 127.0.0.1, which it otherwise rewrites to the machine's own.

    The environment variable behind it is read when Ray is imported; this works afterwards too.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def start_serve(schema: Any) -> Any:
    """Starts Serve with a `ServeDeploySchema`'s options, as `serve run` does; the client has `deploy_apps`."""
    from ray.serve._private import api

    return api.serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)


def running_serve() -> RunningServe | None:
    """The Serve that runs in this cluster, with what it runs; None where there is none."""
    from ray.serve import context
    from ray.serve.schema import HTTPOptionsSchema

    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    details = client.get_serve_details()
    apps = details["applications"]
    return RunningServe(
        http_options={
            key: getattr(client.http_config, key)
            for key in HTTPOptionsSchema.model_fields
            if hasattr(client.http_config, key)
        },
        target_capacity=details["target_capacity"],
        apps=tuple(
            RunningApp(name=name, route_prefix=app["route_prefix"], config=app["deployed_app_config"])
            for name, app in apps.items()
        ),
    )


def direct_urls() -> list[str]:
    """Where ingresses answer by themselves, without Serve's proxy: with RAY_SERVE_ENABLE_DIRECT_INGRESS=1."""
    from ray.serve import context
    from ray.serve._private.common import RequestProtocol
    from ray.serve._private.constants import RAY_SERVE_ENABLE_DIRECT_INGRESS

    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None or not RAY_SERVE_ENABLE_DIRECT_INGRESS:
        return []
    groups = [each for each in client.get_serve_details()["target_groups"] if each["protocol"] == RequestProtocol.HTTP]
    return [
        f"http://{target['ip']}:{target['port']}{each['route_prefix'].rstrip('/')}"
        for each in groups
        for target in each["targets"]
    ]


def use_auth_token() -> None:
    """Has this process show the token that Ray keeps for its user, if there is one and RAY_AUTH_MODE is not set."""
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def begin_to_delete(app_name: str) -> None:
    """Has Serve delete an application. Serve's own call waits for the end, but no longer than a minute."""
    from ray import serve

    serve.delete(app_name, _blocking=False)


def bind_replica_to_node_address() -> None:
    """Keeps this replica's gRPC server off the other interfaces; call it in the replica's constructor.

    Every Serve replica starts one for calls of other replicas, on `[::]` whatever address its node has. Callers
    reach it through the node's address, so that is the one address it needs. Idempotent.
    """
    import ray
    from ray.serve._private import replica

    original = getattr(replica, ADD_PORT, None)
    if original is None:
        logger.warning("this release of Ray Serve cannot be kept from listening on all interfaces")
        return
    if getattr(original, "binds_to_node_address", False):
        return
    address = ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address

    def add_port(server: Any, wanted: str) -> Any:
        return original(server, wanted.replace("[::]", host))

    add_port.binds_to_node_address = True  # type: ignore[attr-defined]
    setattr(replica, ADD_PORT, add_port)


def when_told_to_stop(listener: Callable[[float], None]) -> None:
    """Has `listener` called when Serve tells this replica to stop, with the seconds after which it is killed.

    On a thread that is not the user code's. Serve itself says nothing to user code before all requests are over. Call
    it in the replica's constructor: a process has one replica.
    """
    from ray.serve._private.replica import Replica

    original = getattr(Replica, GRACEFUL_SHUTDOWN, None)
    if original is None:
        logger.warning("this release of Ray Serve does not say when a replica must stop")
        return

    async def perform_graceful_shutdown(replica: Any) -> None:
        try:
            listener(replica._deployment_config.graceful_shutdown_timeout_s)
        except Exception:  # the replica must stop all the same
            logger.exception("a replica could not be told to stop")
        await original(replica)

    setattr(Replica, GRACEFUL_SHUTDOWN, perform_graceful_shutdown)
