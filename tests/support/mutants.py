"""Mutants: functions of which one call that orders streams is taken out."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

# Taken out where they are statements of their own.
_ORDERING = {"record", "wait", "wait_event", "wait_stream", "record_stream", "synchronize"}


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


def mutants_of(modules: Sequence[str]) -> list[Mutant]:
    """One for every call, and for every event that is handed on as `after`, in the order of the source."""
    return [mutant for module in modules for mutant in _of_module(module)]


def _of_module(module: str) -> Iterator[Mutant]:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    source, seen = path.read_text(encoding="utf-8"), dict[tuple[str, str], int]()
    number = 0
    while True:
        tree = ast.parse(source)
        taking = _TakeOut(number)
        taking.visit(tree)
        if taking.what is None:
            return
        key = (taking.where, taking.what)
        seen[key] = seen.get(key, 0) + 1
        what = taking.what if seen[key] == 1 else f"{taking.what} ({seen[key]})"
        code = _find(compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True), taking.where)
        yield Mutant(module=module, function=taking.where, what=what, code=code)
        number += 1


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

    def __init__(self, number: int) -> None:
        self._left = number
        self._scope: list[str] = []
        self._in_function = False
        self.what: str | None = None
        self.where = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node, is_function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._within(node, is_function=True)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        name = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
        if name in _ORDERING and self._is_it(name):
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        for keyword in node.keywords:
            if keyword.arg == "after" and self._is_it("after="):
                keyword.value = ast.copy_location(ast.Constant(None), keyword.value)
                return node
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "record"
            and not node.args
            and self._is_it("record")
        ):
            node.func.attr = "never"  # an event that nothing comes before
        return self.generic_visit(node)

    def _within(self, node: ast.ClassDef | ast.FunctionDef, *, is_function: bool) -> ast.AST:
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
