"""Logical streams with vector clocks: finds two accesses to the same bytes that nothing orders.

Everything runs on the CPU, at once and in the order of the program. What is logical is the order that a device would
keep: operations of one stream follow each other; those of two streams only where an event, or the host, says so. An
access is checked against those before it by clocks alone, so what is found does not depend on timing.

Stricter than a device in one way: a call that happens to block the host (a copy from pageable memory, a result whose
size depends on values) orders nothing. Waiting for a stream, an event or a value does.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WORD_BYTES = 4  # what is told apart; nothing that two streams share is smaller in these tests
_MAX_STREAMS = 16
_INDEXED_ROWS = {torch.ops.aten.index_select.default, torch.ops.aten.index_copy_.default}
_OWN_PLACES = ("/selectn_core/", "/continuous_batching/", "/transformers/models/")

Words = slice | np.ndarray  # of a storage
Place = tuple[CodeType, int]  # code and line


class Race(AssertionError):
    """Two accesses to the same bytes, at least one of them a write, and neither is sure to come first."""


class Stream:
    """Operations that follow each other. `clock[s]` is the last operation of stream s that is over before the next."""

    def __init__(self, checker: Checker, name: str) -> None:
        self.checker, self.name = checker, name
        self.number = len(checker.streams)
        assert self.number < _MAX_STREAMS, "more streams than expected"
        self.clock = np.zeros(_MAX_STREAMS, dtype=np.int64)
        self.operations: list[tuple[object, Place | None]] = [("nothing", None)]
        self.freed: list[Shadow] = []  # which its next new tensor may be given the memory of
        checker.streams.append(self)

    def begin(self, name: object) -> int:
        """The next operation, issued by the host now: after all that the host has waited for. Returns its number."""
        self.see(self.checker.host.clock)
        self.operations.append((name, _place()))
        self.clock[self.number] = len(self.operations) - 1
        return len(self.operations) - 1

    def see(self, clock: np.ndarray) -> None:
        """What is over by `clock` is over before the next operation."""
        np.maximum(self.clock, clock, out=self.clock)

    def wait_event(self, event: Event) -> None:
        self.see(event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(Event(self.checker, stream))

    def synchronize(self) -> None:
        self.checker.host_waits_for(self.clock)

    def describe(self, operation: int) -> str:
        name, place = self.operations[operation]
        where = f" at {place[0].co_filename.split('/site-packages/')[-1]}:{place[1]}" if place else ""
        return f"{name} on the {self.name}{where}"


class Event:
    """A point in a stream; until it is recorded there is nothing to wait for."""

    def __init__(self, checker: Checker, stream: Stream | None = None) -> None:
        self._checker = checker
        self.clock = np.zeros(_MAX_STREAMS, dtype=np.int64)
        if stream is not None:
            self.record(stream)

    def record(self, stream: Stream) -> None:
        stream.see(self._checker.host.clock)
        self.clock = stream.clock.copy()

    def query(self) -> bool:
        """True where the host knows already. A device may be faster, and nothing may count on that."""
        return bool((self.clock <= self._checker.host.clock).all())

    def synchronize(self) -> None:
        self._checker.host_waits_for(self.clock)


class Shadow:
    """Who has accessed the words of a storage last. Of a storage that one stream has to itself there are no arrays."""

    def __init__(self, num_bytes: int, home: Stream, operation: int, *, is_host: bool) -> None:
        self.num_words = -(-num_bytes // WORD_BYTES)
        self.home, self.is_host = home, is_host
        self.recorded: set[int] = set()  # streams that the allocator waits for
        self.home_write, self.home_read = operation, 0  # the last ones, while there are no arrays
        self.writer: np.ndarray | None = None  # int8 [num_words]
        self.written: np.ndarray  # int64 [num_words], the operation
        self.read: dict[int, np.ndarray]  # by stream, int64 [num_words]

    def is_of(self, stream: Stream) -> bool:
        """Whether no other stream has accessed any of it."""
        return self.writer is None and stream is self.home

    def note(self, operation: int, *, is_write: bool) -> None:
        """Notes an access of the stream that it is of."""
        if is_write:
            self.home_write = operation
        else:
            self.home_read = operation

    def access(self, stream: Stream, operation: int, words: Words, *, is_write: bool) -> tuple[Stream, int] | None:
        """Notes an access; the other one, where nothing orders the two."""
        if self.writer is None:
            self._spread()
        assert self.writer is not None
        other = self._unordered(stream, words, is_write=is_write)
        if is_write:
            self.writer[words], self.written[words] = stream.number, operation
        else:
            if stream.number not in self.read:
                self.read[stream.number] = np.zeros(self.num_words, dtype=np.int64)
            self.read[stream.number][words] = operation
        return other

    def _unordered(self, stream: Stream, words: Words, *, is_write: bool) -> tuple[Stream, int] | None:
        assert self.writer is not None
        writer, written, streams = self.writer[words], self.written[words], stream.checker.streams
        late = written > stream.clock[writer]
        if late.any():
            at = int(late.argmax())
            return streams[writer[at]], int(written[at])
        for number, operations in self.read.items() if is_write else ():
            latest = int(operations[words].max(initial=0))
            if latest > stream.clock[number]:
                return streams[number], latest
        return None

    def _spread(self) -> None:
        self.writer = np.full(self.num_words, self.home.number, dtype=np.int8)
        self.written = np.full(self.num_words, self.home_write, dtype=np.int64)
        self.read = {self.home.number: np.full(self.num_words, self.home_read, dtype=np.int64)}

    def under_way(self) -> tuple[Stream, int] | None:
        """An access of another stream that may not be over when its home's next operation is."""
        assert self.writer is not None
        for stream in self.home.checker.streams:
            if stream is self.home or stream.number in self.recorded:
                continue
            own = int(self.written[self.writer == stream.number].max(initial=0))
            latest = max(own, int(self.read[stream.number].max()) if stream.number in self.read else 0)
            if latest > self.home.clock[stream.number]:
                return stream, latest
        return None


class Checker:
    """All streams of a device, and all storages that were made while it watched.

    The host is a stream too. Its threads are taken for one: what one has waited for, the others know.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.host = Stream(self, "host")
        self.default = Stream(self, "default stream")
        self.races: list[str] = []
        self.num_host_waits = 0  # for a stream, an event or a value
        self._current = threading.local()
        self._shadows: dict[int, Shadow] = {}
        self._lock = threading.RLock()

    @property
    def current(self) -> Stream:
        """The stream of the calling thread."""
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Meanwhile the calling thread issues its operations to `stream` (None: as before)."""
        before = self.current
        self._current.stream = stream or before
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attributes what the calling thread does to its streams."""
        with _Watch(self):
            yield

    def shadow(self, tensor: torch.Tensor, *, is_host: bool | None = None) -> Shadow:
        """Of the tensor's storage; one that was there before is the host's, a new one the current stream's."""
        storage = tensor.untyped_storage()
        shadow = self._shadows.get(storage._cdata)
        if shadow is None or is_host is not None:
            home = self.host if is_host is not False else self.current
            # Fresh memory is what the stream may still be using, for what was there before.
            operation = len(home.operations) - 1
            shadow = self._shadows[storage._cdata] = Shadow(
                storage.nbytes(), home, operation, is_host=is_host is not False
            )
            weakref.finalize(storage, self._forget, storage._cdata, shadow).atexit = False
        return shadow

    def host_waits_for(self, clock: np.ndarray) -> None:
        self.num_host_waits += 1
        self.host.see(clock)

    def access(self, stream: Stream, operation: int, tensor: torch.Tensor, words: Words, *, is_write: bool) -> None:
        other = self.shadow(tensor).access(stream, operation, words, is_write=is_write)
        if other is not None:
            verb = "writes" if is_write else "reads"
            self.found(
                f"{stream.describe(operation)} {verb} bytes of {other[0].describe(other[1])}: nothing orders them"
            )

    def found(self, race: str) -> None:
        """Notes the first race, and raises it: what follows would not be as it is on a device."""
        if not self.races:
            self.races.append(race)
            raise Race(race)

    def _forget(self, key: int, shadow: Shadow) -> None:
        with self._lock:
            if self._shadows.get(key) is shadow:
                del self._shadows[key]
            if shadow.writer is not None and not shadow.is_host:
                shadow.home.freed.append(shadow)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries out an operation of the current stream, or of the host where all that it touches is host memory."""
        if self.races:
            return func(*args, **kwargs)
        if func.is_view:
            if func is torch.ops.aten.lift_fresh.default:  # of a tensor that was made from numbers
                with self._lock:
                    self._fresh(args[0], self.current, self.current.begin("torch.tensor"))
            return func(*args, **kwargs)
        with self._lock:
            tensors = list(_tensors_of(func, args, kwargs))
            is_host = bool(tensors) and all(self.shadow(tensor).is_host for tensor, _ in tensors)
            stream = self.host if is_host else self.current
            operation = stream.begin(func)
            for tensor, is_write in tensors:
                shadow = self.shadow(tensor)
                if shadow.is_of(stream):
                    shadow.note(operation, is_write=is_write)
                elif tensor.numel():
                    self.access(stream, operation, tensor, _words_of(func, args, tensor), is_write=is_write)
        result = func(*args, **kwargs)
        with self._lock:
            for tensor in _outputs(result):
                if tensor.untyped_storage()._cdata not in self._shadows:
                    self._fresh(tensor, stream, operation)
            if func is torch.ops.aten._local_scalar_dense.default and stream is not self.host:
                self.host_waits_for(stream.clock)
        return result

    def _fresh(self, tensor: torch.Tensor, stream: Stream, operation: int) -> None:
        """A new tensor. The allocator gives it memory that the stream has freed, whoever else still uses that."""
        shadow = self.shadow(tensor, is_host=stream is self.host)
        shadow.home, shadow.home_write = stream, operation
        for freed in stream.freed:
            if (other := freed.under_way()) is not None:
                self.found(f"{stream.describe(operation)} may get memory that {other[0].describe(other[1])} uses")
        stream.freed.clear()

    def to_list(self, plain: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
        """`tensor.tolist()`, which no dispatch shows."""
        if not self.races and tensor.numel():
            with self._lock:
                stream = self.host if self.shadow(tensor).is_host else self.current
                operation = stream.begin("tolist")
                self.access(stream, operation, tensor, words_of(tensor), is_write=False)
                if stream is not self.host:
                    self.host_waits_for(stream.clock)
        return plain(tensor)


class _Watch(TorchDispatchMode):
    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self._checker = checker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._checker.run(func, args, kwargs or {})


def words_of(tensor: torch.Tensor) -> Words:
    """The words of its storage that a tensor covers."""
    size, first = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous():
        return slice(first // WORD_BYTES, -(-(first + tensor.nbytes) // WORD_BYTES))
    offsets = np.zeros(1, dtype=np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if length > 1 and stride:
            offsets = (offsets[:, None] + np.arange(length) * stride).reshape(-1)
    starts = (first + offsets * size) // WORD_BYTES
    wide = max(1, size // WORD_BYTES)
    return (starts[:, None] + np.arange(wide)).reshape(-1)


def _words_of(func: Any, args: Sequence[Any], tensor: torch.Tensor) -> Words:
    """As `words_of`, of the rows alone that an operation touches by their numbers."""
    rows = None
    if tensor is args[0] and tensor.is_contiguous():
        if func in _INDEXED_ROWS and args[1] == 0:
            rows = args[2]
        elif func is torch.ops.aten.index.Tensor and args[1][0] is not None and len(args[1]) == 1:
            rows = args[1][0]
    if rows is None or rows.dtype == torch.bool:
        return words_of(tensor)
    size, row = tensor.element_size(), tensor.stride(0) * tensor.element_size()
    if row % WORD_BYTES:
        return words_of(tensor)
    starts = (tensor.storage_offset() * size + rows.detach().numpy().reshape(-1) * row) // WORD_BYTES
    return (np.unique(starts)[:, None] + np.arange(row // WORD_BYTES)).reshape(-1)


@cache
def _arguments(func: Any) -> list[tuple[str, bool]]:
    """Of an operation's arguments the names, and whether it writes to them."""
    return [(it.name, it.alias_info is not None and it.alias_info.is_write) for it in func._schema.arguments]


def _tensors_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors that are handed to an operation, and whether it writes to them."""
    for i, (name, is_write) in enumerate(_arguments(func)):
        value = args[i] if i < len(args) else kwargs.get(name)
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.Tensor):
                yield each, is_write


def _outputs(result: Any) -> Iterator[torch.Tensor]:
    for each in result if isinstance(result, list | tuple) else (result,):
        if isinstance(each, torch.Tensor):
            yield each


def _place() -> Place | None:
    """The line of ours, or of transformers', that an operation comes from."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _is_own(frame.f_code.co_filename):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


@cache
def _is_own(path: str) -> bool:
    return any(place in path for place in _OWN_PLACES)
