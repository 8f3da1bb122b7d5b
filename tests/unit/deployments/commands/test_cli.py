"""The command line's answers that need no server."""

from __future__ import annotations

import argparse
import socket

import pytest

from deployments.cli import build_parser, main
from deployments.commands import serve as serve_command
from deployments.commands.serving import base_urls, free_port, last_error
from selectn_core.errors import ConfigError
from tests.support.tiny_checkpoint import save_tiny_llama


def parse_serve(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", *options])


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    """No serve_config.yaml to be found."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [[], ["serve"], ["profile"], ["plan"], ["doctor"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    assert "examples:\n  selectn " in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("selectn 0")


@pytest.mark.parametrize("argv", [[], ["srve"], ["serve", "--prot", "1"]])
def test_a_wrong_call_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: selectn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--num-offloaded", "most"], "offload.num_offloaded"),
        (["--kv-tokens", "0"], "batch.kv_tokens=0 is not allowed: expected at least 1"),
    ],
)
def test_a_wrong_configuration_is_a_short_error(options, message, capsys):
    assert main(["serve", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= 2


def test_a_port_in_use_is_a_short_error(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    expected = f"selectn: error: port {port} on 127.0.0.1 is in use; choose another with --port\n"
    assert capsys.readouterr().err == expected


def test_a_cluster_that_is_not_there_is_a_short_error(capsys):
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    assert main(["serve", "--address", address]) == 2
    expected = f"selectn: error: cannot join the Ray cluster at {address}: Connection refused\n"
    assert capsys.readouterr().err == expected


def test_options_are_put_into_the_default_application():
    args = parse_serve("--model", "./m", "--num-offloaded", "3", "--device-memory-gib", "0.5", "--port", "9")
    document = serve_command.configured_document(args)
    assert document["http_options"] == {"host": "127.0.0.1", "port": 9}
    assert document["applications"][0]["args"] == {
        "model": {"source": "./m"},
        "device": {"memory_gib": 0.5},
        "offload": {"num_offloaded": "3"},
    }


def test_options_override_a_config_file(tmp_path, capsys):
    path = tmp_path / "serve_config.yaml"
    path.write_text(
        "applications: [{name: a, import_path: 'deployments.app:build_app',"
        " args: {model: {source: x, dtype: float32}}}]",
        encoding="utf-8",
    )
    document = serve_command.configured_document(parse_serve("--model", "y"))
    assert document["applications"][0]["args"]["model"] == {"source": "y", "dtype": "float32"}
    assert capsys.readouterr().out == "using serve_config.yaml\n"


@pytest.mark.parametrize(
    ("options", "in_file", "asked"),
    [
        ([], None, set()),
        (["--port", "9"], None, {"port"}),
        (["--port", "0"], None, set()),
        ([], "{host: 0.0.0.0, port: 8000}", {"host", "port"}),
        (["--port", "0"], "{host: 0.0.0.0, port: 8000}", {"host"}),
    ],
)
def test_http_options_must_be_those_of_a_joined_cluster_only_where_somebody_asked(options, in_file, asked, tmp_path):
    if in_file is not None:
        (tmp_path / "serve_config.yaml").write_text(
            f"http_options: {in_file}\napplications: [{{import_path: 'deployments.app:build_app'}}]", encoding="utf-8"
        )
    assert serve_command._asked_options(parse_serve(*options)) == asked


def test_a_server_stays_on_this_machine_unless_told_otherwise(tmp_path):
    """Serve's own default for a config file is every interface."""
    (tmp_path / "c.yaml").write_text("applications: [{import_path: 'deployments.app:build_app'}]", encoding="utf-8")
    document = serve_command.configured_document(parse_serve("--config", "c.yaml"))
    assert document["http_options"] == {"host": "127.0.0.1"}


def test_model_paths_are_made_absolute_and_must_exist(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    document = serve_command.configured_document(parse_serve("--model", "./m"))
    serve_command.resolve_local_models(document)
    assert document["applications"][0]["args"]["model"]["source"] == str(tmp_path / "m")
    document = serve_command.configured_document(parse_serve("--model", "./none"))
    with pytest.raises(ConfigError, match="there is no such file or directory"):
        serve_command.resolve_local_models(document)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Traceback:\n  File\nselectn_core.errors.ConfigError: a=1 is\nnot allowed", "a=1 is\nnot allowed"),
        ("failed 1 times. Error:\nray.x.ActorDiedError: died\nValueError: bad", "bad"),
        ("just words: here", "just words: here"),
    ],
)
def test_serves_messages_are_cut_to_what_is_wrong(message, expected):
    assert last_error(message) == expected


def test_port_0_is_a_free_port():
    document = serve_command.configured_document(parse_serve("--port", "0"))
    assert document["http_options"]["port"] > 0
    assert free_port("127.0.0.1") > 0


def test_base_urls_are_ones_a_client_can_use():
    application = {"name": "a", "import_path": "deployments.app:build_app", "route_prefix": "/llm"}
    document = {"http_options": {"host": "0.0.0.0", "port": 81}, "applications": [application]}
    assert base_urls(document) == ["http://127.0.0.1:81/llm"]
    assert base_urls({**document, "applications": [{**application, "route_prefix": None}]}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget-s", "0"], "--budget-s=0.0 is not allowed: expected more than 0"),
        (["--max-length", "1"], "--max-length=1 is not allowed: expected at least 16"),
        (["--model", "./nowhere"], "no such directory"),
        (["--link-gb-per-s", "0"], "device.link_gb_per_s=0.0 is not allowed"),
        (["--out", "/proc/record.yaml"], "/proc/record.yaml cannot be written"),
    ],
)
def test_a_profile_that_cannot_be_made_is_a_short_error(options, message, capsys):
    assert main(["profile", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_is_gone_on_with_only_where_something_longer_is_asked_for(tmp_path, capsys):
    model = save_tiny_llama(tmp_path / "model")

    def profiled(max_length: int) -> str:
        options = ["--model", str(model), "--device", "emulated", "--out", "record.yaml", "--budget-s", "30"]
        assert main(["profile", *options, "--max-length", str(max_length)]) == 0
        return capsys.readouterr().out

    first = profiled(64)
    assert "shapes, complete" in first
    assert profiled(32) == profiled(64) == first
    assert profiled(256) != first
