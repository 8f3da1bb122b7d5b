"""Which process is which: a pid, and when the kernel started it on a clock that nobody can set."""

from __future__ import annotations

from pathlib import Path

# Of /proc/<pid>/stat, counted after the name, which may hold spaces: the state, and the start in ticks since boot.
_STATE, _START_TICKS = 0, 19
_ENDED = (b"Z", b"X")


def start_ticks(pid: int) -> int:
    """When a process was started, in the kernel's ticks since boot. Raises OSError where it cannot be seen.

    With the pid it names a process for as long as the machine is up. A creation time in seconds since 1970 does not:
    it moves with the machine's clock.
    """
    return int(_stat(pid)[_START_TICKS])


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process that was started then is still there. False too for one that cannot be seen from here."""
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # it is there, and no more can be told
        return True
    return int(fields[_START_TICKS]) == ticks and fields[_STATE] not in _ENDED


def _stat(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
