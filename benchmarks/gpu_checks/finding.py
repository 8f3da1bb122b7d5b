"""What a check has found: a line of the table, and of the result file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "FAIL", "noted"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`holds` None: it is only noted. `figure` is for people; `value` and `target` say the same where it is a number.

    `target` reads like "<= 1.08".
    """

    check: str
    name: str
    figure: str
    holds: bool | None
    value: float | None = None
    target: str | None = None

    @property
    def verdict(self) -> Verdict:
        return "noted" if self.holds is None else "ok" if self.holds else "FAIL"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(check: str, name: str, value: float, target: str, *, unit: str = "") -> Finding:
    """A number against its target."""
    relation, limit = target.split()
    holds = value <= float(limit) if relation == "<=" else value >= float(limit)
    figure = f"{value:.4g}{unit} (target {target}{unit})"
    return Finding(check=check, name=name, figure=figure, holds=holds, value=value, target=target)


def noted(check: str, name: str, figure: str, value: float | None = None) -> Finding:
    return Finding(check=check, name=name, figure=figure, holds=None, value=value)


def failed(check: str, name: str, why: str) -> Finding:
    return Finding(check=check, name=name, figure=why, holds=False)


def do_all_hold(findings: Sequence[Finding]) -> bool:
    """Whether something was checked, and nothing fails."""
    return any(each.holds for each in findings) and all(each.holds is not False for each in findings)
