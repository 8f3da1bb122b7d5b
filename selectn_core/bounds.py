"""What a number in a configuration may be: each field says so once, and one check holds for all of them.

A field is declared as `Annotated[float | None, Bounds(above=0, at_most=120)]`. Frozen dataclasses call `check_numbers`
when they are made; pydantic, which parses sections, asks the same bounds; the command line calls `require_number`.
Infinity, NaN, booleans and text are no numbers here, whatever the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from selectn_core.errors import ConfigError


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises ConfigError naming the field, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}={value!r} is not allowed: expected {allowed}")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number, beside its type. `at_most` is required: no number here is endless."""

    at_most: float
    at_least: float | None = None
    above: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's hook for a type that is annotated with this."""
        from pydantic_core import PydanticCustomError, ValidationError, core_schema

        number = Number.of(source, self)

        def validated(value: Any, inner: Any) -> Any:
            try:
                parsed = None if isinstance(value, bool) else inner(value)
            except ValidationError:
                parsed = None
            if not number.allows(parsed) or (parsed is None and value is not None):
                raise PydanticCustomError("number", f"expected {number.allowed}")
            return parsed

        return core_schema.no_info_wrap_validator_function(validated, handler(source))


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number's type and bounds together; `words` may stand for it, and None where it `is_optional`."""

    bounds: Bounds
    is_whole: bool
    is_optional: bool
    words: tuple[str, ...]

    @classmethod
    def of(cls, annotation: Any, bounds: Bounds) -> Number:
        """`annotation`: int or float, in a union with None or a Literal of words."""
        parts = get_args(annotation) or (annotation,)
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        return cls(
            bounds=bounds, is_whole=float not in parts, is_optional=type(None) in parts, words=tuple(map(str, words))
        )

    def allows(self, value: Any) -> bool:
        """Whether the field may have this value. Comparisons with NaN are false, so it never passes."""
        if value is None or isinstance(value, str):
            return self.is_optional if value is None else value in self.words
        if isinstance(value, bool) or not isinstance(value, Integral if self.is_whole else Real):
            return False
        bounds, number = self.bounds, cast(float, value)
        is_enough = (bounds.at_least is None or number >= bounds.at_least) and (
            bounds.above is None or number > bounds.above
        )
        return bool(is_enough and number <= bounds.at_most)

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        bounds = self.bounds
        limits = (("more than", bounds.above), ("at least", bounds.at_least), ("at most", bounds.at_most))
        ranges = ", ".join(f"{word} {limit:,.10g}" for word, limit in limits if limit is not None)
        others = "".join(f", or {other}" for other in (*map(repr, self.words), *(["null"] * self.is_optional)))
        return f"{ranges}{' (a whole number)' if self.is_whole else ''}{others}"


@lru_cache(maxsize=256)
def numbers_of(section: Any) -> dict[str, Number]:
    """The fields of a configuration class that have bounds."""
    found = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        if get_origin(hint) is Annotated:
            annotation, *extras = get_args(hint)
            for bounds in (extra for extra in extras if isinstance(extra, Bounds)):
                found[name] = Number.of(annotation, bounds)
    return found


def check_numbers(section: Any, where: str) -> None:
    """Raises ConfigError, naming field, value and range, for the first of a configuration's numbers that is wrong."""
    for name, number in numbers_of(cast(Any, type(section))).items():
        value = getattr(section, name)
        require(number.allows(value), f"{where}.{name}", value, number.allowed)


def require_number(name: str, value: object, *, bounds: Bounds, is_whole: bool = False) -> None:
    """As `check_numbers`, for one number that is not in a configuration; None is one that was not given."""
    number = Number(bounds=bounds, is_whole=is_whole, is_optional=True, words=())
    require(number.allows(value), name, value, number.allowed)


# -- messages and files: data that another process made ---------------------------------------------------------------

MOST_WHOLE, MOST_NUMBER = (1 << 63) - 1, 1e300


def flaw_in(data: Any, *, endless: Collection[str] = (), least: float = -MOST_NUMBER) -> str | None:
    """The first number in a dataclass, at any depth, that is not what its field's type says; None: all are.

    Unpickling makes an object without asking its class, so whoever takes one from another process asks here. Whole
    numbers are 0 to 2^63, others finite and `least` or more; fields of the paths in `endless` may be infinite.
    """
    return _flaw_of(data, "", endless, least)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a field's type says of numbers in it, at any depth of tuples and unions."""

    name: str
    is_whole: bool
    is_number: bool
    may_be_else: bool  # None, or text


def _flaw_of(data: Any, path: str, endless: Collection[str], least: float) -> str | None:
    for kind in _kinds_of(cast(Any, type(data))):
        flaw = _flaw(getattr(data, kind.name), kind, f"{path}{kind.name}", endless, least)
        if flaw is not None:
            return flaw
    return None


def _flaw(value: Any, kind: _Kind, path: str, endless: Collection[str], least: float) -> str | None:
    of = type(value)
    if isinstance(value, Real) and of is not bool:
        value = value if of is int or of is float else int(value) if isinstance(value, Integral) else float(value)
        of = type(value)  # numpy's own, too
        is_in_range = 0 <= value <= MOST_WHOLE if kind.is_whole else least <= value <= MOST_NUMBER
        is_sound = (of is int or not kind.is_whole) and (is_in_range or (value == math.inf and path in endless))
        return None if is_sound or not kind.is_number else f"{path}={value!r}"
    if of is tuple or of is list:
        flaws = (_flaw(each, kind, f"{path}.{index}", endless, least) for index, each in enumerate(value))
        return next((flaw for flaw in flaws if flaw is not None), None)
    if hasattr(of, "__dataclass_fields__"):
        return _flaw_of(value, f"{path}.", endless, least)
    is_else = kind.may_be_else and (value is None or of is str)
    return f"{path}={value!r}" if kind.is_number and not is_else else None


@lru_cache(maxsize=256)
def _kinds_of(section: Any) -> tuple[_Kind, ...]:
    hints, kinds = get_type_hints(section), []
    for each in fields(section):
        parts = set(_parts(hints[each.name]))
        others = parts & {str, type(None), bool}
        is_number = bool(parts & {int, float}) and bool not in parts
        kinds.append(_Kind(name=each.name, is_whole=float not in parts, is_number=is_number, may_be_else=bool(others)))
    return tuple(kinds)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)
