"""Frames between a replica and an ingress: whole again however their bytes come, and a greeting or nothing."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import Finished
from deployments.routing.frames import (
    FRAME_TEXT,
    LENGTH_BYTES,
    FrameReader,
    Greeting,
    decode_greeting,
    encode,
    encode_greeting,
)

# Every code point, halves of surrogate pairs too, which JSON's escapes carry as they are.
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
ENDS = st.none() | st.builds(
    Finished,
    reason=st.sampled_from(["stop", "length", "cancelled", "error"]),
    num_output_tokens=st.integers(0, 1 << 31),
    error=st.none() | TEXT,
)
FRAMES = st.lists(st.lists(st.tuples(st.integers(0, 1 << 60), TEXT, ENDS), max_size=5), max_size=5)


@given(FRAMES, st.lists(st.integers(0, 2000), max_size=10))
def test_pieces_come_whole_and_in_order_however_the_bytes_come(frames, cuts) -> None:
    data = b"".join(map(encode, frames))
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    reader = FrameReader()
    pieces = [piece for begin, end in pairwise(places) for piece in reader.feed(data[begin:end])]
    assert pieces == [piece for frame in frames for piece in frame]


WORDS = st.text("0123456789abcdef-", min_size=1, max_size=64)


@given(WORDS, st.integers(0, 1 << 60), WORDS)
def test_a_greeting_is_one_line(origin, connection, secret) -> None:
    greeting = Greeting(origin=origin, connection=connection, secret=secret)
    line, newline, rest = encode_greeting(greeting).partition(b"\n")
    assert (newline, rest) == (b"\n", b"")
    assert decode_greeting(line) == greeting


@given(st.binary(max_size=40) | st.sampled_from([b"a b c", b"a 1 ", b" 1", b"a 1 b c", "é 1 b".encode()]))
def test_what_is_no_greeting_raises_nothing(line) -> None:
    assert decode_greeting(line) is None or len(line.split(b" ")) == 3


def test_much_text_goes_in_several_frames() -> None:
    pieces = [(number, "x" * FRAME_TEXT, None) for number in range(3)] + [
        (9, "end", Finished(reason="stop", num_output_tokens=1))
    ]
    encoded = encode(pieces)
    assert len(encoded) > 3 * FRAME_TEXT
    assert int.from_bytes(encoded[:LENGTH_BYTES]) < 1.1 * FRAME_TEXT
    assert list(FrameReader().feed(encoded)) == pieces
