"""What a file imports as it is imported, through the project's own modules: read from the source, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("selectn_core", "cluster", "deployments", "benchmarks", "tests")


def top_level_imports(path: Path) -> Iterator[str]:
    """Modules, and names in them, that a file imports at once: not in a function, nor for type checkers alone."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")).body)


@cache
def libraries_of(path: Path) -> frozenset[str]:
    """The top-level packages that are loaded with a file, other than the project's own."""
    found: set[str] = set()
    seen: set[Path] = set()
    left = [path]
    while left:
        current = left.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in _imports_of(current):
            files = _files(name)
            left += files
            if not files and name.split(".")[0] not in PACKAGES:
                found.add(name.split(".")[0])
    return frozenset(found)


@cache
def _imports_of(path: Path) -> tuple[str, ...]:
    return tuple(top_level_imports(path))


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The files that importing `name` loads: of its packages and of the module, or of one that a package loads late."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return ()
    files = [ROOT.joinpath(*parts[:length], "__init__.py") for length in range(1, len(parts) + 1)]
    files += [ROOT.joinpath(*parts[:length]).with_suffix(".py") for length in range(2, len(parts) + 1)]
    found = tuple(file for file in files if file.is_file())
    return found + _late(found[-1], parts[-1]) if found else ()


def _late(package: Path, name: str) -> tuple[Path, ...]:
    """Where a package that has `__getattr__` takes a name from: it says so to type checkers."""
    tree = ast.parse(package.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return ()
    checked = [node for node in tree.body if isinstance(node, ast.If) and _is_for_checkers(node)]
    taken = (each for node in checked for each in _imports(node.body))
    return tuple(file for each in taken if each.endswith(f".{name}") for file in _files(each.rpartition(".")[0]))


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and not _is_for_checkers(node):
            yield from _imports([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _imports(node.body)


def _is_for_checkers(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
