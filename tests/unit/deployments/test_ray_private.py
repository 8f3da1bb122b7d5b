"""Every private name of Ray that deployments/ray_private.py stands on is where it was."""

from __future__ import annotations

import inspect

from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.serve import context
from ray.serve._private import api, replica
from ray.serve._private.client import ServeControllerClient
from ray.serve.schema import ApplicationDetails, ServeInstanceDetails

from deployments.ray_private import ADD_PORT

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
    assert {"route_prefix", "deployed_app_config"} <= set(ApplicationDetails.model_fields), PLACE


def test_a_token_that_ray_has_can_be_shown() -> None:
    show = authentication_token_setup.maybe_enable_token_auth_if_token_available
    assert "warn_if_disabled" in inspect.signature(show).parameters, PLACE


def test_a_replica_adds_its_port_through_a_function_of_its_module() -> None:
    added = getattr(replica, ADD_PORT)
    assert len(inspect.signature(added).parameters) == 2, PLACE
    assert f"{ADD_PORT}(" in inspect.getsource(replica), PLACE
