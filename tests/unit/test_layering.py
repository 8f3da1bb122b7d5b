"""Imports point one way, deployments -> cluster -> selectn_core, and private names of libraries have one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "selectn_core": set(),
    "cluster": {"selectn_core"},
    "deployments": {"selectn_core", "cluster"},
}
# Which file may touch a library's private parts, and what they are called.
PRIVATE_PLACES = {
    "transformers.generation.continuous_batching": "selectn_core/batching/",
    "ray._private": "deployments/ray_private.py",
    "ray.serve._private": "deployments/ray_private.py",
}


def imported_modules(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    assert files_of(package), f"{package} has no files: is this test looking in the right place?"
    for path in files_of(package):
        wrong = {name for name in imported_modules(path) if name.split(".")[0] in forbidden}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_core_imports_no_ray() -> None:
    for path in files_of("selectn_core"):
        assert "ray" not in {name.split(".")[0] for name in imported_modules(path)}, path.name


@pytest.mark.parametrize(("prefix", "place"), PRIVATE_PLACES.items())
def test_private_names_are_touched_in_one_place(prefix: str, place: str) -> None:
    touching = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in files_of(package)
        if any(name.startswith(prefix) for name in imported_modules(path))
    }
    assert touching
    assert all(path.startswith(place) for path in touching)
