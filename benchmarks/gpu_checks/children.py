"""Checks as processes, each within a time: one that hangs or dies is ended and reported, and the next ones run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu_checks.finding import Finding, failed, measured

ROOT = Path(__file__).resolve().parents[2]
RESULT = "{result}"  # in a command: the file that its result goes to
_GRACE_S = 10.0
_OUTPUT_CHARACTERS = 3000


@dataclass(frozen=True, kw_only=True)
class Ended:
    """`code` None: it was ended, for taking too long."""

    code: int | None
    output: str
    seconds: float
    result: str | None  # what it wrote to its file


@dataclass(frozen=True, kw_only=True)
class Child:
    """A check: what to run, for how long at most, and how its end is read."""

    name: str
    command: Sequence[str]
    limit_s: float
    read: Callable[[str, Ended], list[Finding]]


def run_all(children: Sequence[Child], budget_s: float, show: Callable[[str], None] = print) -> list[Finding]:
    """One after the other, `budget_s` in all; those for which nothing is left fail without having run."""
    ends_s, findings = time.monotonic() + budget_s, list[Finding]()
    for child in children:
        left_s = min(child.limit_s, ends_s - time.monotonic())
        if left_s <= 0:
            findings.append(failed(child.name, "run", f"not run: nothing is left of {budget_s:.0f} s"))
            continue
        show(f"{child.name} (at most {left_s:.0f} s)")
        findings += run_one(child, left_s, show)
    return findings


def run_one(child: Child, limit_s: float, show: Callable[[str], None] = print) -> list[Finding]:
    ended = _end_of(child, limit_s)
    if ended.code is None:
        found = [failed(child.name, "run", f"ended after {ended.seconds:.0f} s: it hangs, or is too slow")]
    else:
        try:
            found = child.read(child.name, ended)
        except (ValueError, KeyError, TypeError) as error:
            found = [failed(child.name, "run", f"its result cannot be read: {error}")]
    if any(each.holds is False for each in found):
        show(ended.output[-_OUTPUT_CHARACTERS:])
    return found


def _end_of(child: Child, limit_s: float) -> Ended:
    with TemporaryDirectory() as folder:
        file, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [part.replace(RESULT, str(file)) for part in child.command]
        began_s = time.monotonic()
        with log.open("wb") as output:  # not a pipe, which a process that is left would hold open
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        result = file.read_text(encoding="utf-8") if file.is_file() else None
        text = log.read_text(encoding="utf-8", errors="replace")
        return Ended(code=code, output=text, seconds=time.monotonic() - began_s, result=result)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started. One that the driver holds may not even die: it is left behind then."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)


# -- how ends are read ------------------------------------------------------------------------------------------------


def own_findings(name: str, ended: Ended) -> list[Finding]:
    """Of a check of this package."""
    if ended.code != 0 or ended.result is None:
        return [failed(name, "run", f"exit code {ended.code}: {last_line(ended.output)}")]
    return [Finding(**each) for each in json.loads(ended.result)]


def pytest_findings(name: str, ended: Ended) -> list[Finding]:
    """Of a run of pytest with -rs: tests skipped for want of a GPU count as failed here."""
    lacked_gpu = any("SKIPPED" in line and "CUDA" in line for line in ended.output.splitlines())
    figure = f"{last_line(ended.output)} ({ended.seconds:.0f} s)"
    if lacked_gpu:
        figure = f"skipped for want of CUDA: {figure}"
    return [Finding(check=name, name="tests", figure=figure, holds=ended.code == 0 and not lacked_gpu)]


def bench_findings(name: str, ended: Ended) -> list[Finding]:
    """Of a benchmark's result file; a target that is missed in a noisy run is no failure."""
    if ended.result is None:
        return [failed(name, "run", f"exit code {ended.code}, without a result: {last_line(ended.output)}")]
    found = []
    for check in json.loads(ended.result)["checks"]:
        each = measured(name, check["name"], check["value"], check["target"])
        found.append(Finding(**{**each.as_dict(), "holds": check["holds"]}))
    return found


def last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "it said nothing"
