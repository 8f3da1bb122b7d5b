"""An application that is served in a cluster where others run: they stay, and what is in the way is named."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
from ray import serve

from deployments.commands.serving import DeployFailed, base_urls, deployed, free_port, wait_until_serving, why_waiting
from deployments.ray_private import running_serve
from selectn_core.errors import ConfigError
from tests.integration.conftest import application

OTHERS = {"main", "small", "pair"}


@pytest.fixture
def beside(document, checkpoint, urls) -> dict[str, Any]:
    """A config of one more application, as `selectn serve --address` makes it for the running cluster."""
    return {
        "http_options": copy.deepcopy(document["http_options"]),
        "applications": [application("beside", "/beside", checkpoint)],
    }


def is_healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_it_is_added_and_taken_away_and_the_others_stay(beside, urls, replica):
    before = running_serve()
    num_steps = replica.snapshot.remote().result()["num_steps"]
    with deployed(beside) as served:
        wait_until_serving(served, lambda elapsed_s: None)
        assert set(serve.status().applications) == {*OTHERS, "beside"}
        assert all(map(is_healthy, [*urls, *base_urls(served)]))
    assert set(serve.status().applications) == OTHERS
    assert all(map(is_healthy, urls))
    assert replica.snapshot.remote().result()["num_steps"] >= num_steps  # the same process: it was not restarted
    after = running_serve()
    assert before is not None
    assert after is not None
    assert {app.name: app.config for app in after.apps} == {app.name: app.config for app in before.apps}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route_prefix": "/small"}, "application 'small' has route_prefix '/small': choose another for 'beside'"),
        ({"name": "pair", "import_path": "a:b"}, "there is another application named 'pair'"),
    ],
)
def test_what_is_in_the_way_is_named(beside, change, message):
    beside["applications"][0] |= change
    with pytest.raises(ConfigError, match=message), deployed(beside):
        pass
    assert set(serve.status().applications) == OTHERS


def test_other_http_options_are_in_the_way_only_if_they_were_asked_for(beside, document):
    beside["http_options"] = {"host": "127.0.0.1", "port": free_port("127.0.0.1")}
    have = document["http_options"]["port"]
    with pytest.raises(ConfigError, match=rf"http_options.port=\d+, but Serve runs with {have}"), deployed(beside):
        pass
    assert set(serve.status().applications) == OTHERS


def test_a_replica_that_cannot_be_placed_says_what_it_lacks(beside):
    beside["applications"][0]["args"]["device"] = {"kind": "cuda"}
    waited: list[float] = []
    beside["http_options"]["port"] = 1  # nobody asked for it
    with (
        deployed(beside, asked=()) as served,
        pytest.raises(DeployFailed, match="need 1 GPU each and the cluster has 0"),
    ):
        wait_until_serving(served, waited.append, placement_timeout_s=0.5)
    assert waited
    assert "GPU" in why_waiting(beside)
    assert set(serve.status().applications) == OTHERS


def test_what_serve_deploy_would_take_and_cannot_work_is_the_reason_it_shows(beside):
    """Nothing but Serve has looked at this config, as with `serve deploy`."""
    beside["applications"][0]["deployments"] = [
        {"name": "SelectNReplica", "autoscaling_config": {"min_replicas": 0, "max_replicas": 2}}
    ]
    with deployed(beside) as served, pytest.raises(DeployFailed, match="min_replicas=0 is not allowed"):
        wait_until_serving(served, lambda elapsed_s: None)
    assert set(serve.status().applications) == OTHERS


def test_one_that_runs_and_does_not_answer_says_why(document):
    elsewhere = {**document, "http_options": {"host": "127.0.0.1", "port": free_port("127.0.0.1")}}
    with pytest.raises(DeployFailed, match="runs and does not answer: http://127.0.0.1:.*Connection refused"):
        wait_until_serving(elsewhere, lambda elapsed_s: None, answer_timeout_s=0.2)
