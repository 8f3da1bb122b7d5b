"""What is made from the table of metrics is current, and Prometheus and Grafana can read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.metrics.table import METRICS
from deployments.cli import main
from deployments.dashboards import grafana
from deployments.dashboards.queries import PANELS
from deployments.dashboards.reference import reference_page
from deployments.dashboards.rules import ALERTS, TARGET, rules_file
from tests.support.paths import ROOT

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's prometheus has it)")
EXPORTED = {
    metric.exported + suffix
    for metric in METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expr))


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)


def test_the_page_of_metrics_is_current() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == reference_page()


def test_the_dashboard_is_current() -> None:
    assert grafana.BUILT.read_text(encoding="utf-8") == grafana.built()


def test_the_dashboard_shows_every_panel() -> None:
    shown = [panel for panel in json.loads(grafana.BUILT.read_text())["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in shown] == [panel.title for panel in PANELS]
    assert all(panel["description"] for panel in shown)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_panels_ask_for_what_there_is(panel) -> None:
    for query in panel.queries:
        assert names_in(query.expr) <= EXPORTED
        assert names_in(query.expr) or query.expr.startswith("selectn:")


def test_rules_ask_for_what_there_is() -> None:
    for group in yaml.safe_load(rules_file())["groups"]:
        for rule in group["rules"]:
            assert names_in(rule["expr"]) <= EXPORTED


def test_every_alert_has_its_paragraph() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [alert.name for alert in ALERTS if f"#### {alert.name}\n" not in page] == []


@needs_promtool
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(rules_file())
    assert promtool("check", "rules", str(path)).returncode == 0


def constant(name: str, labels: str, first: float, step: float) -> dict[str, str]:
    return {"series": f"{name}{{{labels}}}", "values": f"{first:g}+{step:g}x800"}


def case(alert: str, at: str, series: list[dict[str, str]], *, fires: bool) -> dict:
    expected = [alert] if fires else []
    return {
        "interval": "15s",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": f'count by (alertname) (ALERTS{{alertname="{alert}",alertstate="firing"}})',
                "eval_time": at,
                "exp_samples": [{"labels": f'{{alertname="{each}"}}', "value": 1} for each in expected],
            }
        ],
    }


def slo(met: str, per_step: float) -> dict[str, str]:
    return constant("ray_selectn_slo_requests_total", f'objective="both",met="{met}"', 0, per_step)


def steps_up(met: str, number: int) -> dict[str, str]:
    """From 0, which is there from the start, to a number, after 26 minutes."""
    name = 'ray_selectn_slo_requests_total{objective="both",met="' + met + '",WorkerId="w"}'
    return {"series": name, "values": f"0x104 {number}x600"}


def gauge(name: str, value: float, labels: str = 'WorkerId="w"') -> dict[str, str]:
    return constant(f"ray_selectn_{name}", labels, value, 0)


CASES = [
    case("SelectNObjectivesMissedFast", "2h", [slo("true", 8), slo("false", 2)], fires=True),
    case("SelectNObjectivesMissedFast", "2h", [slo("true", 90), slo("false", 10)], fires=False),
    case("SelectNObjectivesMissedSlowly", "2h", [slo("true", 90), slo("false", 10)], fires=True),
    case("SelectNObjectivesMissedSlowly", "2h", [slo("true", 100 * TARGET), slo("false", 1)], fires=False),
    case(
        "SelectNObjectivesMissedFast",
        "2h",
        [
            slo("true", 8),
            constant("ray_selectn_ingress_unserved_requests_total", 'outcome="refused",met="false"', 0, 2),
        ],
        fires=True,
    ),
    case("SelectNEngineDown", "10m", [gauge("engine_up", 0)], fires=True),
    case("SelectNEngineDown", "10m", [gauge("engine_up", 1)], fires=False),
    case("SelectNNoReplica", "10m", [gauge("ingress_known_replicas", 0)], fires=True),
    case("SelectNNoReplica", "10m", [gauge("ingress_known_replicas", 1)], fires=False),
    *(
        case(
            "SelectNLinkBelowShare",
            "10m",
            [
                gauge("link_measured_bytes_per_second", measured),
                gauge("link_share_bytes_per_second", 10),
                gauge("offloaded_units", 3),
                constant("ray_selectn_link_copied_bytes_total", 'WorkerId="w"', 0, copied),
            ],
            fires=measured < 7 and copied > 0,
        )
        for measured, copied in ((5, 100), (9, 100), (5, 0))  # at rest nothing is measured
    ),
    *(
        case(
            "SelectNHostMemoryLow",
            "10m",
            [
                gauge("host_memory_available_bytes", available, 'node="n"'),
                gauge("host_memory_limit_bytes", 100, 'node="n"'),
            ],
            fires=available < 5,
        )
        for available in (4, 50)
    ),
    case("SelectNGpuLost", "10m", [gauge("gpu_up", 0, 'node="n",gpu="0"')], fires=True),
    case("SelectNGpuLost", "10m", [gauge("gpu_up", 1, 'node="n",gpu="0"')], fires=False),
    case("SelectNCoordinatorStale", "10m", [gauge("coordinator_report_age_seconds", 60)], fires=True),
    case(
        "SelectNCoordinatorStale",
        "10m",
        [gauge("coordinator_lease_left_seconds", 5), gauge("coordinator_report_age_seconds", 1)],
        fires=False,
    ),
    case("SelectNCoordinatorStale", "10m", [gauge("coordinator_lease_left_seconds", 0)], fires=True),
    case("SelectNCoordinatorStale", "10m", [gauge("coordinator_report_age_seconds", 1)], fires=False),
    *(
        case(
            "SelectNPredictionsOff",
            "40m",
            [
                gauge("prediction_error_ratio", error),
                constant("ray_selectn_step_seconds_count", 'WorkerId="w"', 0, steps),
            ],
            fires=error > 0.25 and steps > 0,
        )
        for error, steps in ((0.4, 10), (0.1, 10), (0.4, 0))
    ),
    # One that is late in a quiet night, and a burst that comes to a server which has had none before.
    case("SelectNObjectivesMissedFast", "30m", [slo("true", 0), steps_up("false", 1)], fires=False),
    case("SelectNObjectivesMissedFast", "30m", [slo("true", 0), steps_up("false", 1000)], fires=True),
    case(
        "SelectNCoordinatorStale",
        "10m",
        [gauge("coordinator_lease_left_seconds", 5)],  # and no coordinator
        fires=True,
    ),
]


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    assert {alert.name for alert in ALERTS} == {each["promql_expr_test"][0]["expr"].split('"')[1] for each in CASES}
    (tmp_path / "rules.yml").write_text(rules_file())
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": CASES})
    )
    run = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert run.returncode == 0, run.stdout + run.stderr


def test_install_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", "install", "--dir", str(tmp_path / "a"), "--rules-dir", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "a" / "selectn_grafana_dashboard.json").read_text())["uid"] == "selectn"
    assert (tmp_path / "b" / "selectn_rules.yml").read_text() == rules_file()
    assert "rule_files" in capsys.readouterr().out


def test_install_without_a_session_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deployments.commands.dashboards.SESSION", tmp_path / "none")
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", raising=False)
    assert main(["dashboards", "install"]) == 2
    assert "--dir" in capsys.readouterr().err
