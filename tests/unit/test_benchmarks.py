"""No benchmark is broken unseen: each can be imported, says what it does, and takes the options that all have."""

from __future__ import annotations

import importlib

import pytest

from tests.support.paths import ROOT

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if path.stem != "common" and "parse_arguments(" in path.read_text(encoding="utf-8")  # gpu_check runs others
)


def test_there_are_scripts() -> None:
    assert {"bench_slo", "bench_deciding"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert {"--quick", "--json"} <= set(capsys.readouterr().out.replace("[", " ").replace("]", " ").split())
