"""What a check has found: frozen, plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is. A warning: it serves, and not as it should; an error: it does not serve."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`check` is what was looked at, `found` what is there, `do` what to do about it; empty: nothing."""

    check: str
    severity: Severity
    found: str
    do: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, severity=Severity.OK, found=found)


def note(check: str, found: str, do: str = "") -> Finding:
    return Finding(check=check, severity=Severity.NOTE, found=found, do=do)


def warning(check: str, found: str, do: str) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, found=found, do=do)


def error(check: str, found: str, do: str) -> Finding:
    return Finding(check=check, severity=Severity.ERROR, found=found, do=do)


def worst(findings: Iterable[Finding]) -> Severity:
    return max((each.severity for each in findings), default=Severity.OK)


def gib(num_bytes: float) -> str:
    """For people."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
