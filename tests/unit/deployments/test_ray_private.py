"""Every private name of Ray that deployments/ray_private.py stands on is where it was."""

from __future__ import annotations

import inspect

from ray._private import ray_constants
from ray.serve._private import api, replica
from ray.serve._private.client import ServeControllerClient

from deployments.ray_private import ADD_PORT

PLACE = "see deployments/ray_private.py"


def test_ray_can_be_told_that_it_is_no_cluster() -> None:
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), PLACE


def test_serve_is_started_and_deployed_to_as_before() -> None:
    assert {"http_options", "proxy_location"} <= set(inspect.signature(api.serve_start).parameters), PLACE
    assert callable(ServeControllerClient.deploy_apps), PLACE


def test_a_replica_adds_its_port_through_a_function_of_its_module() -> None:
    added = getattr(replica, ADD_PORT)
    assert len(inspect.signature(added).parameters) == 2, PLACE
    assert f"{ADD_PORT}(" in inspect.getsource(replica), PLACE
