"""`selectn doctor` as it is called: on this machine, and on one whose GPUs are the stand-in NVML's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.commands.doctor.command import subject_of
from deployments.config import IMPORT_PATH, REPLICA_NAME
from selectn_core.device.host_memory import SHARED_MEMORY
from tests.standins.nvml import StandIn
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # it loads torch, and Ray's schema of the config


def doctor(directory: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", "doctor", *options],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SELECTN_CACHE_DIR": str(directory / "cache"), **environment},
        check=False,
        capture_output=True,
        text=True,
    )


def ours() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("selectn-*")}


def test_on_this_machine_it_answers_and_leaves_nothing_behind(tmp_path) -> None:
    before = ours()
    done = doctor(tmp_path, str(ROOT / "serve_config.yaml"))
    assert done.returncode in (0, 1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok       config")
    assert not any("this could not be looked at" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
    assert ours() == before


def test_a_stand_in_for_gpus_says_what_it_is_and_its_slow_link_is_found(tmp_path) -> None:
    machine = StandIn(tmp_path)
    machine.describe("gpus 2", "value 1 pcie_width 8")
    done = doctor(tmp_path, "--json", **machine.environment)
    report = json.loads(done.stdout)
    assert report["config"] == "the default configuration"
    device = next(each for each in report["findings"] if each["check"] == "device")
    assert "stand-in has 2 GPUs" in device["found"]
    link = {each["found"]: each["severity"] for each in report["findings"] if each["check"] == "link"}
    assert any("GPU 1: PCIe" in found and severity == "warning" for found, severity in link.items()), link
    assert report["worst"] in ("warning", "error")
    assert done.returncode == (2 if report["worst"] == "error" else 1)


def test_a_config_that_is_not_there_is_an_error(tmp_path) -> None:
    done = doctor(tmp_path, "none.yaml", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["findings"][0]["severity"] == "error"


@pytest.mark.parametrize("scaled", ["num_replicas: 7", "autoscaling_config: {min_replicas: 1, max_replicas: 7}"])
def test_replicas_that_deployments_declare_count(tmp_path, scaled: str) -> None:
    (tmp_path / "serve.yaml").write_text(
        f"""
applications:
  - name: selectn
    route_prefix: /
    import_path: {IMPORT_PATH}
    deployments: [{{name: {REPLICA_NAME}, {scaled}}}]
"""
    )
    (args,) = subject_of(tmp_path / "serve.yaml", machine=None).apps
    assert args.num_replicas == 7
