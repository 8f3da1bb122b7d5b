"""Imports point one way, between packages and between rooms, never in a circle; private names have one place."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MAY_IMPORT = {
    "selectn_core": set(),
    "cluster": {"selectn_core"},
    "deployments": {"selectn_core", "cluster"},
}
# Bottom up: a room imports from the floors below its own, and from no other room on it. Files outside a room are rooms.
FLOORS = {
    "selectn_core": [
        {"errors"},
        {"bounds", "decision_log", "file_lock", "yaml_file"},
        {"config"},
        {"latency", "device"},
        {"requests"},
        {"weights"},
        {"memory"},
        {"batching", "planning"},
        {"offload"},
        {"control"},
        {"engine"},
        {"profiling"},
        {"start"},
    ],
    "cluster": [{"metrics", "protocol"}, {"bus", "node"}, {"coordinator", "replica"}, {"services"}],
    "deployments": [
        {"config", "prompt_length", "ray_calls"},
        {"declared", "messages"},
        {"serve_file"},
        {"neighbours"},
        {"ray_private"},
        {"api"},
        {"routing"},
        {"status"},
        {"dashboards", "http", "replica"},
        {"app", "commands"},
        {"cli"},
    ],
}
# They plan, or are pure, and import neither torch nor transformers.
WITHOUT_TORCH = (
    "selectn_core.latency.steps",
    "selectn_core.planning.planner",
    "selectn_core.planning.record_table",
    "selectn_core.control.controller",
    "selectn_core.control.policies",
    "deployments.cli",
    "deployments.commands.plan",
    "deployments.commands.doctor.checks",
)
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


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in MAY_IMPORT
    for path in files_of(package)
}


def room_of(module: str) -> str:
    return module.split(".")[1]


def project_imports(module: str) -> set[str]:
    """The project's modules that one imports, under TYPE_CHECKING too."""
    named = set(imported_modules(MODULES[module])) & set(MODULES) - {module, *MAY_IMPORT}
    # `from package.room import module` names the room as well: what is meant is the module.
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)}


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_its_floor(package: str) -> None:
    rooms = [room for floor in FLOORS[package] for room in floor]
    assert sorted(rooms) == sorted({room_of(name) for name in MODULES if name.startswith(f"{package}.")})


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_from_the_floors_below(package: str) -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS[package]) for room in floor}
    for module in MODULES:
        if not module.startswith(f"{package}."):
            continue
        for other in project_imports(module):
            if other.startswith(f"{package}.") and room_of(other) != room_of(module):
                assert floor_of[room_of(other)] < floor_of[room_of(module)], f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({module: project_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_who_plans_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
