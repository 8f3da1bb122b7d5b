"""The Serve application: one ingress in front of the replicas. `import_path: deployments.app:build_app`."""

# No `from __future__ import annotations`: Serve reads the builder's annotation to validate `args:`.

from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.config import IMPORT_PATH, INGRESS_NAME, REPLICA_NAME, AppArgs
from deployments.http.ingress import Ingress
from deployments.neighbours import NUM_CPUS
from deployments.ray_private import running_serve
from deployments.replica.replica import SelectNReplica
from deployments.serve_file import check_application
from selectn_core.config import DeviceConfig

# The ingress only waits and forwards: what bounds requests is its own admission.
INGRESS_MAX_ONGOING_REQUESTS = 10_000
ROUTER = "deployments.routing.router:HeadroomRouter"


def build_app(args: AppArgs) -> serve.Application:
    """The application that `args` describe, with `device.kind: auto` resolved for this cluster."""
    _check_deployments()
    args = args.model_copy(update={"device": resolve_device(args.device, cluster_num_gpus())})
    replica = _replica(args).bind(args.engine, args.limits.default_max_tokens, args.cluster, args.telemetry)
    return _ingress(args).bind(replica, args.limits, args.slo, args.model)


def _check_deployments() -> None:
    """Refuses what `deployments:` of a Serve config says and cannot work; a builder is only told `args:`.

    `selectn serve` has looked at it before; `serve deploy` has not, and shows this error as the reason.
    """
    running = running_serve() if ray.is_initialized() else None
    for app in running.apps if running is not None else ():
        if app.config is not None and app.config.get("import_path") == IMPORT_PATH:
            check_application(app.config, where=f"application '{app.name}'")


def cluster_num_gpus() -> float:
    """GPUs that Ray can give to replicas; 0 outside a cluster."""
    return ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0


def cores_by_node() -> list[float]:
    """What each node of the cluster has for Ray's placement; none outside a cluster."""
    nodes = ray.nodes() if ray.is_initialized() else []
    return [node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"]]


def resolve_device(device: DeviceConfig, num_gpus: float) -> DeviceConfig:
    """ "auto" is CUDA where the cluster has GPUs, and the emulated device elsewhere."""
    if device.kind != "auto":
        return device
    return replace(device, kind="cuda" if num_gpus >= 1 else "emulated")


def _ingress(args: AppArgs) -> serve.Deployment:
    return serve.deployment(
        Ingress,
        name=INGRESS_NAME,
        num_replicas=args.resolved_num_ingress_replicas(cores_by_node()),
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": NUM_CPUS},
        max_surge_percent=100,  # when it is replaced the next one answers before this one is told to stop
        **_grace(args),
    )


def _replica(args: AppArgs) -> serve.Deployment:
    return serve.deployment(
        SelectNReplica,
        name=REPLICA_NAME,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.resolved_max_ongoing_requests(),
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_routing_stats_period_s=args.headroom_period_s
        ),
        # A model that cannot be loaded will not load at the second attempt: say so now, not after minutes.
        # Replicas that have run and died are restarted whatever this says.
        max_constructor_retry_count=1,
        ray_actor_options=_replica_actor_options(args.device),
        **_grace(args),
    )


def _grace(args: AppArgs) -> dict[str, Any]:
    grace_s = args.resolved_shutdown_grace_s
    return {"graceful_shutdown_timeout_s": grace_s, "graceful_shutdown_wait_loop_s": min(1.0, grace_s)}


def _replica_actor_options(device: DeviceConfig) -> dict[str, Any]:
    return {"num_cpus": NUM_CPUS, "num_gpus": 1 if device.kind == "cuda" else 0}
