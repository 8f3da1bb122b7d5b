"""What a benchmark says of its checks: held, missed, or too noisy to say."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time

import pytest

from benchmarks.common import Check, finish
from benchmarks.noise import NoiseReport, NoiseWatch

QUIET = NoiseReport(taken_share=0.0, pace_spread=1.0)
NOISY = NoiseReport(taken_share=0.0, pace_spread=9.0)


@pytest.mark.parametrize(
    ("value", "is_timed", "noise", "holds"),
    [
        (1.0, True, QUIET, True),
        (1.0, True, NOISY, True),
        (0.5, True, QUIET, False),
        (0.5, True, None, False),
        (0.5, True, NOISY, None),
        (0.5, False, NOISY, False),
    ],
)
def test_only_a_timed_check_of_a_noisy_run_is_left_open(tmp_path, capsys, value, is_timed, noise, holds):
    file = tmp_path / "result.json"
    checks = [Check(name="ratio", value=value, target=">= 1", is_timed=is_timed)]
    code = finish(argparse.Namespace(json=file, quick=True), "measured", [], checks, noise)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["checks"][0]["holds"] is holds
    assert code == (1 if holds is False else 0)
    assert ("NOISY" in capsys.readouterr().out) == (holds is None)


def test_what_another_process_takes_is_noise():
    burner = multiprocessing.get_context("spawn").Process(target=_burn, daemon=True)
    with NoiseWatch() as watch:
        burner.start()
        time.sleep(1.5)
    burner.kill()
    burner.join()
    assert watch.report.taken_share * (os.cpu_count() or 1) > 0.3
    assert "of the CPUs" in str(watch.report)


def _burn() -> None:
    while True:
        pass
