"""How text travels from a replica to an ingress beside Ray's calls: one frame for all that a step has brought.

A frame is the length of its payload, 4 bytes, and the payload: JSON, which nobody can make run anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deployments.messages import Finished

LENGTH_BYTES = 4
MAX_GREETING_BYTES = 1024

# Which inbox, the text that has become final, and the end if it has come.
Piece = tuple[int, str, Finished | None]


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """The one thing that a caller says on a connection: its name, its number for the connection, and the secret."""

    origin: str
    connection: int
    secret: str


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
    """A frame."""
    rows = [[inbox, text] if end is None else [inbox, text, *_row(end)] for inbox, text, end in pieces]
    payload = json.dumps(rows, separators=(",", ":")).encode()
    return len(payload).to_bytes(LENGTH_BYTES) + payload


class FrameReader:
    """Takes frames apart, however their bytes come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Piece]:
        """The pieces of all frames that are whole by now, in order."""
        self._bytes += data
        begin = 0
        while len(self._bytes) - begin >= LENGTH_BYTES:
            payload_begin = begin + LENGTH_BYTES
            end = payload_begin + int.from_bytes(self._bytes[begin:payload_begin])
            if len(self._bytes) < end:
                break
            for inbox, text, *rest in json.loads(self._bytes[payload_begin:end]):
                yield inbox, text, _finished(*rest) if rest else None
            begin = end
        del self._bytes[:begin]


def _row(end: Finished) -> tuple[str, int, str | None]:
    return end.reason, end.num_output_tokens, end.error


def _finished(reason: str, num_output_tokens: int, error: str | None) -> Finished:
    return Finished(reason=reason, num_output_tokens=num_output_tokens, error=error)  # type: ignore[arg-type]
