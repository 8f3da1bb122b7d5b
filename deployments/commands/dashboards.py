"""`selectn dashboards`: the Grafana dashboard, the rules for Prometheus, and the page of metrics."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from deployments.dashboards import grafana
from deployments.dashboards.reference import reference_page
from deployments.dashboards.rules import rules_file
from selectn_core.errors import ConfigError

OUTPUT_DIR_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"
SESSION = Path("/tmp/ray/session_latest/metrics")
DASHBOARD, RULES = "selectn_grafana_dashboard.json", "selectn_rules.yml"


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "dashboards",
        help="install the Grafana dashboard and the rules for Prometheus",
        description="What shows a running application in Grafana, and what alerts. Everything is made from the table "
        "in docs/metrics.md.",
        allow_abbrev=False,
    )
    parts = parser.add_subparsers(title="parts", metavar="PART", required=True)
    install = parts.add_parser(
        "install",
        help="write dashboard and rules to where Grafana and Prometheus find them",
        description=f"Writes {DASHBOARD} beside Ray's dashboards, and {RULES} to load in Prometheus.",
        allow_abbrev=False,
    )
    install.add_argument(
        "--dir",
        type=Path,
        help=f"folder of dashboards (default: ${OUTPUT_DIR_VARIABLE}, else this session's)",
    )
    install.add_argument("--rules-dir", type=Path, help="folder for the rules (default: the dashboards')")
    install.set_defaults(run=run_install)
    for name, text, help_text in (
        ("grafana", grafana.BUILT.read_text, "print the dashboard"),
        ("rules", rules_file, "print the rules"),
        ("reference", reference_page, "print the page of all metrics"),
    ):
        part = parts.add_parser(name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False)
        part.set_defaults(run=lambda _, text=text: print(text(), end="") or 0)


def run_install(args: argparse.Namespace) -> int:
    """Writes the files, and says what is left to do."""
    folder = args.dir or _dashboards_folder()
    rules = (args.rules_dir or folder) / RULES
    for path, text in ((folder / DASHBOARD, grafana.BUILT.read_text()), (rules, rules_file())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    if args.dir is None and OUTPUT_DIR_VARIABLE not in os.environ:
        print(
            "This folder is of the Ray session that runs: the next head starts with another. To keep the dashboard, "
            f"set\n{OUTPUT_DIR_VARIABLE} before the head starts, and install again."
        )
    print("Grafana shows it beside Ray's own dashboards. For the rules, add to prometheus.yml:")
    print(f"  rule_files: [{json.dumps(str(rules))}]")
    return 0


def _dashboards_folder() -> Path:
    named = os.environ.get(OUTPUT_DIR_VARIABLE)
    if named:
        return Path(named)
    if not SESSION.exists():
        raise ConfigError(
            f"no Ray head with a dashboard runs on this machine ({SESSION} is not there): start one, set "
            f"{OUTPUT_DIR_VARIABLE}, or say --dir FOLDER"
        )
    return SESSION / "grafana" / "dashboards"
