"""Every private name of Ray that deployments/ray_private.py stands on is where it was."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from ray import serve
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.serve import context
from ray.serve._private import api, constants, replica
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import RequestProtocol
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationDetails, HTTPOptionsSchema, ServeInstanceDetails, Target, TargetGroup

from deployments.ray_private import ADD_PORT, GRACEFUL_SHUTDOWN, when_told_to_stop

PLACE = "see deployments/ray_private.py"


def test_ray_can_be_told_that_it_is_no_cluster() -> None:
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), PLACE


def test_serve_is_started_and_deployed_to_as_before() -> None:
    assert {"http_options", "proxy_location"} <= set(inspect.signature(api.serve_start).parameters), PLACE
    assert callable(ServeControllerClient.deploy_apps), PLACE


def test_what_serve_runs_can_be_asked() -> None:
    wanted = inspect.signature(context._get_global_client).parameters
    assert "raise_if_no_controller_running" in wanted, PLACE
    assert callable(ServeControllerClient.get_serve_details), PLACE
    assert {"http_options", "target_capacity", "applications"} <= set(ServeInstanceDetails.model_fields), PLACE
    assert set(HTTPOptionsSchema.model_fields) <= set(HTTPOptions.model_fields), PLACE
    same = HTTPOptions(request_timeout_s=3, keep_alive_timeout_s=7).model_dump(
        include=set(HTTPOptionsSchema.model_fields)
    )
    assert HTTPOptionsSchema.model_validate(same).model_dump() == same, "what runs is deployed again as it is"
    assert {"route_prefix", "deployed_app_config"} <= set(ApplicationDetails.model_fields), PLACE


def test_serve_says_where_ingresses_answer_by_themselves() -> None:
    assert isinstance(constants.RAY_SERVE_ENABLE_DIRECT_INGRESS, bool), PLACE
    assert "target_groups" in ServeInstanceDetails.model_fields, PLACE
    assert {"targets", "route_prefix", "protocol"} <= set(TargetGroup.model_fields), PLACE
    assert {"ip", "port"} <= set(Target.model_fields), PLACE
    assert RequestProtocol.HTTP == "HTTP", PLACE


def test_a_token_that_ray_has_can_be_shown() -> None:
    show = authentication_token_setup.maybe_enable_token_auth_if_token_available
    assert "warn_if_disabled" in inspect.signature(show).parameters, PLACE


def test_an_application_can_be_deleted_without_waiting() -> None:
    assert "_blocking" in inspect.signature(serve.delete).parameters, PLACE


def test_a_replica_adds_its_port_through_a_function_of_its_module() -> None:
    added = getattr(replica, ADD_PORT)
    assert len(inspect.signature(added).parameters) == 2, PLACE
    assert f"{ADD_PORT}(" in inspect.getsource(replica), PLACE


def test_a_replica_stops_in_a_method_that_is_looked_up_when_serve_says_so() -> None:
    assert inspect.iscoroutinefunction(getattr(replica.Replica, GRACEFUL_SHUTDOWN)), PLACE
    assert f"self.{GRACEFUL_SHUTDOWN}()" in inspect.getsource(replica.Replica.perform_graceful_shutdown), PLACE
    assert "graceful_shutdown_timeout_s" in inspect.getsource(getattr(replica.Replica, GRACEFUL_SHUTDOWN)), PLACE
    assert "self._deployment_config = deployment_config" in inspect.getsource(replica.Replica.__init__), PLACE


def test_a_listener_hears_of_the_stop_and_of_its_grace_and_cannot_prevent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    async def stop(_: object) -> None:
        told.append("stopped")

    def listener(grace_s: float) -> None:
        told.append(grace_s)
        raise ValueError("a defect")

    monkeypatch.setattr(replica.Replica, GRACEFUL_SHUTDOWN, stop)
    when_told_to_stop(listener)
    one = replica.Replica.__new__(replica.Replica)
    one._deployment_config = DeploymentConfig(graceful_shutdown_timeout_s=7.0)
    asyncio.run(getattr(one, GRACEFUL_SHUTDOWN)())
    assert told == [7.0, "stopped"]
