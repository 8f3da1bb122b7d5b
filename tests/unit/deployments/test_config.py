"""A wrong configuration is refused before anything starts, and says what to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import resolve_device
from deployments.config import IMPORT_PATH, AppArgs, ReplicaUserConfig, load_yaml, parse
from selectn_core.config import DeviceConfig, EngineConfig
from selectn_core.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]


def test_the_defaults_are_the_engines_defaults():
    assert AppArgs().engine == EngineConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"batch": {"page_sise": 16}}, "unknown key 'batch.page_sise'; did you mean 'page_size'?"),
        ({"limits": {"max_body": 1}}, "unknown key 'limits.max_body'; did you mean 'max_body_bytes'?"),
        ({"slo": {"zzz": 1}}, "known keys: loosest, percentile, tightest, tpot_ms, ttft_ms"),
        ({"batch": {"page_size": "big"}}, r"args\.batch\.page_size: 'big' is not allowed: .* integer"),
        ({"batch": {"page_size": 1}}, "batch.page_size=1 is not allowed: expected at least 4"),
        ({"device": {"kind": "gpu"}}, "device.kind='gpu' is not allowed: expected one of auto, cuda"),
        ({"num_replicas": 0}, "num_replicas: 0 is not allowed: expected greater than or equal to 1"),
        ({"offload": None}, "args.offload: None is not allowed: expected a dictionary"),
        ({"batch": {"page_size": 1}, "num_replicas": 0}, r"(?s)page_size.*num_replicas"),
        (
            {"telemetry": {"buses": [{"name": "a"}, {"name": "b", "gb_per_sec": 1}]}},
            r"buses\.1\.gb_per_sec'; did you mean",
        ),
        ({"telemetry": {"buses": [{"name": "a b"}]}}, "buses.name='a b' is not allowed"),
        ({"cluster": {"lease": 3}}, "unknown key 'cluster.lease'; did you mean 'lease_s'?"),
        ({"cluster": {"lease_s": 0}}, "cluster.lease_s=0.0 is not allowed: expected more than 0, at most 120"),
        ({"cluster": {"lease_s": 4, "period_s": 2}}, "cluster.period_s=2.0 .* at most a quarter of cluster.lease_s: 1"),
        ({"cluster": {"host_gib": -1}}, "cluster.host_gib=-1.0 is not allowed"),
        ([], "valid dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(AppArgs, values, where="args")


def test_serve_itself_reports_the_same():
    with pytest.raises(ValidationError, match="did you mean 'model'"):
        AppArgs.model_validate({"modle": {}})


def test_numbers_may_be_strings_as_on_a_command_line():
    assert parse(AppArgs, {"offload": {"num_offloaded": "3"}}, where="args").offload.num_offloaded == 3


def test_all_waiting_is_done_in_the_engine_unless_configured_otherwise():
    args = AppArgs()
    assert args.resolved_max_ongoing_requests() > args.batch.max_requests + args.batch.max_waiting
    assert AppArgs(max_ongoing_requests=7).resolved_max_ongoing_requests() == 7


def test_user_config_is_checked_as_strictly():
    wanted = parse(ReplicaUserConfig, {"offload": {"num_offloaded": 2}}, where="user_config")
    assert wanted.offload.num_offloaded == 2
    with pytest.raises(ConfigError, match="did you mean 'num_offloaded'"):
        parse(ReplicaUserConfig, {"offload": {"num_ofloaded": 2}}, where="user_config")
    with pytest.raises(ConfigError, match=r"user_config\.offload\.num_offloaded"):
        parse(ReplicaUserConfig, {"offload": {}}, where="user_config")


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
        document = load_yaml(REPOSITORY / "serve_config.yaml")
        assert parse(AppArgs, document["applications"][0]["args"], where="args") == AppArgs()

    def test_its_commented_keys_are_valid_and_say_the_defaults_too(self):
        text = (REPOSITORY / "serve_config.yaml").read_text(encoding="utf-8")
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

    def test_keys_that_serve_would_drop_are_found(self, tmp_path):
        path = self.write(tmp_path / "c.yaml", {}, http_option={"port": 1})
        with pytest.raises(ConfigError, match="unknown key 'http_option'; did you mean 'http_options'"):
            load_yaml(path)

    def test_what_serve_refuses_is_found(self, tmp_path):
        path = self.write(tmp_path / "c.yaml", {}, http_options={"port": "many"})
        with pytest.raises(ConfigError, match=r"c\.yaml\.http_options\.port: 'many' is not"):
            load_yaml(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [", "is not YAML"),
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
