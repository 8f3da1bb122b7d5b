"""On a machine with CUDA, without Ray: what only a card can show, in one table and in under ten minutes.

Registration of host memory and its flags, the link alone and beside compute, the kernels that attend, what a length
costs the first time, memory against the accounts, the device contract, token identity, and steps over their bound
(bench_interval). A check that fails or hangs does not stop the others.

Exit codes: 0 if all hold, 1 if something fails, 2 if there is no GPU and nothing was checked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import environment, table
from benchmarks.gpu_checks.children import (
    RESULT,
    Child,
    bench_findings,
    own_findings,
    pytest_findings,
    run_all,
)
from benchmarks.gpu_checks.finding import Finding, do_all_hold

BUDGET_S = 570.0
NO_GPU = 2
_PYTEST = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available():
        print(f"no CUDA device: nothing was checked (torch {torch.__version__})")
        return NO_GPU
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    began_s = time.monotonic()
    findings = run_all(children(arguments.model, quick=not arguments.full), arguments.budget_s)
    return report(findings, time.monotonic() - began_s, arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and findings")
    parser.add_argument("--model", default="embedded", help="what model.source may be (default: embedded)")
    parser.add_argument("--full", action="store_true", help="bench_interval at every k; raise --budget-s too")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds in all (default: {BUDGET_S:g})")
    return parser.parse_args()


def children(model: str, *, quick: bool) -> list[Child]:
    """The short ones first: what hangs takes its time from those after it."""
    python = sys.executable
    own = [
        Child(
            name=name,
            command=[python, "-m", "benchmarks.gpu_checks", name, "--model", model, "--json", RESULT],
            limit_s=limit_s,
            read=own_findings,
        )
        for name, limit_s in (("registration", 45), ("link", 45), ("model_steps", 120))
    ]
    bench = [python, "-m", "benchmarks.bench_interval", "--device", "cuda", "--model", model, "--json", RESULT]
    tests = (("device contract", "tests/contract", 60), ("token identity", "tests/gpu", 150))
    return [
        *own,
        *(
            Child(name=name, command=[python, *_PYTEST, path], limit_s=limit_s, read=pytest_findings)
            for name, path, limit_s in tests
        ),
        Child(
            name="bench_interval",
            command=[*bench, "--quick"] if quick else bench,
            limit_s=180 if quick else 3600,
            read=bench_findings,
        ),
    ]


def report(findings: Sequence[Finding], seconds: float, file: Path | None) -> int:
    """Prints the table, writes the result file if asked; the exit code."""
    print(table(("check", "what", "result", "figure"), [(f.check, f.name, f.verdict, f.figure) for f in findings]))
    print(f"{sum(f.holds is False for f in findings)} of {len(findings)} fail, {seconds:.0f} s")
    if file is not None:
        result = {
            "provenance": "measured",
            "environment": environment(),
            "seconds": seconds,
            "findings": [{**each.as_dict(), "verdict": each.verdict} for each in findings],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if do_all_hold(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
