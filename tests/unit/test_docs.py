"""The docs name what there is: every module, and only make targets that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.enumerate_intervals import markdown_tables
from tests.support.paths import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def modules() -> list[str]:
    found = []
    for package in ("selectn_core", "cluster", "deployments", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                found.append(str(path.relative_to(ROOT / package)))
    return found


@pytest.mark.parametrize("module", modules())
def test_every_module_has_its_line(module) -> None:
    assert f"- `{module}`: " in ARCHITECTURE


def test_every_line_has_its_module() -> None:
    assert set(re.findall(r"^- `([\w/]+\.py)`: ", ARCHITECTURE, flags=re.MULTILINE)) - set(modules()) <= {
        "device/__init__.py"
    }


def test_the_readmes_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_is_of_a_whole_run_and_its_script_is_among_the_figures(path: Path) -> None:
    assert json.loads(path.read_text(encoding="utf-8"))["quick"] is False
    assert f"`{path.stem}.py`" in (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")


def test_the_tables_of_the_algorithm_are_those_of_the_committed_result() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "enumerate_intervals.json").read_text(encoding="utf-8"))
    assert results["provenance"] == "modelled"
    assert not results["quick"]
    algorithm = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    for part in markdown_tables(results["samples"]).strip().split("\n\n"):
        assert part in algorithm
