"""Every number of every configuration is finite and in its range, however the configuration came to be."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml

import cluster
import deployments
import selectn_core
from deployments.config import AppArgs, Strict, parse
from selectn_core.bounds import Bounds, numbers_of
from selectn_core.config import DeviceConfig
from selectn_core.errors import ConfigError

# Numbers without bounds of their own, and why.
EXEMPT = {
    ("AdmissionConfig", "max_queued_requests"): "made from RequestLimits, which has them",
    ("AdmissionConfig", "timeout_s"): "made from RequestLimits, which has them",
    ("BusConfig", "gpus"): "names, or indices that are compared with those there are",
}
REQUIRED = {"BusConfig": {"name": "a"}}
HUGE = 10**400  # no float
WRONG = [math.inf, -math.inf, math.nan, True, "many", HUGE, 1e300]


@cache
def configurations() -> list[type]:
    """Every configuration class of the three packages: frozen dataclasses by name, pydantic's by their base."""
    found: dict[str, type] = {}
    for package in (selectn_core, cluster, deployments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(module.name)).values()
            found |= {
                each.__name__: each
                for each in members
                if isinstance(each, type)
                and each.__module__ == module.name
                and ((is_dataclass(each) and each.__name__.endswith("Config")) or issubclass(each, Strict))
            }
    return [found[name] for name in sorted(found)]


def hints_of(section: type) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section, include_extras=True)
    if issubclass(section, Strict):
        names = list(section.model_fields)
    else:
        assert is_dataclass(section)
        names = [each.name for each in fields(section)]
    for name in names:
        yield name, hints[name]


def is_numeric(hint: Any) -> bool:
    return hint in (int, float) or any(map(is_numeric, get_args(hint)))


def numbers() -> list[tuple[type, str]]:
    return [(section, name) for section in configurations() for name in numbers_of(section)]


def make(section: type, **values: Any) -> Any:
    values = {**REQUIRED.get(section.__name__, {}), **values}
    return section(**values) if is_dataclass(section) else parse(section, values, where="values")


def test_the_configurations_are_found() -> None:
    names = {section.__name__ for section in configurations()}
    assert {"DeviceConfig", "SloConfig", "CoordinatorConfig", "TelemetryConfig", "BusConfig", "AppArgs"} <= names
    assert len(numbers()) > 30


@pytest.mark.parametrize("section", configurations(), ids=lambda section: section.__name__)
def test_every_number_has_bounds_or_a_reason_for_none(section) -> None:
    bounded = set(numbers_of(section))
    for name, hint in hints_of(section):
        assert not is_numeric(hint) or name in bounded or (section.__name__, name) in EXEMPT, f"{section}.{name}"


@pytest.mark.parametrize(("section", "name"), numbers(), ids=lambda each: getattr(each, "__name__", each))
def test_what_is_no_number_in_range_is_refused_by_name(section, name) -> None:
    number = numbers_of(section)[name]
    too_small = number.bounds.above
    if too_small is None:
        assert number.bounds.at_least is not None
        too_small = number.bounds.at_least - 1
    for value in [*WRONG, too_small, -1e9, *([2.5] if number.is_whole else [])]:
        with pytest.raises(ConfigError) as error:
            make(section, **{name: value})
        assert f"{name}={value!r} is not allowed: expected {number.allowed}" in str(error.value)


# Where each section stands in a document; None: at its top.
PLACES: dict[type, str | None] = {AppArgs: None, **{type(value): key for key, value in AppArgs().__dict__.items()}}


@pytest.mark.parametrize(
    ("section", "name"),
    [each for each in numbers() if each[0] in PLACES],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_what_is_read_from_a_file_is_refused_alike(section, name) -> None:
    """As the section stands in a document: pydantic makes it, and would take true for 1 and "inf" for infinity."""
    key = PLACES[section]
    for text in (".inf", "-.inf", ".nan", "true", "inf", "nan", "1" + "0" * 400, "[1]"):
        values = yaml.safe_load(f"{name}: {text}")
        with pytest.raises(ConfigError, match=rf"args: {f'{key}.' if key else ''}{name}=.*is not allowed: expected"):
            parse(AppArgs, {key: values} if key else values, where="args")


def test_the_ends_of_a_range_are_what_they_say() -> None:
    for section, name in numbers():
        number = numbers_of(section)[name]
        bounds = number.bounds
        assert number.allows(bounds.at_most if number.is_whole else float(bounds.at_most))
        assert not number.allows(math.nextafter(bounds.at_most, math.inf))
        assert bounds.at_least is None or number.allows(int(bounds.at_least) if number.is_whole else bounds.at_least)
        assert bounds.above is None or not number.allows(bounds.above)


def test_a_message_has_field_value_range_and_other_words() -> None:
    with pytest.raises(
        ConfigError, match="^device.memory_gib=inf is not allowed: expected more than 0, at most 1,048,576, or null$"
    ):
        DeviceConfig(memory_gib=math.inf)


def test_bounds_stand_on_the_whole_type() -> None:
    """On one part of a union they would not be seen."""
    for section in configurations():
        for name, hint in hints_of(section):
            inner = [part for part in get_args(hint) if get_origin(part) is Annotated]
            assert get_origin(hint) is Annotated or not inner, f"{section}.{name}"
            assert all(not isinstance(extra, Bounds) for part in inner for extra in get_args(part)[1:])
