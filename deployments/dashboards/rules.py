"""Recording rules and alerts for Prometheus, from the table of metrics.

Burn rates follow the multi-window alerts of Google's SRE workbook, chapter 5: a long window says that it matters, a
short one that it goes on still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from cluster.metrics.table import BY_NAME

# Of requests, the share that is to meet both objectives.
TARGET = 0.99
WINDOWS = ("5m", "30m", "1h", "6h")
# Burn rate, the windows it must exceed in, and how bad that is: 14.4 uses 2 % of a month's budget in an hour.
LEAST_REQUESTS = 20  # in the long window: of fewer one that is late says little
BURNS = ((14.4, "1h", "5m", "critical"), (6.0, "6h", "30m", "warning"))


@dataclass(frozen=True, kw_only=True)
class Alert:
    """`summary` is what is wrong. What to do is in docs/operations.md, under the alert's name."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "runbook": f"docs/operations.md#{self.name.lower()}"},
        }


def _of(name: str) -> str:
    return BY_NAME[name].exported


def _offered(window: str) -> str:
    had, unserved = _of("selectn_slo_requests"), _of("selectn_ingress_unserved_requests")
    return (
        f'(sum(increase({had}{{objective="both"}}[{window}])) or vector(0))'
        f" + (sum(increase({unserved}[{window}])) or vector(0))"
    )


def _missed(window: str) -> str:
    had, unserved = _of("selectn_slo_requests"), _of("selectn_ingress_unserved_requests")
    return (
        f'(sum(increase({had}{{objective="both",met="false"}}[{window}])) or vector(0))'
        f' + (sum(increase({unserved}{{met="false"}}[{window}])) or vector(0))'
    )


def recording_rules() -> list[dict[str, Any]]:
    """Missed share and burn rate over each window; no value while nothing is offered."""
    rules = []
    for window in WINDOWS:
        missed = f"selectn:slo_missed:ratio_{window}"
        rules.append({"record": missed, "expr": f"({_missed(window)}) / (({_offered(window)}) > 0)"})
        rules.append({"record": f"selectn:slo_burn_rate:{window}", "expr": f"{missed} / {1 - TARGET:.4g}"})
    return rules


ALERTS = (
    *(
        Alert(
            name=f"SelectNObjectivesMissed{'Fast' if severity == 'critical' else 'Slowly'}",
            expr=f"selectn:slo_burn_rate:{long} > {burn} and selectn:slo_burn_rate:{short} > {burn}"
            f" and ({_offered(long)}) >= {LEAST_REQUESTS}",
            lasts="2m",
            severity=severity,
            summary=f"Requests miss their latency objectives {burn} times as often as {1 - TARGET:.0%} allows.",
        )
        for burn, long, short, severity in BURNS
    ),
    Alert(
        name="SelectNEngineDown",
        expr=f"min by (WorkerId, model_name) ({_of('selectn_engine_up')}) == 0",
        lasts="15s",  # Serve replaces it within half a minute
        severity="critical",
        summary="A replica's engine does not serve.",
    ),
    Alert(
        name="SelectNNoReplica",
        expr=f"max({_of('selectn_ingress_known_replicas')}) == 0",
        lasts="5m",
        severity="critical",
        summary="The ingresses know no replica.",
    ),
    Alert(
        name="SelectNLinkBelowShare",
        expr=(
            f"{_of('selectn_link_measured_bytes_per_second')} < 0.7 * {_of('selectn_link_share_bytes_per_second')}"
            f" and {_of('selectn_offloaded_units')} > 0"
            f" and rate({_of('selectn_link_copied_bytes')}[5m]) > 0"  # it is measured by what it carries
        ),
        lasts="5m",
        severity="warning",
        summary="A replica's link gives less than 70 % of its share of the bus.",
    ),
    Alert(
        name="SelectNHostMemoryLow",
        expr=(
            f"{_of('selectn_host_memory_available_bytes')} < 0.05 * {_of('selectn_host_memory_limit_bytes')}"
            f" or {_of('selectn_host_memory_pressure_percent')} > 20"
        ),
        lasts="5m",
        severity="warning",
        summary="A node has less than 5 % of its host memory left, or tasks wait for memory.",
    ),
    Alert(
        name="SelectNGpuLost",
        expr=f"{_of('selectn_gpu_up')} == 0",
        lasts="1m",
        severity="critical",
        summary="A GPU is lost, needs a reset, or its driver hangs.",
    ),
    Alert(
        name="SelectNCoordinatorStale",
        expr=(
            f"max({_of('selectn_coordinator_report_age_seconds')}) > 30"
            f" or min({_of('selectn_coordinator_lease_left_seconds')}) <= 0"
            f" or (count({_of('selectn_coordinator_lease_left_seconds')}) > 0"
            f" unless count({_of('selectn_coordinator_report_age_seconds')}) > 0)"
        ),
        lasts="1m",
        severity="warning",
        summary="There is no coordinator, a node does not report to it, or a replica's lease on its bus has run out.",
    ),
    Alert(
        name="SelectNPredictionsOff",
        expr=f"{_of('selectn_prediction_error_ratio')} > 0.25 and rate({_of('selectn_step_seconds')}_count[15m]) > 0",
        lasts="15m",
        severity="warning",
        summary="Predicted step times are off by more than a quarter.",
    ),
)


def rules_file() -> str:
    """The file of rules, as YAML."""
    groups = [
        {"name": "selectn-objectives", "interval": "15s", "rules": recording_rules()},
        {"name": "selectn-alerts", "rules": [alert.rule() for alert in ALERTS]},
    ]
    return str(yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000))
