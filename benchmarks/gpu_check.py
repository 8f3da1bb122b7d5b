"""On a machine with CUDA, without Ray: the device contract, token identity, and bench_interval; one table.

Without a GPU it says so and checks nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import parse_arguments, table

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    ("device contract", ["tests/contract"]),
    ("token identity on CUDA", ["tests/gpu"]),
)


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not torch.cuda.is_available():
        print(f"no CUDA device: nothing was checked (torch {torch.__version__})")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = [_run_tests(name, paths) for name, paths in TESTS]
    rows += _run_bench(arguments.model, quick=arguments.quick, keep=arguments.json)
    print(table(("check", "result", "figure"), rows))
    return 0 if all(result == "ok" for _, result, _ in rows) else 1


def _run_tests(name: str, paths: list[str]) -> tuple[str, str, str]:
    """A run of pytest; tests skipped for want of a GPU count as failed here."""
    started_s = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", *paths], cwd=ROOT, capture_output=True, text=True
    )
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()]
    needed_gpu = any("SKIPPED" in line and "CUDA" in line for line in lines)
    is_ok = run.returncode == 0 and not needed_gpu
    if not is_ok:
        print(run.stdout[-4000:], run.stderr[-2000:], sep="\n", file=sys.stderr)
    return (
        name,
        "ok" if is_ok else "FAIL",
        f"{lines[-1].strip('= ')} ({time.perf_counter() - started_s:.0f} s)",
    )


def _run_bench(model: str, *, quick: bool, keep: Path | None) -> list[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        target = keep or Path(folder) / "bench_interval.json"
        command = [sys.executable, "-m", "benchmarks.bench_interval", "--device", "cuda", "--model", model]
        subprocess.run([*command, "--json", str(target), *(["--quick"] if quick else [])], cwd=ROOT, check=False)
        if not target.is_file():
            return [("bench_interval", "FAIL", "it did not finish")]
        checks = json.loads(target.read_text())["checks"]
    return [
        (
            check["name"],
            "ok" if check["holds"] else "FAIL",
            f"{check['value']:.4g} (target {check['target']})",
        )
        for check in checks
    ]


if __name__ == "__main__":
    sys.exit(main())
