"""What the benchmarks share: arguments, the environment, checks, and the result file."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.noise import NoiseReport
from selectn_core.engine.engine import Engine
from selectn_core.latency.steps import StepRecord
from selectn_core.requests.attainment import Outcome, is_met
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives

_LIBRARIES = ("torch", "transformers", "ray")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure against its target; `target` reads like "<= 1.08".

    `is_timed`: it compares times, so that a noisy machine alone can miss the target.
    """

    name: str
    value: float
    target: str
    is_timed: bool = False

    @property
    def holds(self) -> bool:
        relation, limit = self.target.split()
        return self.value <= float(limit) if relation == "<=" else self.value >= float(limit)


def attained(handles: Sequence[RequestHandle], objectives: Sequence[Objectives], num_tokens: int) -> dict[str, float]:
    """Of all that were offered, the shares that met both of their objectives, and each: as an engine counts them.

    Those that have fewer than the `num_tokens` they asked for were cancelled.
    """
    outcomes: list[Outcome] = ["completed" if each.num_tokens == num_tokens else "cancelled" for each in handles]
    judged: dict[str, Callable[[Objectives], Objectives]] = {
        "attained": lambda wanted: wanted,
        "attained_tpot": lambda wanted: replace(wanted, ttft_s=math.inf),
        "attained_ttft": lambda wanted: replace(wanted, tpot_s=math.inf),
    }
    return {
        name: mean(
            is_met(each.timing, judge(wanted), outcome)
            for each, wanted, outcome in zip(handles, objectives, outcomes, strict=True)
        )
        for name, judge in judged.items()
    }


def parse_arguments(description: str, extra: Sequence[tuple[str, dict[str, Any]]] = ()) -> argparse.Namespace:
    """`--quick`, `--json FILE`, `--model`, and `extra` options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="about a minute, with wider spread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment, raw samples and checks")
    parser.add_argument("--model", default="embedded", help="what model.source may be (default: embedded)")
    for name, settings in extra:
        parser.add_argument(name, **settings)
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """What the figures depend on, without a name of the machine."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "compute_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def finish(
    arguments: argparse.Namespace,
    provenance: str,
    samples: list[dict[str, Any]],
    checks: list[Check],
    noise: NoiseReport | None = None,
) -> int:
    """Prints the checks, writes the result file if asked; the exit code is 1 if a check does not hold.

    A timed check that misses its target in a run that was too noisy (`noise`) says neither: it reads NOISY, and `holds`
    is null in the file.
    """
    print()
    verdicts = {check.name: _verdict(check, noise) for check in checks}
    for check in checks:
        word = {True: "ok   ", False: "FAIL ", None: "NOISY"}[verdicts[check.name]]
        print(f"{word}  {check.name}: {check.value:.4g} (target {check.target})")
    if noise is not None:
        print(f"noise: {noise}" + ("; run it again on a quieter machine" if None in verdicts.values() else ""))
    if arguments.json:
        result = {
            "provenance": provenance,
            "quick": arguments.quick,
            "environment": environment(),
            "noise": {**asdict(noise), "is_noisy": noise.is_noisy} if noise is not None else None,
            "checks": [{**asdict(check), "holds": verdicts[check.name]} for check in checks],
            "samples": samples,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if False in verdicts.values() else 0


def _verdict(check: Check, noise: NoiseReport | None) -> bool | None:
    """Whether it holds; None where noise may be all that it shows."""
    is_undecided = not check.holds and check.is_timed and noise is not None and noise.is_noisy
    return None if is_undecided else check.holds


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Seeded token ids [num_prompts][num_tokens], away from the special ones."""
    generator = torch.Generator().manual_seed(num_prompts * 10_007 + num_tokens)
    return torch.randint(100, vocab_size, (num_prompts, num_tokens), generator=generator).tolist()


class StepReader:
    """Waits for an engine's next steps and returns their records."""

    def __init__(self, engine: Engine, handles: Sequence[RequestHandle]) -> None:
        self._engine, self._events = engine, iter(handles[0])

    def next_steps(self, num_steps: int) -> list[StepRecord]:
        """The records of the next `num_steps` steps that begin from now on."""
        first = self._engine.steps.num_steps
        while self._engine.steps.num_steps < first + num_steps + 1:
            event = next(self._events)  # one event of the first request is one step
            if event.finish_reason is not None:
                raise RuntimeError("the requests ended before the measurement: give them more tokens")
        return [r for r in list(self._engine.steps.records) if first < r.iteration <= first + num_steps]

    def median_s(self, num_steps: int, *, after: int) -> float:
        """Median duration of `num_steps` steps, after letting `after` pass."""
        self.next_steps(after)
        return median(record.duration_s for record in self.next_steps(num_steps))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
