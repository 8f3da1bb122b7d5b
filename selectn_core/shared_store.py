"""A file of tensors that all processes of a node map read-only: built once, under a lock, gone with its last user.

Every file belongs to one fingerprint. Whoever creates, opens, leaves or removes it holds the fingerprint's lock file
meanwhile; whoever uses it holds a shared flock on the file itself. The kernel drops both with their process, so after
a `kill -9` a file that nobody holds is recognised as abandoned: it is verified and used again, or removed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import mmap
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selectn_core.device import align_up
from selectn_core.errors import HostMemoryExceeded, StoreRefused

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, crc32 of the manifest, its offset, its bytes
_MAGIC, _VERSION = b"selnstor", 1
_CRC_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor; `names` is every name a model has for it, so that tied tensors are stored once and stay tied."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of its section
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """A page-aligned run of bytes; `offset` in the file and `crc32` are filled in when it is written."""

    name: str
    num_bytes: int
    tensors: tuple[StoredTensor, ...]
    offset: int = 0
    crc32: int = 0


# The bytes of a section as (offset in it, chunk), ascending; between them are zeros.
Chunks = Iterator[tuple[int, torch.Tensor]]


class DamagedStore(Exception):
    """The file is not what was once written there."""


class SharedStore:
    """One process's use of a store: a read-only mapping, and a shared lock that says so."""

    def __init__(self, path: Path, fd: int) -> None:
        """Maps the open file `fd`; the caller holds a lock on it. Raises DamagedStore unless its manifest is whole."""
        self.path, self._fd, self._pid = path, fd, os.getpid()
        self._closed = False
        size = os.fstat(fd).st_size
        if size < _HEADER.size:
            raise DamagedStore(f"it has {size} bytes")
        self.memory = map_read_only(fd, size)  # uint8 [file bytes]
        manifest = _read_manifest(self.memory)
        self.fingerprint: str = manifest["fingerprint"]
        self.model: dict[str, Any] = manifest["model"]
        self.sections = {each["name"]: _section(each) for each in manifest["sections"]}
        if path.name != _name(self.fingerprint):
            raise DamagedStore(f"it is the store of {self.fingerprint}")

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.memory.nbytes

    def section(self, name: str) -> torch.Tensor:
        """The section's bytes, uint8 [num_bytes], for reading: the kernel kills who writes to such a mapping."""
        section = self.sections[name]
        return self.memory[section.offset : section.offset + section.num_bytes]

    def tensors(self) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
        """Every tensor, as a view of the mapping."""
        for section in self.sections.values():
            data = self.section(section.name)
            for spec in section.tensors:
                flat = data[spec.offset : spec.offset + spec.num_bytes].view(getattr(torch, spec.dtype))
                yield spec, flat.view(spec.shape)

    def verify(self) -> None:
        """Raises DamagedStore unless every section has the bytes that were written."""
        for section in self.sections.values():
            crc = 0
            for chunk in self.section(section.name).split(_CRC_CHUNK_BYTES):
                crc = zlib.crc32(chunk.numpy().data, crc)
            if crc != section.crc32:
                raise DamagedStore(f"the bytes of {section.name} have changed")

    def close(self) -> None:
        """Gives up the store; its last user removes the file. Idempotent.

        The mapping goes when the last tensor that views it does, so nothing that still refers to it can crash.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if os.getpid() == self._pid:  # a forked child has its parent's lock and must not give it up
            with _locked(self.path.parent, self.fingerprint):
                if _try_lock(self._fd, fcntl.LOCK_EX) and _is_at(self._fd, self.path):
                    self.path.unlink()
                # Python's mmap has a duplicate of the descriptor: closing ours would leave the lock where it is.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def find_or_build(directories: Sequence[Path], fingerprint: str, build: Callable[[], SharedStore]) -> SharedStore:
    """The store of `fingerprint` in one of `directories`, or what `build` makes there with `write_store`.

    Of several processes that ask at once, one builds and the others wait for it. What killed processes have left in
    the directories goes. Raises StoreRefused for a file that is not this user's, or is damaged while others use it.
    """
    for directory in directories:
        remove_abandoned(directory, keep=fingerprint)
    with contextlib.ExitStack() as locks:
        for directory in directories:  # all of them, in one order: `build` is free to choose
            locks.enter_context(_locked(directory, fingerprint))
        for directory in directories:
            store = _attach(directory / _name(fingerprint))
            if store is not None:
                return store
        return build()


def write_store(
    directory: Path,
    fingerprint: str,
    model: dict[str, Any],
    sections: Sequence[Section],
    read: Callable[[Section], Chunks],
) -> SharedStore:
    """Writes a store and opens it; only from within `find_or_build`. `model` is anything JSON can hold.

    The file appears by a rename, whole or not at all. It is written, not mapped: where there is too little room that
    is an error here (HostMemoryExceeded) and not a bus error later.
    """
    path, building = directory / _name(fingerprint), directory / _name(fingerprint, ".building")
    building.unlink(missing_ok=True)  # half-written by a process that was killed
    fd = _open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        end, written = PAGE_BYTES, []
        for section in sections:
            placed = replace(section, offset=end)
            written.append(replace(placed, crc32=_write_section(fd, placed, read(placed))))
            end = align_up(end + section.num_bytes, PAGE_BYTES)
        _write_manifest(fd, end, {"fingerprint": fingerprint, "model": model, "sections": list(map(asdict, written))})
        building.rename(path)
    except BaseException as error:
        building.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostMemoryExceeded(f"{directory} is full: {error.strerror}") from error
        raise
    finally:
        os.close(fd)
    store = _attach(path, verify=False)
    assert store is not None, "renamed a moment ago, under its lock"
    return store


def stored_bytes(sections: Sequence[Section]) -> int:
    """What a store of these sections takes, its manifest aside (about 200 bytes per tensor)."""
    return PAGE_BYTES + sum(align_up(section.num_bytes, PAGE_BYTES) for section in sections)


def remove_abandoned(directory: Path, *, keep: str = "") -> None:
    """Removes this user's stores in `directory` that no process uses or builds, the one of `keep` excepted."""
    pattern = re.compile(re.escape(_name("")) + r"([0-9a-f]+)(\.lock|\.building)?")
    found = {match[1] for path in directory.iterdir() if (match := pattern.fullmatch(path.name))}
    for fingerprint in sorted(found - {keep}):
        # In use, being built, or not ours: none of these is abandoned.
        with contextlib.suppress(BlockingIOError, StoreRefused), _locked(directory, fingerprint, wait=False):
            (directory / _name(fingerprint, ".building")).unlink(missing_ok=True)
            _remove_unused(directory / _name(fingerprint))


def _attach(path: Path, *, verify: bool = True) -> SharedStore | None:
    """The store at `path`, if there is one. One that users left by being killed is verified, and removed if damaged."""
    try:
        fd = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        abandoned = _try_lock(fd, fcntl.LOCK_EX)
        try:
            store = SharedStore(path, fd)
            if abandoned and verify:
                store.verify()
        except DamagedStore as error:
            if not abandoned:
                raise StoreRefused(
                    f"{path} is damaged ({error}) and other processes use it: stop them, or set host.weights to "
                    "'private' for this one"
                ) from error
            logger.warning("%s is damaged, building it again: %s", path, error)
            path.unlink()
            os.close(fd)
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        atexit.register(store.close)  # users that are killed leave the file; a process that ends in order must not
        return store
    except BaseException:
        os.close(fd)
        raise


def _remove_unused(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        fd = _open(path, os.O_RDONLY)
        try:
            if _try_lock(fd, fcntl.LOCK_EX):
                logger.info("removing %s, which nobody uses", path)
                path.unlink()
        finally:
            os.close(fd)


# -- files and locks ----------------------------------------------------------------------------------------------


def _name(fingerprint: str, suffix: str = "") -> str:
    return f"selectn-store-{os.geteuid()}-{fingerprint}{suffix}"


def _open(path: Path, flags: int) -> int:
    """Opens a file of this user that nobody else can write. Raises StoreRefused for any other."""
    try:
        # Not blocking: somebody else's FIFO of this name would otherwise keep us waiting.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
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


@contextlib.contextmanager
def _locked(directory: Path, fingerprint: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the fingerprint's lock file, which exists only while somebody does. BlockingIOError if not to `wait`."""
    path = directory / _name(fingerprint, ".lock")
    while True:
        fd = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            if not _try_lock(fd, fcntl.LOCK_EX):
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "in use", str(path))
                logger.info("waiting for the process that has %s", path)
                fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):  # else whoever had it has removed it
                try:
                    yield
                    return
                finally:
                    path.unlink()
        finally:
            os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


# -- format -------------------------------------------------------------------------------------------------------


def _write_section(fd: int, section: Section, chunks: Chunks) -> int:
    """Writes the section's chunks; returns the checksum of its bytes, padding included."""
    crc, end = 0, 0
    for offset, chunk in chunks:
        data = chunk.numpy().data
        crc = zlib.crc32(data, zlib.crc32(bytes(offset - end), crc))
        _write_all(fd, data, section.offset + offset)
        end = offset + len(data)
    return zlib.crc32(bytes(section.num_bytes - end), crc)


def _write_manifest(fd: int, offset: int, manifest: dict[str, Any]) -> None:
    data = json.dumps(manifest).encode()
    _write_all(fd, memoryview(data), offset)
    header = _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(data), offset, len(data))
    _write_all(fd, memoryview(header), 0)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        num_written = os.pwrite(fd, data, offset)
        data, offset = data[num_written:], offset + num_written


def _read_manifest(memory: torch.Tensor) -> dict[str, Any]:
    header = memory[: _HEADER.size].numpy().tobytes()
    magic, version, crc, offset, num_bytes = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, _VERSION) or offset + num_bytes != memory.nbytes:
        raise DamagedStore("its header is not that of a whole store")
    data = memory[offset:].numpy().tobytes()
    if zlib.crc32(data) != crc:
        raise DamagedStore("its manifest has changed")
    return json.loads(data)


def _section(values: dict[str, Any]) -> Section:
    tensors = tuple(
        StoredTensor(**{**each, "names": tuple(each["names"]), "shape": tuple(each["shape"])})
        for each in values["tensors"]
    )
    return Section(**{**values, "tensors": tensors})


def map_read_only(fd: int, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]. The tensor keeps the mapping, which must not be closed by hand: torch would not notice."""
    mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        # Torch has no read-only tensors; that nobody writes to these is what `section` asks for.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8)
