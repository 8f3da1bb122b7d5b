"""Mutants: functions of which one call that orders streams is taken out. They are found in the source."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import walk_packages
from types import CodeType, FunctionType

_ORDERING = {"wait", "wait_event", "wait_stream", "record_stream", "synchronize"}
_EVENTS = {"record", "copies_issued"}  # methods that return one; an event of torch has a `record`, of a stream, too


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`function` of a module with `code` in the place of its own."""

    module: str
    function: str
    what: str
    code: CodeType

    @property
    def name(self) -> str:
        return f"{self.module.removeprefix('selectn_core.')}.{self.function}: {self.what}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        function = importlib.import_module(self.module)
        for part in self.function.split("."):
            function = inspect.getattr_static(function, part)
        assert isinstance(function, FunctionType), f"{self.function} is decorated"
        own, function.__code__ = function.__code__, self.code
        try:
            yield
        finally:
            function.__code__ = own


def modules_of(package: str) -> list[str]:
    """All modules of a package and of the packages in it."""
    return [it.name for it in walk_packages([str(_path_of(package).parent)], f"{package}.") if not it.ispkg]


def mutants_of(modules: Sequence[str]) -> list[Mutant]:
    """One for every call, and for every event that is handed on as `after`, in the order of the source."""
    return [mutant for module in modules for mutant in _of_module(module)]


def source_of(module: str) -> str:
    return _path_of(module).read_text(encoding="utf-8")


def _path_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _of_module(module: str) -> Iterator[Mutant]:
    path, source, seen = _path_of(module), source_of(module), Counter[tuple[str, str]]()
    number = 0
    while (taken := _TakeOut(number, tree := ast.parse(source))).what is not None:
        number += 1
        seen[taken.where, taken.what] += 1
        nth = seen[taken.where, taken.what]
        code = _find(compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True), taken.where)
        yield Mutant(
            module=module, function=taken.where, what=taken.what if nth == 1 else f"{taken.what} ({nth})", code=code
        )


def _find(code: CodeType, qualname: str) -> CodeType:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == qualname:
                return inner
            if qualname.startswith(inner.co_qualname + "."):
                return _find(inner, qualname)
    raise LookupError(qualname)


class _TakeOut(ast.NodeTransformer):
    """Takes out the `number`-th of what orders streams: `what`, in the function `where`; None where there are fewer."""

    def __init__(self, number: int, tree: ast.Module) -> None:
        self._left = number
        self._scope: list[str] = []
        self._in_function = False
        self.what: str | None = None
        self.where = ""
        self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node, is_function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._within(node, is_function=True)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._within(node, is_function=True)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        for keyword in node.keywords:
            if keyword.arg == "after" and self._is_it("after="):
                keyword.value = ast.copy_location(ast.Constant(None), keyword.value)
                return node
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in _EVENTS and not node.args:
                if self._is_it(name):
                    node.func.attr = "never"  # an event that nothing comes before
                    return node
            elif (name in _ORDERING or name in _EVENTS) and self._is_it(name):
                return ast.copy_location(ast.Constant(None), node)
        return self.generic_visit(node)

    def _within(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, is_function: bool) -> ast.AST:
        if self._in_function:  # a part of the function around it
            return self.generic_visit(node)
        self._scope.append(node.name)
        self._in_function = is_function
        self.generic_visit(node)
        self._in_function = False
        self._scope.pop()
        return node

    def _is_it(self, what: str) -> bool:
        if self.what is not None or not self._in_function:
            return False
        self._left -= 1
        if self._left >= 0:
            return False
        self.what, self.where = what, ".".join(self._scope)
        return True
