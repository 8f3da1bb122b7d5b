"""The command line of `selectn doctor`: reads the configuration, and prints what the checks have found."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.commands.file_options import file_name

if TYPE_CHECKING:
    from deployments.commands.doctor.findings import Finding
    from deployments.commands.doctor.subject import Subject
    from deployments.config import AppArgs

EXAMPLES = """\
examples:
  selectn doctor
      this machine, for serve_config.yaml of this directory or, without one, for the embedded model
  selectn doctor serve_config.yaml --json
      what was found as JSON, for a monitor or a provisioning script
exit code: 0 if nothing is worse than a note, 1 for warnings, 2 for errors
"""


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine for a configuration",
        description="Checks whether this machine can serve a configuration: versions, devices, links, memory, limits, "
        "ports, records. Needs no Ray, starts nothing and removes nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", nargs="?", type=file_name, metavar="CONFIG", help="Serve config file (default: as `selectn serve`)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examines and prints; the exit code is that of the worst finding."""
    from deployments.commands.doctor.checks import examine
    from deployments.commands.doctor.machine import Machine

    subject = subject_of(args.config, Machine())
    findings = examine(subject)
    print(as_json(subject, findings) if args.json else render(findings))
    return exit_code(findings)


def subject_of(path: Path | None, machine: Any) -> Subject:
    """The configuration that `selectn serve` would find, on a machine."""
    from deployments.commands.doctor.subject import Subject
    from deployments.commands.serve import DEFAULT_CONFIG, default_document
    from deployments.config import AppArgs, parse
    from deployments.serve_file import app_args, load_yaml, most_replicas, select_n_applications
    from selectn_core.errors import SelectNError

    path = path or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    try:
        document = load_yaml(path) if path else default_document()
        apps = tuple(
            scaled(parse(AppArgs, app_args(app), where="args"), most_replicas(app))
            for app in select_n_applications(document)
        )
    except SelectNError as reason:
        return Subject(machine, {}, (), str(path), str(reason))
    return Subject(machine, document, apps, str(path) if path else "the default configuration")


def scaled(args: AppArgs, num_replicas: int | None) -> AppArgs:
    """With as many replicas as `deployments:` allows, which is how an application is scaled."""
    return args if num_replicas is None else args.model_copy(update={"num_replicas": num_replicas})


def exit_code(findings: list[Finding]) -> int:
    from deployments.commands.doctor.findings import Severity, worst

    return {Severity.WARNING: 1, Severity.ERROR: 2}.get(worst(findings), 0)


def as_json(subject: Subject, findings: list[Finding]) -> str:
    from deployments.commands.doctor.findings import worst

    listed = [{**asdict(each), "severity": each.severity.name.lower()} for each in findings]
    return json.dumps({"config": subject.where, "worst": worst(findings).name.lower(), "findings": listed}, indent=2)


def render(findings: list[Finding]) -> str:
    """One finding a line, and below it what to do."""
    width = max(len(each.check) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.severity.name.lower():<8} {each.check:<{width}}  {' '.join(each.found.split())}")
        if each.do:
            lines.append(f"{'':<8} {'':<{width}}  -> {each.do}")
    return "\n".join(lines)
