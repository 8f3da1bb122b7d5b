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
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selectn_core.device import align_up, numa
from selectn_core.errors import HostMemoryExceeded, StoreRefused
from selectn_core.file_lock import try_lock
from selectn_core.weights.store_files import (
    distinct_directories,
    identity,
    is_at,
    locked,
    open_own,
    open_unnamed,
    remove_abandoned,
    store_name,
)

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
        if path.name != store_name(self.fingerprint):
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
            with locked(self.path.parent, self.fingerprint):
                if try_lock(self._fd, fcntl.LOCK_EX) and is_at(self._fd, self.path):
                    self.path.unlink()
                # Python's mmap has a duplicate of the descriptor: closing ours would leave the lock where it is.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def find_or_build(directories: Sequence[Path], fingerprint: str, build: Callable[[], SharedStore]) -> SharedStore:
    """The store of `fingerprint` in one of `directories`, or what `build` makes there with `write_store`.

    Of several processes that ask at once, one builds and the others wait for it. What killed processes have left in
    the directories goes. Raises StoreRefused for a file that is not this user's, or is damaged while others use it, and
    LockHeld where another process builds and does not get on.
    """
    directories = distinct_directories(directories)
    for directory in directories:
        remove_abandoned(directory, keep=fingerprint)
    with contextlib.ExitStack() as locks:
        # All of them, as `build` is free to choose; in one order for all processes, or two could wait for each other.
        for directory in sorted(directories, key=identity):
            locks.enter_context(locked(directory, fingerprint))
        for directory in directories:
            store = _attach(directory / store_name(fingerprint))
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

    The file appears whole or not at all, and has no name until then where the file system knows such files: it goes
    with the process that writes it, however that ends. It is written, not mapped: where there is too little room that
    is an error here (HostMemoryExceeded) and not a bus error later.
    """
    path, building = directory / store_name(fingerprint), directory / store_name(fingerprint, ".building")
    lock = directory / store_name(fingerprint, ".lock")
    building.unlink(missing_ok=True)  # half-written by a process that was killed
    unnamed = open_unnamed(directory)
    fd = open_own(building, os.O_RDWR | os.O_CREAT | os.O_EXCL) if unnamed is None else unnamed
    try:
        end, written = PAGE_BYTES, []
        with numa.on_all_nodes():  # processes on any node will read it, not only on the builder's
            for section in sections:
                placed = replace(section, offset=end)
                written.append(replace(placed, crc32=_write_section(fd, placed, read(placed))))
                end = align_up(end + section.num_bytes, PAGE_BYTES)
                os.utime(lock)  # for those who wait
        _write_manifest(fd, end, {"fingerprint": fingerprint, "model": model, "sections": list(map(asdict, written))})
        if unnamed is None:
            building.rename(path)
        else:
            # With a descriptor, which an absolute path does not need, Python follows the link that /proc has there.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
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


def _attach(path: Path, *, verify: bool = True) -> SharedStore | None:
    """The store at `path`, if there is one. One that users left by being killed is verified, and removed if damaged."""
    try:
        # For writing: a device may lock only pages that could be written. They are mapped read-only all the same.
        fd = open_own(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        abandoned = try_lock(fd, fcntl.LOCK_EX)
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
