"""The bounds on recovery: what they follow from, and that the docs state what they are."""

from __future__ import annotations

import re

import pytest
from ray.serve._private.constants import DEFAULT_HEALTH_CHECK_PERIOD_S

from deployments.commands.recovery import LOSSES, Surroundings, recovery_bounds_s
from deployments.config import AppArgs
from tests.support.paths import ROOT

OPERATIONS = ROOT / "docs" / "operations.md"
_ROW = re.compile(r"^\| (?P<loss>[a-z ]+) \| [^|]+ \| (?P<seconds>[\d.]+) s \| [^|]+ \|$", re.MULTILINE)


def args(**sections: dict[str, float]) -> AppArgs:
    return AppArgs.model_validate(sections)


def test_the_docs_state_the_bounds_of_the_default_configuration() -> None:
    rows = {row["loss"]: float(row["seconds"]) for row in _ROW.finditer(OPERATIONS.read_text(encoding="utf-8"))}
    assert rows == recovery_bounds_s(AppArgs(), Surroundings())
    assert tuple(rows) == LOSSES


def test_the_default_health_check_is_serves() -> None:
    assert Surroundings().health_check_period_s == DEFAULT_HEALTH_CHECK_PERIOD_S


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("cluster", "lease_s", 30.0), ("telemetry", "period_s", 5.0), ("telemetry", "deadline_s", 3.0)],
)
def test_a_longer_period_is_a_later_recovery(section, key, value) -> None:
    before = recovery_bounds_s(AppArgs(), Surroundings())
    after = recovery_bounds_s(args(**{section: {key: value}}), Surroundings())
    # An agent is back whatever the lease is.
    later = {loss for loss in LOSSES if after[loss] > before[loss]}
    assert later == set(LOSSES) - ({"agent killed"} if key == "lease_s" else set())


def test_a_node_takes_longest_since_it_takes_a_replica_and_an_agent_with_it() -> None:
    bounds_s = recovery_bounds_s(AppArgs(), Surroundings())
    assert bounds_s["node lost"] > bounds_s["replica killed"] + bounds_s["agent killed"]
