"""What a command line meets at its edges is one short error with exit code 2, never a traceback."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import yaml

from deployments import cli
from deployments.cli import EXIT_BROKEN_PIPE, EXIT_TERMINATED, main
from selectn_core.errors import RecordRefused
from selectn_core.planning.record import PerformanceRecord
from tests.support.records import layer_record

COMMANDS = {
    "serve": ["serve", "--config"],
    "profile": ["profile", "--config"],
    "node-report": ["node-report", "--config"],
    "plan": ["plan", "--record"],
}
BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 90)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- 1\n",
    "a number": b"3\n",
    "text": b"just words\n",
    "broken": b"a: [",
    "not UTF-8": b"a: caf\xe9",
    "NUL": b"a: \0",
    "a bomb": BOMB.encode(),
    "itself": b"a: &a [*a]",
    "deep": b"[" * 3000,
    "another type": b"applications: {import_path: 3}\nversion: [1]\n",
    "nulls": b"applications: [null]\nversion: 1\nmemory: null\nlink: null\nsteps: null\n",
}


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    """No serve_config.yaml to be found, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path / "cache"))


def short_error(capsys, argv: list[str]) -> str:
    """What `selectn argv` complains about; it must have exit code 2 and say no more than that."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("selectn: error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3, err
    assert "starting" not in out
    return err


# All read YAML in one way: every kind of file for one of them, and one kind for every one.
@pytest.mark.parametrize(
    ("command", "kind"), [*(("plan", kind) for kind in CONTENTS), *((command, "another type") for command in COMMANDS)]
)
def test_a_file_that_is_none_of_ours_is_named(command, kind, tmp_path, capsys):
    path = tmp_path / "file.yaml"
    path.write_bytes(CONTENTS[kind])
    expected = "file.yaml" if command == "plan" else "applications: expected a list"
    assert expected in short_error(capsys, [*COMMANDS[command], str(path)])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_named(command, tmp_path, capsys):
    assert "cannot be read: Is a directory" in short_error(capsys, [*COMMANDS[command], str(tmp_path)])
    assert "none.yaml: cannot be read: No such file" in short_error(capsys, [*COMMANDS[command], "none.yaml"])
    assert "cannot be read: File name too long" in short_error(capsys, [*COMMANDS[command], "a" * 300])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--port", "99999"], "--port=99999 is not allowed: expected at least 0, at most 65,535"),
        (["serve", "--port", "-1"], "--port=-1 is not allowed"),
        (["serve", "--device-memory-gib", "inf"], "device.memory_gib=inf is not allowed"),
        (["serve", "--link-gb-per-s", "nan"], "device.link_gb_per_s=nan is not allowed"),
        (["serve", "--kv-tokens", "9" * 30], "batch.kv_tokens=9999"),
        (["serve", "--model", "./" + "a" * 300], "there is no such file or directory"),
        (["serve", "--model", "."], "has no config.json: it has cache, notes.txt"),
        (["serve", "--address", ""], "--address='' is not allowed: expected host:port"),
        (["serve", "--address", "127.0.0.1:99999"], "127.0.0.1:99999: expected a port from 1 to 65,535"),
        (["serve", "--config", ""], "a file's name is '': expected a path"),
        (["plan", "--record", ""], "a file's name is '': expected a path"),
        (["demo", "--device-memory-gib", "0"], "device.memory_gib=0.0 is not allowed"),
        (["demo", "--link-gb-per-s", "inf"], "device.link_gb_per_s=inf is not allowed"),
        (["demo", "--device", "emulated", "--model", "./nowhere"], "there is no such file or directory"),
        (["demo", "--json", "."], ". cannot be written: Is a directory"),
        (["demo", "--json", "/proc/none/report.json"], "cannot be written"),
        (["profile", "--budget-s", "inf"], "--budget-s=inf is not allowed: expected more than 0, at most 86,400"),
        (["profile", "--budget-s", "nan"], "--budget-s=nan is not allowed"),
        (["profile", "--tpot-ms", "-1"], "--tpot-ms=-1.0 is not allowed"),
        (["profile", "--out", "."], ". cannot be written: Is a directory"),
        (["profile", "--plot", "."], ". cannot be written: Is a directory"),
        (["plan", "--batch", "0"], "--batch=0 is not allowed: expected at least 1"),
        (["plan", "--batch", "9" * 30], "--batch=9999"),
        (["plan", "--tpot-ms", "inf"], "--tpot-ms=inf is not allowed"),
        (["plan", "--device-gib", "nan"], "--device-gib=nan is not allowed"),
        (["plan", "--admitted", "-1"], "--admitted=-1 is not allowed"),
        (["node-report", "--timeout-s", "inf"], "--timeout-s=inf is not allowed"),
        (["node-report", "--timeout-s", "nan"], "--timeout-s=nan is not allowed"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_before_anything_starts(argv, message, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert message in short_error(capsys, argv)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_cache_that_cannot_be_made_is_said_before_anything_starts(command, monkeypatch, capsys):
    monkeypatch.setenv("SELECTN_CACHE_DIR", "/proc/none")
    error = short_error(capsys, [command, "--device", "emulated"])
    assert "the cache directory /proc/none cannot be used: No such file or directory; set SELECTN_CACHE_DIR" in error


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, capsys):
    """As in a container that runs with a user id of its own."""
    for name in ("HOME", "XDG_CACHE_HOME", "SELECTN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987_654)
    assert "there is no cache directory" in short_error(capsys, ["serve", "--device", "emulated"])
    assert "there is no such file or directory" in short_error(
        capsys, ["serve", "--model", "~none/m", "--num-offloaded", "1"]
    )


def test_a_host_that_is_none_is_named(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    document = {"http_options": {"host": "a" * 300}, "applications": [{"import_path": "deployments.app:build_app"}]}
    path.write_text(yaml.safe_dump(document))
    assert "on aaaa" in short_error(capsys, ["serve", "--config", str(path)])


@pytest.mark.parametrize("argv", [["plan", "--record", "record.yaml"], ["plan", "--help"]])
def test_whoever_reads_may_stop_reading(argv, tmp_path, monkeypatch, capsys):
    """`selectn plan | head` ends as other programs do, without a word."""
    layer_record().save(tmp_path / "record.yaml")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(argv) == EXIT_BROKEN_PIPE
        stdout.write("what is left at the interpreter's end goes nowhere")
    assert capsys.readouterr().err == ""


def test_sigterm_ends_a_command_in_order(monkeypatch):
    """As an exception: what it holds is given back. Afterwards the signal is as it was."""
    given_back = []

    def run(args: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            given_back.append(True)

    monkeypatch.setattr(cli, "COMMANDS", (lambda commands: commands.add_parser("run").set_defaults(run=run),))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["run"])
    assert (ended.value.code, given_back) == (EXIT_TERMINATED, [True])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda plain: plain["link"].update(bytes_per_s=float("inf")), "link.bytes_per_s=inf"),
        (lambda plain: plain["link"].update(bytes_per_s=0), "a link without bandwidth"),
        (lambda plain: plain["link"].update(copy_s=float("nan")), "link.copy_s=nan"),
        (lambda plain: plain["link"].update(slowdown="fast"), "link.slowdown='fast'"),
        (lambda plain: plain["memory"].update(resident_bytes=-1), "memory.resident_bytes=-1"),
        (lambda plain: plain["memory"].update(resident_bytes=True), "memory.resident_bytes=True"),
        (lambda plain: plain["steps"][0].update(rest_s=-1.0), "steps.0.rest_s=-1.0"),
        (lambda plain: plain["steps"][0].update(kind_s=[float("inf")]), "steps.0.kind_s.0=inf"),
        (lambda plain: plain.update(unit_kinds=[7]), "as many kinds as there are"),
        (lambda plain: plain.update(steps=[]), "damaged"),
        (lambda plain: plain.update(kinds=None), "damaged"),
    ],
)
def test_a_record_that_nothing_can_have_measured_is_refused(change, flaw, tmp_path, capsys):
    path = tmp_path / "record.yaml"
    layer_record().save(path)
    plain = yaml.safe_load(path.read_text())
    change(plain)
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(RecordRefused, match="record.yaml is damaged"):
        PerformanceRecord.load(path)
    assert flaw in short_error(capsys, ["plan", "--record", str(path)])


def test_a_link_of_which_nothing_was_seen_while_computing_is_as_measured(tmp_path):
    path = tmp_path / "record.yaml"
    layer_record().save(path)
    plain = yaml.safe_load(path.read_text())
    plain["link"]["busy_bytes_per_s"] = float("inf")
    path.write_text(yaml.safe_dump(plain))
    record = PerformanceRecord.load(path)
    assert record.link.link.bytes_per_s == record.link.bytes_per_s
