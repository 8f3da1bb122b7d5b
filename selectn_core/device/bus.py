"""A paced host bus that emulated devices in several processes share, through a few words of shared memory.

The state is a timeline: `next_free_ns`, the instant up to which the bus is reserved. Whoever wants to move bytes
extends it under a file lock and then has the bus until the instant it was given. Nothing is held while bytes move:
the lock lasts microseconds and the kernel drops it with its process, so a process killed at any point costs the
others at most the chunk it had reserved.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from selectn_core.device.host_memory import SHARED_MEMORY
from selectn_core.errors import ConfigError

logger = logging.getLogger(__name__)

_STATE = struct.Struct("<8sdqq")  # magic, bytes per second, next_free_ns, reserved_ns in all
_MAGIC = b"selnbus1"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A reservation further ahead than this is not one that living processes made (each holds one chunk at a time).
_LONGEST_QUEUE_NS = 10_000_000_000
_LATEST_WAKE_UP_NS = 5_000_000


class Bus:
    """One bus. All processes that open the same name share its bandwidth; without a name it is private."""

    def __init__(self, name: str | None, bytes_per_s: float) -> None:
        """Opens the bus, creating it with `bytes_per_s` if nobody has.

        An existing bus keeps its bandwidth, which others may be using; a warning says both where they differ.
        """
        self.name = name
        self._thread_lock = threading.Lock()
        self._fd = _open_file(name)
        try:
            with self._locked_file():
                if os.fstat(self._fd).st_size < _STATE.size:
                    os.ftruncate(self._fd, _STATE.size)
                self._memory = mmap.mmap(self._fd, _STATE.size)
                magic, existing, *_ = self._read()
                if magic != _MAGIC:
                    self._write(bytes_per_s, 0, 0)
                elif existing != bytes_per_s:
                    self._announce(existing, bytes_per_s)
        except BaseException:
            os.close(self._fd)
            raise

    def _announce(self, existing_bytes_per_s: float, wanted_bytes_per_s: float) -> None:
        assert self.name is not None
        logger.warning(
            "device.link_gb_per_s=%g is not what the bus %r has: it exists, and stays at %g GB/s for all that use it. "
            "To change it, stop them and remove %s",
            wanted_bytes_per_s / 1e9,
            self.name,
            existing_bytes_per_s / 1e9,
            _path(self.name),
        )

    def reserve(self, num_bytes: int, *, ready_ns: int) -> tuple[int, int]:
        """Reserves the bus for `num_bytes`; returns the (start, end) instants on CLOCK_MONOTONIC in ns.

        `ready_ns` is when the bytes could have been sent. It may lie a little in the past: a copy engine starts
        the moment it can, so a thread that the scheduler woke late does not lose the bus's time.
        """
        with self._locked_file():
            _, bytes_per_s, next_free_ns, reserved_ns = self._read()
            now_ns = time.monotonic_ns()
            start_ns = max(next_free_ns, min(ready_ns, now_ns), now_ns - _LATEST_WAKE_UP_NS)
            if start_ns > now_ns + _LONGEST_QUEUE_NS:
                start_ns = now_ns
            duration_ns = round(num_bytes / bytes_per_s * 1e9)
            self._write(bytes_per_s, start_ns + duration_ns, reserved_ns + duration_ns)
        return start_ns, start_ns + duration_ns

    @property
    def bytes_per_s(self) -> float:
        with self._locked_file():
            return self._read()[1]

    @bytes_per_s.setter
    def bytes_per_s(self, value: float) -> None:
        """Changes the bandwidth for every process, from the next chunk on."""
        if not value > 0:
            raise ValueError(f"bytes_per_s={value}: expected more than 0")
        with self._locked_file():
            _, _, next_free_ns, reserved_ns = self._read()
            self._write(value, next_free_ns, reserved_ns)

    def close(self) -> None:
        """Leaves the bus; a named one stays for the others until `unlink`."""
        self._memory.close()
        os.close(self._fd)

    @staticmethod
    def unlink(name: str) -> None:
        """Removes a named bus; processes that have it open keep it."""
        _path(name).unlink(missing_ok=True)

    @staticmethod
    def peek(name: str, directory: Path = SHARED_MEMORY) -> float | None:
        """The bandwidth of a named bus in bytes per second, without joining or creating it; None: there is none.

        Takes no lock, so a process that was stopped while it held one cannot delay the caller: the number is one
        aligned word, which is written whole.
        """
        try:
            with _path(name, directory).open("rb") as file:
                state = file.read(_STATE.size)
        except FileNotFoundError:
            return None
        if len(state) < _STATE.size:
            return None
        magic, bytes_per_s, _, _ = _STATE.unpack_from(state)
        return bytes_per_s if magic == _MAGIC and bytes_per_s > 0 else None

    @staticmethod
    def names(directory: Path = SHARED_MEMORY) -> list[str]:
        """The named buses that this user has on this machine, whether anybody has them open or not."""
        prefix = _prefix()
        found = (path.name.removeprefix(prefix) for path in directory.glob(f"{prefix}*"))
        return sorted(name for name in found if _NAME.fullmatch(name))

    @staticmethod
    def path(name: str, directory: Path = SHARED_MEMORY) -> Path:
        """The file of a named bus. Raises ConfigError for what is no name."""
        return _path(name, directory)

    @contextlib.contextmanager
    def _locked_file(self) -> Iterator[None]:
        # flock belongs to the open file, not to the thread: the second lock keeps threads of this process apart.
        with self._thread_lock:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _read(self) -> tuple[bytes, float, int, int]:
        magic, bytes_per_s, next_free_ns, reserved_ns = _STATE.unpack_from(self._memory)
        if magic == _MAGIC and not bytes_per_s > 0:
            raise ConfigError(f"bus {self.name!r} holds no valid state: remove {SHARED_MEMORY}/selectn-bus-*")
        return magic, bytes_per_s, next_free_ns, reserved_ns

    def _write(self, bytes_per_s: float, next_free_ns: int, reserved_ns: int) -> None:
        _STATE.pack_into(self._memory, 0, _MAGIC, bytes_per_s, next_free_ns, reserved_ns)


def _path(name: str, directory: Path = SHARED_MEMORY) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"device.bus={name!r} is not allowed: expected 1 to 64 of A-Z a-z 0-9 . _ -")
    return directory / f"{_prefix()}{name}"


def _prefix() -> str:
    return f"selectn-bus-{os.getuid()}-"


def _open_file(name: str | None) -> int:
    if name is not None:
        return os.open(_path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fd, path = tempfile.mkstemp(prefix="selectn-bus-")
    Path(path).unlink()
    return fd
