"""A wrong configuration is refused before anything starts, and says what to change."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments import app as app_module
from deployments.app import build_app, resolve_device
from deployments.config import IMPORT_PATH, NUM_CONTROL_CALLS, AppArgs, parse
from deployments.serve_file import load_yaml
from selectn_core.config import DeviceConfig, EngineConfig
from selectn_core.errors import ConfigError
from tests.support.paths import ROOT


def test_the_defaults_are_the_engines_defaults():
    assert AppArgs().engine == EngineConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"batch": {"page_sise": 16}}, "unknown key 'batch.page_sise'; did you mean 'page_size'?"),
        ({"limits": {"max_body": 1}}, "unknown key 'limits.max_body'; did you mean 'max_body_bytes'?"),
        ({"slo": {"zzz": 1}}, "known keys: loosest, percentile, tightest, tpot_ms, ttft_ms"),
        ({"batch": {"page_size": "big"}}, r"args: batch\.page_size='big' is not allowed: .*whole number"),
        ({"batch": {"page_size": 1}}, "batch.page_size=1 is not allowed: expected at least 4"),
        ({"device": {"kind": "gpu"}}, "device.kind='gpu' is not allowed: expected one of auto, cuda"),
        ({"num_replicas": 0}, "args: num_replicas=0 is not allowed: expected at least 1, at most 1,048,576"),
        ({"offload": None}, "args.offload: None is not allowed: expected a dictionary"),
        ({"batch": {"page_size": 1}, "num_replicas": 0}, r"(?s)page_size.*num_replicas"),
        (
            {"telemetry": {"buses": [{"name": "a"}, {"name": "b", "gb_per_sec": 1}]}},
            r"buses\.1\.gb_per_sec'; did you mean",
        ),
        ({"telemetry": {"buses": [{"name": "a b"}]}}, "buses.name='a b' is not allowed"),
        ({"cluster": {"lease": 3}}, "unknown key 'cluster.lease'; did you mean 'lease_s'?"),
        ({"cluster": {"lease_s": 0}}, "cluster.lease_s=0 is not allowed: expected more than 0, at most 120"),
        ({"cluster": {"lease_s": 4, "period_s": 2}}, "cluster.period_s=2.0 .* at most a quarter of cluster.lease_s: 1"),
        ({"cluster": {"host_gib": -1}}, "cluster.host_gib=-1 is not allowed"),
        ({"headroom_period_s": 5}, "headroom_period_s=5 is not allowed: expected at least 0.01, at most 2.5"),
        ({"max_ongoing_requests": 1}, "max_ongoing_requests=1 is not allowed: expected at least 48"),
        ({"batch": {1: 2}}, "unknown key 'batch.1'"),
        ([], "valid dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(AppArgs, values, where="args")


def test_serve_itself_reports_the_same():
    with pytest.raises(ValidationError, match="did you mean 'model'"):
        AppArgs.model_validate({"modle": {}})


@pytest.mark.parametrize(
    ("args", "grace_s"),
    [
        ({}, 10 + 256 * 0.25),
        ({"slo": {"ttft_ms": 2000, "tpot_ms": 100}}, 2 + 256 * 0.1),
        ({"slo": {"tpot_ms": 100}, "limits": {"default_max_tokens": 1000}}, 10 + 1000 * 0.1),
        ({"slo": {"ttft_ms": 100, "tpot_ms": 1}}, 10),
        ({"slo": {"ttft_ms": 1e9, "tpot_ms": 1e9}}, 600),
        ({"shutdown_grace_s": 3, "slo": {"tpot_ms": 100}}, 3),
    ],
)
def test_the_grace_covers_an_answer_within_the_objectives(args, grace_s):
    parsed = parse(AppArgs, args, where="args")
    assert parsed.resolved_shutdown_grace_s == pytest.approx(grace_s)
    app = build_app(parsed)
    deployments = {app._bound_deployment.name: app._bound_deployment}
    replica = app._bound_deployment.init_args[0]._bound_deployment
    deployments[replica.name] = replica
    assert {
        name: each._deployment_config.graceful_shutdown_timeout_s for name, each in deployments.items()
    } == pytest.approx({"SelectNIngress": grace_s, "SelectNReplica": grace_s})


def test_numbers_may_be_strings_as_on_a_command_line():
    assert parse(AppArgs, {"offload": {"num_offloaded": "3"}}, where="args").offload.num_offloaded == 3


def test_all_waiting_is_done_in_the_engine_unless_configured_otherwise():
    args = AppArgs()
    assert args.resolved_max_ongoing_requests() > args.batch.max_requests + args.batch.max_waiting
    least = args.batch.max_requests + NUM_CONTROL_CALLS
    assert AppArgs(max_ongoing_requests=least).resolved_max_ongoing_requests() == least


@pytest.mark.parametrize(
    ("args", "cores_by_node", "num_ingresses"),
    [
        ({}, [], 1),
        ({}, [0, 2, 15.5], 1),
        ({}, [16], 1),
        ({}, [0, 31, 32], 3),
        ({}, [8, 1000], 2),
        ({"num_ingress_replicas": 1}, [128], 1),
        ({"num_ingress_replicas": 3}, [2], 3),
    ],
)
def test_there_are_as_many_ingresses_as_configured_or_by_the_cores_of_each_node(
    args, cores_by_node, num_ingresses, monkeypatch
):
    monkeypatch.setattr(app_module, "cores_by_node", lambda: cores_by_node)
    ingress = app_module.build_app(AppArgs.model_validate(args))._bound_deployment
    assert ingress._deployment_config.num_replicas == num_ingresses


def test_the_cores_are_those_of_the_nodes_that_are_there(monkeypatch):
    assert app_module.cores_by_node() == []  # outside a cluster
    nodes = [
        {"Alive": True, "Resources": {"CPU": 16.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert app_module.cores_by_node() == [16.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "num_gpus", "resolved"),
    [("auto", 0, "emulated"), ("auto", 2, "cuda"), ("cuda", 0, "cuda"), ("emulated", 2, "emulated")],
)
def test_the_device_is_resolved_from_the_clusters_gpus(kind, num_gpus, resolved):
    assert resolve_device(DeviceConfig(kind=kind), num_gpus).kind == resolved


class TestYaml:
    @staticmethod
    def write(path: Path, application: dict, **top: object) -> Path:
        document = {"applications": [{"name": "a", "import_path": IMPORT_PATH, **application}], **top}
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    def test_the_repositorys_own_config_is_valid_and_says_the_defaults(self):
        document = load_yaml(ROOT / "serve_config.yaml")
        assert parse(AppArgs, document["applications"][0]["args"], where="args") == AppArgs()

    def test_its_commented_keys_are_valid_and_say_the_defaults_too(self):
        text = (ROOT / "serve_config.yaml").read_text(encoding="utf-8")
        args = text.split("    args:\n")[1].split("    # Changing user_config")[0]
        uncommented = yaml.safe_load(re.sub(r"^( +)# ( *\w+:)", r"\1\2", args, flags=re.MULTILINE))
        assert set(uncommented) == set(AppArgs.model_fields)
        assert parse(AppArgs, uncommented, where="args") == AppArgs()

    def test_wrong_args_are_found(self, tmp_path):
        path = self.write(tmp_path / "c.yaml", {"args": {"batch": {"kv_tokens": 0}}})
        with pytest.raises(ConfigError, match=r"c\.yaml: args: batch\.kv_tokens=0 is not"):
            load_yaml(path)

    def test_wrong_user_config_is_found(self, tmp_path):
        deployment = {"name": "SelectNReplica", "user_config": {"ofload": {}}}
        path = self.write(tmp_path / "c.yaml", {"deployments": [deployment]})
        with pytest.raises(ConfigError, match="user_config: unknown key 'ofload'; did you mean 'offload'"):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("application", "top", "message"),
        [
            ({}, {"http_option": {"port": 1}}, "unknown key 'http_option'; did you mean 'http_options'"),
            ({}, {"http_options": {"prot": 1}}, "unknown key 'http_options.prot'; did you mean 'port'"),
            ({"route_prefx": "/"}, {}, "unknown key 'applications.0.route_prefx'; did you mean 'route_prefix'"),
            (
                {"deployments": [{"name": "SelectNReplica", "num_replcas": 2}]},
                {},
                "unknown key 'applications.0.deployments.0.num_replcas'; did you mean 'num_replicas'",
            ),
            (
                {"deployments": [{"name": "SelectNReplica", "autoscaling_config": {"max_replcas": 2}}]},
                {},
                "autoscaling_config.max_replcas'; did you mean 'max_replicas'",
            ),
        ],
    )
    def test_keys_that_serve_would_drop_are_found(self, tmp_path, application, top, message):
        path = self.write(tmp_path / "c.yaml", application, **top)
        with pytest.raises(ConfigError, match=f"c.yaml: {message}" if top else message):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("deployments", "message"),
        [
            ([None], "expected a list of deployments, each with a name"),
            ({"name": "SelectNReplica"}, "expected a list of deployments, each with a name"),
            ([{"num_replicas": 2}], "expected a list of deployments, each with a name"),
            ([{"name": "SelectNReplika"}], "there is no deployment 'SelectNReplika'; did you mean 'SelectNReplica'"),
            ([{"name": "SelectNReplica", "num_replicas": 0}], "num_replicas"),
            (
                [{"name": "SelectNReplica", "max_ongoing_requests": 1}],
                "SelectNReplica.max_ongoing_requests=1 is not allowed: expected at least 48",
            ),
            ([{"name": "SelectNReplica", "user_config": [1]}], "user_config: .* expected a mapping"),
            ([{"name": "SelectNReplica", "user_config": {"slo": {"tpot_ms": math.inf}}}], "slo.tpot_ms=inf is not"),
            (
                [{"name": "SelectNReplica", "autoscaling_config": {"policy": {"policy_function": "none:such"}}}],
                "Serve cannot read it: No module named 'none'",
            ),
            ([{"name": "SelectNIngress", "user_config": {"slo": {}}}], "SelectNIngress.user_config=.* expected none"),
            (
                [{"name": "SelectNReplica", "autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}],
                "SelectNReplica.autoscaling_config.min_replicas=0 is not allowed: expected at least 1",
            ),
            (
                [{"name": "SelectNReplica", "autoscaling_config": {"initial_replicas": 0, "max_replicas": 4}}],
                "autoscaling_config.initial_replicas=0 is not allowed: expected at least 1",
            ),
        ],
    )
    def test_what_serve_would_take_and_cannot_work_is_found(self, tmp_path, deployments, message):
        path = self.write(tmp_path / "c.yaml", {"deployments": deployments})
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("replica", "message"),
        [
            (
                {"health_check_period_s": math.inf},
                "deployments.0.health_check_period_s=inf .* a finite number",
            ),
            ({"user_config": {"slo": {"ttft_ms": math.nan}}}, "user_config.slo.ttft_ms=nan .* expected a finite"),
            ({"num_replicas": 10**400}, "deployments.0.num_replicas=1000.* expected a finite number, less than 2.63"),
            ({"num_replicas": 1 << 40}, "SelectNReplica.num_replicas=.* expected at least 1, at most 1,048,576"),
            ({"health_check_period_s": 1e30}, "SelectNReplica.health_check_period_s=1e.30 is not .* at most 86,400"),
            ({"health_check_timeout_s": 1e30}, "SelectNReplica.health_check_timeout_s"),
            ({"graceful_shutdown_timeout_s": 1e30}, "SelectNReplica.graceful_shutdown_timeout_s"),
            ({"ray_actor_options": {"num_cpus": 1e30}}, "ray_actor_options.num_cpus=1e.30 is not allowed"),
            ({"ray_actor_options": {"memory": 1e30}}, "ray_actor_options.memory=1e.30 is not allowed"),
            ({"ray_actor_options": {"resources": {"lab": -1}}}, "ray_actor_options.resources"),
            ({"ray_actor_options": {"resources": {"lab": 1e30}}}, "ray_actor_options.resources.lab=1e.30"),
            (
                {"ray_actor_options": {"accelerator_type": "a\0"}},
                "accelerator_type='a.x00' .* text without NUL",
            ),
            ({"ray_actor_options": {"resources": {"a\0": 1}}}, "resources='a.x00' .* expected text without NUL"),
        ],
    )
    def test_values_that_no_deployment_can_mean_are_found(self, tmp_path, replica, message):
        path = self.write(tmp_path / "c.yaml", {"deployments": [{"name": "SelectNReplica", **replica}]})
        with pytest.raises(ConfigError, match=f"c.yaml: .*{message}"):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("application", "top", "message"),
        [
            ({}, {"http_options": {"request_timeout_s": -1}}, "http_options.request_timeout_s=-1.* is not allowed"),
            ({}, {"http_options": {"request_timeout_s": math.inf}}, "http_options.request_timeout_s=inf is not"),
            ({}, {"http_options": {"host": "a\0b"}}, "http_options.host='a.x00b' is not allowed"),
            ({}, {"grpc_options": {"port": 99_999}}, "grpc_options.port=99999 is not allowed: .* at most 65,535"),
            ({"route_prefix": ""}, {}, "route_prefix"),
            ({"args": {"model": {"served_name": ""}}}, {}, "model.served_name='' is not allowed: expected some text"),
            ({"args": {"model": {"revision": " "}}}, {}, "model.revision=' ' is not allowed"),
            ({"args": {"device": {"bus": ""}}}, {}, "device.bus='' is not allowed"),
            ({"args": {"limits": {"api_keys_file": ""}}}, {}, "limits.api_keys_file='' is not allowed"),
            ({"args": {"limits": {"api_keys_env": ""}}}, {}, "limits.api_keys_env='' is not allowed"),
        ],
    )
    def test_values_that_nobody_can_mean_are_found(self, tmp_path, application, top, message):
        path = self.write(tmp_path / "c.yaml", application, **top)
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)

    @pytest.mark.parametrize("port", [99_999, -1])
    def test_ports_are_ports(self, tmp_path, port):
        path = self.write(tmp_path / "c.yaml", {}, http_options={"port": port})
        with pytest.raises(ConfigError, match=f"http_options.port={port} is not allowed: .* at most 65,535"):
            load_yaml(path)

    def test_a_deployment_that_scales_is_taken(self, tmp_path):
        scaling = {"min_replicas": 1, "max_replicas": 4, "policy": {"policy_function": "math:sqrt"}}
        replica = {"name": "SelectNReplica", "autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 1}}
        path = self.write(tmp_path / "c.yaml", {"deployments": [replica, {"name": "SelectNIngress"}]})
        assert load_yaml(path)["applications"][0]["deployments"][0] == replica

    def test_what_serve_refuses_is_found(self, tmp_path):
        path = self.write(tmp_path / "c.yaml", {}, http_options={"port": "many"})
        with pytest.raises(ConfigError, match=r"c\.yaml\.http_options\.port: 'many' is not"):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a mapping"),
            ("a: [", "is not YAML"),
            ("a: 2020-13-45", "is not YAML"),
            ("a: " + "[" * 5000, "nested too deeply"),
            (
                "a: &a [1, 1, 1]\n"
                + "".join(f"{x}: &{x} [{', '.join(['*' + y] * 99)}]\n" for y, x in pairwise("abcdefg")),
                "200,000 values",
            ),
            ("a: &a [*a]", "200,000 values"),
            ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
            ("1: 2\nb: 3\napplications: [{import_path: 'deployments.app:build_app'}]", "unknown key '1'"),
            ("applications: [{import_path: 'deployments.app:build_app', args: [1]}]", "args: expected a valid dict"),
            ("- 1", "expected a mapping"),
            ("applications: 3", "expected a list of applications"),
            ("applications: [{import_path: 'x:y'}]", "none has import_path"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, text, message):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
            load_yaml(tmp_path / "none.yaml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read: Is a directory"),
            (b"a: caf\xe9", "byte 6 is not UTF-8"),
            (b"a: \0", "is not YAML"),
            (b"#" * (16 << 20) + b"#", "is larger than 16,777,216 bytes"),
        ],
    )
    def test_what_is_no_text_is_said(self, tmp_path, content, message):
        path = tmp_path / "c.yaml"
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"c.yaml: .*{message}"):
            load_yaml(path)
