"""The stand-in NVML (nvml.c) for tests: builds it, describes a machine to it, and samples that machine in a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

SOURCE = Path(__file__).with_name("nvml.c")
SAMPLER = "tests.standins.sampler"


NO_COMPILER = "no C compiler for the stand-in NVML"


def find_compiler() -> str | None:
    """The C compiler's path; None: there is no stand-in on this machine."""
    return shutil.which("cc") or shutil.which("gcc")


class StandIn:
    """A library in a directory of its own, and the file that says what it answers (see nvml.c)."""

    def __init__(self, directory: Path) -> None:
        compiler = find_compiler()
        if compiler is None:
            pytest.skip(NO_COMPILER)
        self.directory = directory
        self._description = directory / "machine.txt"
        library = directory / "libnvidia-ml.so.1"
        flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
        self.describe()

    def describe(self, *statements: str) -> None:
        """Replaces the machine, in one step: no call sees half of it."""
        new = self._description.with_suffix(".new")
        new.write_text("\n".join(statements) + "\n")
        new.rename(self._description)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process that starts with it use this library."""
        return {"LD_LIBRARY_PATH": str(self.directory), "SELECTN_NVML_STANDIN": str(self._description)}


class Sampler:
    """A process that samples its node when told to: a library cannot be swapped in one that runs."""

    def __init__(self, environment: dict[str, str], **config: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", SAMPLER, json.dumps(config)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def sample(self) -> dict[str, Any]:
        """A NodeTelemetry as JSON data, and `num_threads` of its process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self, timeout_s: float = 60) -> int:
        """Lets the process end by itself; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(timeout_s)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()
