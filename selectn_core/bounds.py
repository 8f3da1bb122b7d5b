"""What a number in a configuration may be: each field says so once, and one check holds for all of them.

A field is declared as `Annotated[float | None, Bounds(above=0, at_most=120)]`. Frozen dataclasses call `check_numbers`
when they are made; pydantic, which parses sections, asks the same bounds; the command line calls `require_number`.
Infinity, NaN, booleans and text are no numbers here, whatever the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
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
    return next(_flaws(data, Any, "", frozenset(endless), least), None)


def _flaws(value: Any, hint: Any, path: str, endless: frozenset[str], least: float) -> Iterator[str]:
    if is_dataclass(value):
        for name, inner in _hints_of(cast(Any, type(value))).items():
            yield from _flaws(getattr(value, name), inner, f"{path}.{name}" if path else name, endless, least)
    elif isinstance(value, tuple | list):
        parts = get_args(hint)
        for index, each in enumerate(value):
            yield from _flaws(each, parts[0] if parts else Any, f"{path}.{index}", endless, least)
    elif not _is_sound(value, get_args(hint) or (hint,), path in endless, least):
        yield f"{path}={value!r}"


def _is_sound(value: Any, types: tuple[Any, ...], may_be_endless: bool, least: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        is_number_wanted = bool({int, float} & set(types)) and not {bool, str} & set(types)
        return not is_number_wanted or (value is None and type(None) in types)
    number = cast(float, value)
    if float not in types and isinstance(value, Integral):
        return bool({int, Any} & set(types)) and 0 <= number <= MOST_WHOLE
    is_wanted = float in types or Any in types
    return is_wanted and (least <= number <= MOST_NUMBER or (may_be_endless and number == math.inf))


@lru_cache(maxsize=256)
def _hints_of(section: Any) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {each.name: hints[each.name] for each in fields(section)}
