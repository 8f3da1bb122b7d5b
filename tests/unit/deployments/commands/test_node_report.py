"""`selectn node-report`, on this machine and on one with stand-in GPUs in every state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployments.cli import main
from deployments.config import IMPORT_PATH
from tests.standins.nvml import ROOT, StandIn


@pytest.fixture
def machine(tmp_path) -> StandIn:
    return StandIn(tmp_path)


def node_report(machine: StandIn, *options: str) -> str:
    """What the command prints in a process that loads the stand-in NVML."""
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", "node-report", *options],
        cwd=machine.directory,
        env={**os.environ, **machine.environment, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def config_file(directory: Path, **telemetry: object) -> Path:
    path = directory / "other.yaml"
    application = {"name": "a", "import_path": IMPORT_PATH, "args": {"telemetry": telemetry}}
    path.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    return path


def test_json_has_every_state(machine):
    machine.describe("gpus 3", "lost 0", "hang 1 nvmlDeviceGetPowerUsage", "error 2 nvmlDeviceGetTotalEccErrors 3")
    report = json.loads(node_report(machine, "--json", "--timeout-s", "2"))
    lost, hung, poor = report["gpus"]
    assert lost["trouble"]["cause"] == "gpu_lost"
    assert hung["trouble"]["cause"] == "timed_out"
    assert hung["temperature_c"] == 51
    assert poor["trouble"] is None
    assert poor["ecc_corrected_errors"]["cause"] == "not_supported"
    assert report["host"]["memory"]["available_bytes"] > 0


def test_text_names_values_and_reasons(machine):
    machine.describe("gpus 2", "error 1 nvmlDeviceGetHandleByIndex 15", "value 0 throttle_bits 4")
    text = node_report(machine)
    assert "NVML: driver stand-in, 2 GPUs" in text
    assert "GPU 0: Stand-in GPU, GPU-stand-in-0, at 00000000:10:00.0" in text
    assert "memory       1.0 GiB of 24.0 GiB used" in text
    assert "link         PCIe 1 x16 now, PCIe 4 x16 at most" in text
    assert "throttled    sw_power_cap" in text
    assert "TROUBLE      [gpu lost: GPU is lost]" in text
    assert "pcie-00000000:10:00.0: 23.9 GB/s, modelled from its PCIe links; found in the topology" in text


def test_buses_are_those_of_the_config(machine):
    bus = {"name": "mine", "gpus": [0, "GPU-stand-in-1"], "gb_per_s": 9}
    text = node_report(machine, "--config", str(config_file(machine.directory, buses=[bus])))
    assert "  mine: 9.0 GB/s, configured; configured; GPU-stand-in-0, GPU-stand-in-1" in text


def test_here_it_answers_whatever_hardware_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["node-report"]) == 0
    text = capsys.readouterr().out
    assert "NVML: " in text
    assert "available    " in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout-s", "0"], "--timeout-s=0.0 is not allowed: expected at least 0.001"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_call_is_a_short_error(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["node-report", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_bus_is_named(tmp_path, capsys):
    path = config_file(tmp_path, buses=[{"name": "x", "gb_per_s": -1}])
    assert main(["node-report", "--config", str(path)]) == 2
    assert "buses.0.gb_per_s=-1 is not allowed: expected more than 0" in capsys.readouterr().err
