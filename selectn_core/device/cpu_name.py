"""What the machine's processor is called: a performance record of an emulated device is of this one."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(proc: Path = Path("/proc")) -> str:
    """The model that the kernel names, else the architecture."""
    lines = (proc / "cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
