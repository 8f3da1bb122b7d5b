"""Real processes that use a store of known bytes, for tests that end them in every way there is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from selectn_core.weights.checkpoint import LoadedModel
from selectn_core.weights.shared_store import Chunks, Section, SharedStore, StoredTensor, find_or_build, write_store
from tests.support.child import Child

NUM_SECTIONS, CHUNKS_PER_SECTION = 4, 3
NUM_CHUNKS = NUM_SECTIONS * CHUNKS_PER_SECTION
_CHUNK_BYTES = 5_000  # no multiple of a page, nor of the alignment
_PITCH_BYTES = 5_120


def sections() -> list[Section]:
    """Sections of a few small tensors each."""
    return [
        Section(
            name=f"section {s}",
            num_bytes=CHUNKS_PER_SECTION * _PITCH_BYTES,
            tensors=tuple(
                StoredTensor(
                    names=(f"{s}.{t}", f"{s}.{t} again"),
                    dtype="int8",
                    shape=(_CHUNK_BYTES // 2, 2),
                    offset=t * _PITCH_BYTES,
                    num_bytes=_CHUNK_BYTES,
                )
                for t in range(CHUNKS_PER_SECTION)
            ),
        )
        for s in range(NUM_SECTIONS)
    ]


def chunks(section: Section) -> Chunks:
    """The bytes of a section: the same every time, and different everywhere."""
    generator = torch.Generator().manual_seed(int(section.name.split()[1]))
    for spec in section.tensors:
        yield spec.offset, torch.randint(0, 256, (spec.num_bytes,), dtype=torch.uint8, generator=generator)


def build(directory: Path, fingerprint: str, read: Any = chunks) -> SharedStore:
    return write_store(directory, fingerprint, {"of": fingerprint}, sections(), read)


def open_here(directory: Path, fingerprint: str = "aa") -> SharedStore:
    """The store, in this process."""
    return find_or_build([directory], fingerprint, lambda: build(directory, fingerprint))


def store_of(loaded: LoadedModel) -> SharedStore:
    """The store of a model that is shared."""
    assert loaded.store is not None
    return loaded.store


def has_the_right_bytes(store: SharedStore) -> bool:
    """Compares every tensor with what was to be written."""
    expected = {section.name: [chunk for _, chunk in chunks(section)] for section in sections()}
    flat = [chunk for each in expected.values() for chunk in each]
    found = [tensor.reshape(-1).view(torch.uint8) for _, tensor in store.tensors()]
    return len(found) == len(flat) and all(map(torch.equal, found, flat))


class StoreUser(Child):
    """A process that opens a store, building it if need be, and uses it until told to close or killed.

    It says "paused", "built", "found", an error's name, or "closed". It is told "go on" after a pause, or "check": then
    it says whether the bytes are right.
    """

    def __init__(self, directory: Path, fingerprint: str = "aa", *, pause_at_chunk: int | None = None) -> None:
        """With `pause_at_chunk`, a process that builds says "paused" there and goes on when told to."""
        super().__init__(_run, directory, fingerprint, pause_at_chunk)

    def is_silent(self, seconds: float = 0.2) -> bool:
        return not self._pipe.poll(seconds)


def _run(pipe: Connection, directory: Path, fingerprint: str, pause_at_chunk: int | None) -> None:
    built, count = [], itertools.count()

    def read(section: Section) -> Chunks:
        for chunk in chunks(section):
            if next(count) == pause_at_chunk:
                pipe.send("paused")
                assert pipe.recv() == "go on"
            yield chunk

    def build_and_tell() -> SharedStore:
        built.append(True)
        return build(directory, fingerprint, read)

    try:
        store = find_or_build([directory], fingerprint, build_and_tell)
    except Exception as error:
        pipe.send(type(error).__name__)
        return
    pipe.send("built" if built else "found")
    for command in iter(pipe.recv, "close"):
        if command == "check":
            pipe.send("right" if has_the_right_bytes(store) else "wrong")
        elif command == "write":
            store.memory[5000] = 1
        elif command == "fork":
            child = os.fork()
            if child == 0:
                store.close()
                os._exit(0)
            os.waitpid(child, 0)
            pipe.send("forked")
    store.close()
    pipe.send("closed")


def names(directory: Path) -> Iterator[str]:
    """What is in the directory, without the part of the names that all share."""
    prefix = f"selectn-store-{os.geteuid()}-"
    return (path.name.removeprefix(prefix) for path in sorted(directory.iterdir()))
