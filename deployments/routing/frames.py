"""How text travels from a replica to an ingress beside Ray's calls: one frame for all that a step has brought.

A frame is the length of its payload, 4 bytes, and the payload: JSON, which nobody can make run anything.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from deployments.messages import Finished

LENGTH_BYTES = 4
MAX_GREETING_BYTES = 1024
# So much text ends a frame. One request's text is never divided, and is far from as much as a frame may have.
FRAME_TEXT, MAX_FRAME_BYTES = 2**20, 2**26
# A peer whose node has gone says nothing more: so long unacknowledged, or so long without an answer, and it is gone.
UNACKNOWLEDGED_MS = 30_000
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes

# Which inbox, the text that has become final, and the end if it has come.
Piece = tuple[int, str, Finished | None]


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """The one thing that a caller says on a connection: its name, its number for the connection, and the secret."""

    origin: str
    connection: int
    secret: str = field(repr=False)


def encode_greeting(greeting: Greeting) -> bytes:
    """One line of three words."""
    return f"{greeting.secret} {greeting.connection} {greeting.origin}\n".encode()


def decode_greeting(line: bytes) -> Greeting | None:
    """None for what is no greeting."""
    try:
        secret, connection, origin = line.decode("ascii").split(" ")
        return Greeting(origin=origin, connection=int(connection), secret=secret) if origin else None
    except ValueError:
        return None


def encode(pieces: Iterable[Piece]) -> bytes:
    """One frame, or several where there is much text."""
    frames, rows, length = [], list[list[object]](), 0
    for inbox, text, end in pieces:
        if length + len(text) > FRAME_TEXT and rows:
            frames.append(_frame(rows))
            rows, length = [], 0
        rows.append([inbox, text] if end is None else [inbox, text, *_row(end)])
        length += len(text)
    return b"".join([*frames, _frame(rows)])


def _frame(rows: list[list[object]]) -> bytes:
    payload = json.dumps(rows, separators=(",", ":")).encode()
    return len(payload).to_bytes(LENGTH_BYTES) + payload


class FrameReader:
    """Takes frames apart, however their bytes come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Piece]:
        """The pieces of all frames that are whole by now, in order. Raises ValueError for what is no frame."""
        self._bytes += data
        begin = 0
        while len(self._bytes) - begin >= LENGTH_BYTES:
            payload_begin = begin + LENGTH_BYTES
            length = int.from_bytes(self._bytes[begin:payload_begin])
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length:,} bytes; expected at most {MAX_FRAME_BYTES:,}")
            end = payload_begin + length
            if len(self._bytes) < end:
                break
            yield from _pieces(self._bytes[payload_begin:end])
            begin = end
        del self._bytes[:begin]


def keep_watch(sock: socket.socket) -> None:
    """Has a connection end within a minute of its peer, whether or not anything is being sent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**_KEEPALIVE, "TCP_USER_TIMEOUT": UNACKNOWLEDGED_MS}.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _pieces(payload: bytearray) -> list[Piece]:
    try:
        return [(inbox, text, _finished(*rest) if rest else None) for inbox, text, *rest in json.loads(payload)]
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not pieces of text: {error}") from error


def _row(end: Finished) -> tuple[str, int, str | None]:
    return end.reason, end.num_output_tokens, end.error


def _finished(reason: str, num_output_tokens: int, error: str | None) -> Finished:
    return Finished(reason=reason, num_output_tokens=num_output_tokens, error=error)  # type: ignore[arg-type]
