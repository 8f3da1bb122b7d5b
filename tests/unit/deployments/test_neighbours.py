"""What runs in a cluster that is joined stays, what is in the way or missing is named, what is left behind goes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from deployments.commands import serving
from deployments.commands.serving import cleaned_up, free_port, require_free_port
from deployments.config import IMPORT_PATH
from deployments.neighbours import RunningApp, RunningServe, missing_resources, with_neighbours
from selectn_core.errors import ConfigError
from tests.support.store_users import StoreUser, names

OTHER = {"name": "other", "route_prefix": "/other", "import_path": "a:b", "args": {"x": 1}}
EARLIER = {"name": "selectn", "route_prefix": "/", "import_path": IMPORT_PATH, "args": {"num_replicas": 2}}
RUNNING = RunningServe(
    http_options={"host": "0.0.0.0", "port": 8000, "root_path": ""},
    target_capacity=50.0,
    apps=(
        RunningApp(name="other", route_prefix="/other", config=OTHER),
        RunningApp(name="selectn", route_prefix="/", config=EARLIER),
        RunningApp(name="in code", route_prefix="/code", config=None),
    ),
)


def document(**app: object) -> dict:
    mine = {"name": "mine", "route_prefix": "/mine", "import_path": IMPORT_PATH, **app}
    return {"http_options": {"host": "127.0.0.1", "port": 9000}, "applications": [mine]}


def test_the_others_go_in_as_they_were_deployed():
    mine = document()
    whole = with_neighbours(mine, RUNNING, asked=())
    assert whole["applications"] == [OTHER, EARLIER, *mine["applications"]]
    assert whole["http_options"] == RUNNING.http_options
    assert whole["target_capacity"] == 50.0


def test_one_of_the_same_name_that_we_build_is_updated():
    mine = document(name="selectn", route_prefix="/", args={"num_replicas": 3})
    assert with_neighbours(mine, RUNNING, asked=())["applications"] == [OTHER, *mine["applications"]]


@pytest.mark.parametrize(
    ("app", "asked", "message"),
    [
        ({"route_prefix": "/other"}, (), "application 'other' has route_prefix '/other': choose another for 'mine'"),
        ({"route_prefix": "/code"}, (), "application 'in code' has route_prefix '/code'"),
        ({"name": "other"}, (), "there is another application named 'other'"),
        ({"name": "in code"}, (), "there is another application named 'in code'"),
        ({}, ("port",), "http_options.port=9000, but Serve runs with 8000 and cannot change it: leave it out"),
        ({}, ("host", "port"), "host='127.0.0.1', but .*; http_options.port=9000"),
    ],
)
def test_everything_in_the_way_is_named(app, asked, message):
    with pytest.raises(ConfigError, match=f"what runs in this cluster is in the way: .*{message}"):
        with_neighbours(document(**app), RUNNING, asked)


@pytest.mark.parametrize(
    ("option", "wanted", "message"),
    [
        ("request_timeout_s", 5.0, "http_options.request_timeout_s=5.0, but Serve runs with None and cannot change it"),
        ("keep_alive_timeout_s", 90, None),
        ("ssl_certfile", "cert.pem", "http_options.ssl_certfile cannot be looked up"),
        ("ssl_keyfile_password", "wanted-pass", "http_options.ssl_keyfile_password is not what Serve runs with"),
    ],
)
def test_no_option_that_is_asked_for_is_dropped_silently(option, wanted, message):
    have = {**RUNNING.http_options, "request_timeout_s": None, "keep_alive_timeout_s": 90, "ssl_keyfile_password": "p"}
    running, mine = replace(RUNNING, http_options=have), document()
    mine["http_options"][option] = wanted
    if message is None:
        assert with_neighbours(mine, running, (option,))["http_options"] == have
        return
    with pytest.raises(ConfigError, match=message) as error:
        with_neighbours(mine, running, (option,))
    assert "wanted-pass" not in str(error.value)


@pytest.mark.parametrize(
    ("app", "total", "missing"),
    [
        ({"args": {"device": {"kind": "cuda"}}}, {"CPU": 8.0}, "1 replica.s. need 1 GPU each and the cluster has 0"),
        ({"args": {"device": {"kind": "cuda"}, "num_replicas": 3}}, {"CPU": 8.0, "GPU": 2.0}, "3 .* has 2"),
        ({"args": {"device": {"kind": "cuda"}}}, {"CPU": 8.0, "GPU": 1.0}, None),
        ({"args": {"device": {"kind": "auto"}}}, {"CPU": 8.0}, None),
        ({}, {"CPU": 8.0}, None),
        ({"args": {"num_replicas": 9}}, {"CPU": 0.5}, "9 .* need 0.1 CPU each and the cluster has 0.5"),
        (
            {"deployments": [{"name": "SelectNReplica", "ray_actor_options": {"resources": {"lab": 1}}}]},
            {"CPU": 8.0},
            "1 lab each and the cluster has 0",
        ),
        ({"deployments": [{"name": "SelectNReplica", "num_replicas": "auto"}]}, {"CPU": 8.0}, None),
    ],
)
def test_what_a_cluster_lacks_is_named(app, total, missing):
    found = missing_resources(document(**app), total)
    if missing is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(missing, found)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "a\0b", "ü" * 70])
def test_a_host_that_is_none_is_a_short_error(host):
    with pytest.raises(ConfigError, match="port 0 on .* cannot be used"):
        require_free_port(host, 0)
    with pytest.raises(ConfigError, match="port 0 on .* cannot be used"):
        free_port(host)


@pytest.mark.parametrize("phase", ["building", "built"])
def test_what_stopped_replicas_leave_in_host_memory_is_removed(phase, tmp_path, monkeypatch):
    """As after Ctrl-C while the model loads: Ray kills whoever has not ended by then."""
    for name in ("memory", "files", "configured"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(serving, "SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(serving, "FILES", tmp_path / "files")
    configured = document(args={"host": {"directory": str(tmp_path / "configured")}})
    in_use = StoreUser(tmp_path / "memory", "bb")
    assert in_use.says() == "built"
    with cleaned_up(configured):
        for name in ("memory", "files", "configured"):
            user = StoreUser(tmp_path / name, "aa", pause_at_chunk=2 if phase == "building" else None)
            assert user.says() == ("paused" if phase == "building" else "built")
            user.kill()
            assert list(names(tmp_path / name))
    assert list(names(tmp_path / "memory")) == ["bb"]
    assert [*names(tmp_path / "files"), *names(tmp_path / "configured")] == []
    in_use.close()
