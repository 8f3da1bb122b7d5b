"""The files of shared stores: their names and locks, what may be trusted, and what killed processes have left of them.

Without torch: the command line cleans up after the processes it has ended, and should not load it for that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from selectn_core.errors import StoreRefused
from selectn_core.file_lock import lock_within, try_lock

logger = logging.getLogger(__name__)

# Where a store goes that is not to be in memory.
FILES = Path("/var/tmp")


def remove_abandoned(directory: Path, *, keep: str = "") -> None:
    """Removes this user's stores in `directory` that no process uses or builds, the one of `keep` excepted."""
    for fingerprint in sorted(_fingerprints(directory) - {keep}):
        # In use, being built, or not ours: none of these is abandoned.
        with contextlib.suppress(BlockingIOError, StoreRefused), locked(directory, fingerprint, wait=False):
            (directory / store_name(fingerprint, ".building")).unlink(missing_ok=True)
            _remove_unused(directory / store_name(fingerprint))


def abandoned(directory: Path) -> list[Path]:
    """This user's stores in `directory` that no process uses or builds, half-written ones too. Removes nothing."""
    found = []
    for fingerprint in sorted(_fingerprints(directory)):
        with contextlib.suppress(BlockingIOError, StoreRefused), locked(directory, fingerprint, wait=False):
            building, store = (directory / store_name(fingerprint, suffix) for suffix in (".building", ""))
            found += [building] if building.exists() else []
            found += [store] if _is_unused(store) else []
    return found


def _fingerprints(directory: Path) -> set[str]:
    pattern = re.compile(re.escape(store_name("")) + r"([0-9a-f]+)(\.lock|\.building)?")
    return {match[1] for path in directory.iterdir() if (match := pattern.fullmatch(path.name))}


def _is_unused(path: Path) -> bool:
    try:
        fd = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return try_lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _remove_unused(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        fd = open_own(path, os.O_RDONLY)
        try:
            if try_lock(fd, fcntl.LOCK_EX):
                logger.info("removing %s, which nobody uses", path)
                path.unlink()
        finally:
            os.close(fd)


def store_name(fingerprint: str, suffix: str = "") -> str:
    return f"selectn-store-{os.geteuid()}-{fingerprint}{suffix}"


def open_own(path: Path, flags: int) -> int:
    """Opens a file of this user that nobody else can write. Raises StoreRefused for any other."""
    try:
        # Not blocking: somebody else's FIFO of this name would otherwise keep us waiting.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR):
            raise
        raise StoreRefused(f"{path} cannot be trusted ({error.strerror}): remove it") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise StoreRefused(
            f"{path} cannot be trusted: expected a file of user {os.geteuid()} that only this user can open, found "
            f"{stat.filemode(status.st_mode)} of user {status.st_uid}; remove it"
        )
    return fd


def open_unnamed(directory: Path) -> int | None:
    """A new file without a name in `directory`'s file system; None where it knows no such files."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        return None


def distinct_directories(directories: Sequence[Path]) -> list[Path]:
    """Each directory once, whatever names, links and mounts lead to it: two locks of one file are never both had."""
    found: dict[tuple[int, int], Path] = {}
    for directory in directories:
        found.setdefault(identity(directory), directory)
    return list(found.values())


def identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(directory: Path, fingerprint: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the fingerprint's lock file, which exists only while somebody does. BlockingIOError if not to `wait`."""
    path = directory / store_name(fingerprint, ".lock")
    while True:
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            if wait:
                lock_within(fd, path)
            elif not try_lock(fd, fcntl.LOCK_EX):
                raise BlockingIOError(errno.EAGAIN, "in use", str(path))
            if is_at(fd, path):  # else whoever had it has removed it
                try:
                    yield
                    return
                finally:
                    path.unlink()
        finally:
            os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
