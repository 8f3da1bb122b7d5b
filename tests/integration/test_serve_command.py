"""`selectn serve` as a user starts and stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.processes import alive, is_loopback, listening_addresses

STOP_TIMEOUT_S = 40


@pytest.fixture
def more_environment() -> dict[str, str]:
    return {}


@pytest.fixture
def server(checkpoint, tmp_path, more_environment) -> Iterator[subprocess.Popen[str]]:
    """`selectn serve` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "deployments.cli", "serve", "--port", "0", "--model", checkpoint]
    options = ["--device", "emulated", "--num-offloaded", "1", "--kv-tokens", "512"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [*command, *options],
        env={**environment, **more_environment, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the one that contains `text`."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was not printed:\n" + "\n".join(lines))


@pytest.mark.parametrize(
    ("signum", "more_environment", "num_direct", "more_nice"),
    [
        (signal.SIGINT, {}, 0, 0),
        (signal.SIGTERM, {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_worker_niceness": "1"}, 1, 1),
    ],
)
def test_it_answers_and_a_signal_to_its_group_leaves_nothing_behind(server, tmp_path, signum, num_direct, more_nice):
    lines = read_until(server, "Ctrl-C stops the server.")
    (curl,) = [line for line in lines if line.startswith("curl ")]
    (url,) = [line.removeprefix("ready: ") for line in lines if line.startswith("ready: ")]
    direct_urls = [line.partition("proxy: ")[2] for line in lines if line.startswith("without Serve's proxy: ")]
    assert len(direct_urls) == num_direct
    for each in (url, *direct_urls):
        asked = curl.replace(url, each)
        answer = json.loads(subprocess.check_output(["bash", "-c", f"{asked} --silent --noproxy '*'"]))
        assert answer["usage"]["completion_tokens"] > 0
    processes = psutil.Process(server.pid).children(recursive=True)
    assert len(processes) > 5
    replicas = [each for each in processes if "ServeReplica" in " ".join(each.cmdline())]
    # What Ray would do by itself: have its workers wait for all other processes.
    assert {each.nice() for each in replicas} == {psutil.Process(server.pid).nice() + more_nice}
    assert {each for each in listening_addresses(processes) if not is_loopback(each)} == set()

    # As a terminal on Ctrl-C, and as `timeout` or systemd, which end Ray's processes too before anything else.
    os.killpg(server.pid, signum)

    *said, last = server.stdout.read().splitlines()
    assert last == "stopped"
    # Ingresses that answer by themselves take longer to stop, and Ray logs meanwhile that its processes have gone.
    assert [line for line in said if not (num_direct and "task_manager.cc" in line)] == []
    assert server.wait(STOP_TIMEOUT_S) == 0
    assert not alive(processes)
    # Had Ray kept a token there, `ray start` would ask for it from now on, and `serve deploy` fail.
    assert not (tmp_path / ".ray" / "auth_token").exists()


def test_a_signal_while_the_model_loads_stops_it_too(server):
    read_until(server, "loading ")
    processes = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGTERM)
    server.send_signal(signal.SIGINT)
    assert server.stdout.read().splitlines()[-1] == "stopped"
    assert server.wait(STOP_TIMEOUT_S) == 0
    assert not alive(processes)
