"""Files that one process has at a time. Who waits for one says for whom, and does not wait for ever."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from selectn_core.errors import LockHeld

logger = logging.getLogger(__name__)

# A process that downloads or converts a checkpoint has its lock for long; one that is stopped has it for ever.
PATIENCE_S = 3600.0
SAY_EVERY_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.25


def try_lock(fd: int, kind: int) -> bool:
    """Whether the open file's lock could be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(
    fd: int,
    path: Path,
    *,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Takes the open file's lock. It is freed when the file is closed.

    Raises LockHeld when another has had it for `patience_s` since it last touched the file.
    """
    # Polled, as flock knows no timeout, and a thread that blocks in it cannot be called back.
    since_s = said_s = clock()
    touched_ns, pause_s = os.fstat(fd).st_mtime_ns, FIRST_PAUSE_S
    while not try_lock(fd, fcntl.LOCK_EX):
        now_s, last_ns = clock(), os.fstat(fd).st_mtime_ns
        if last_ns != touched_ns:
            touched_ns, since_s = last_ns, now_s
        if now_s - since_s >= patience_s:
            raise LockHeld(
                f"{path} has been held by {_holder(fd)} for {now_s - since_s:.0f} s without a sign of progress: "
                "end that process, if it hangs"
            )
        if now_s - said_s >= SAY_EVERY_S:
            said_s = now_s
            logger.warning("waiting for %s, which has %s", _holder(fd), path)
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


@contextlib.contextmanager
def file_lock(path: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Holds the lock of `path`, which is made and stays. Raises LockHeld as `lock_within` does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_within(fd, path, patience_s=patience_s)
        yield
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    """Who has the lock, as the kernel tells; it does not see into other containers."""
    inode = os.fstat(fd).st_ino
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF
        fields = line.split()
        if fields[1:2] == ["FLOCK"] and len(fields) > 5 and fields[5].endswith(f":{inode}") and fields[4].isdigit():
            pid = int(fields[4])
            return "this process itself" if pid == os.getpid() else f"process {pid}"
    return "another process"
