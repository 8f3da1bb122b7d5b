"""Text in pieces equals the text as a whole, whatever the pieces are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.replica.detokenizer import REPLACEMENT, Detokenizer, StopStrings
from tests.support.tokenizers_in_process import (
    VOCAB_SIZE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
)

TEXT = st.text(alphabet="aé€🦊ろ щ.\u200d👩", max_size=30)

T = TypeVar("T")


def whole(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(ids: Sequence[T], data: st.DataObject) -> list[list[T]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids) + 1)))
    return [list(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def test_the_tokenizer_has_all_bytes_and_tokens_that_split_characters():
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    assert any(REPLACEMENT in whole(tokenizer, [token]) for token in range(260, VOCAB_SIZE))


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), data=st.data())
def test_any_tokens_in_any_pieces_read_as_a_whole(ids, data):
    tokenizer = byte_level_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(piece) for piece in cut(ids, data)]
    assert "".join(pieces) + detokenizer.finish() == whole(tokenizer, ids)


@given(text=TEXT, prompt=TEXT)
@example(text="🦊", prompt="")
def test_a_character_is_never_sent_in_halves(text, prompt):
    tokenizer = byte_level_tokenizer()
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    sent = ""
    for token in tokenizer(text)["input_ids"]:
        sent += detokenizer.push([token])
        assert text.startswith(sent)
    assert sent == text
    assert detokenizer.finish() == ""


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_at_most_one_cut_off_character_is_held_back(ids):
    tokenizer = byte_level_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    sent = "".join(detokenizer.push([token]) for token in ids)
    held = detokenizer.finish()
    assert set(held) <= {REPLACEMENT}
    assert len(held) <= 3
    assert sent + held == whole(tokenizer, ids)


def test_a_cut_off_character_is_flushed_at_the_end():
    tokenizer = byte_level_tokenizer()
    first_bytes = [tokenizer.convert_tokens_to_ids(token) for token in ("a", "ð", "Ł")]  # a, F0, 9F
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in first_bytes] == ["a", "", ""]
    assert detokenizer.finish() == REPLACEMENT


def test_a_prompt_that_ends_inside_a_character_spoils_only_that_character():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("€ a")["input_ids"]
    euro = [tokenizer.convert_tokens_to_ids(token) for token in ("â", "Ĥ", "¬")]
    detokenizer = Detokenizer(tokenizer, euro[:2])
    sent = "".join(detokenizer.push([token]) for token in (euro[2], *ids)) + detokenizer.finish()
    assert sent.endswith("€ a")


class TestByteFallback:
    def test_the_space_before_the_first_word_is_kept(self):
        tokenizer = byte_fallback_tokenizer()
        hello, world = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
        detokenizer = Detokenizer(tokenizer, [hello])
        assert [detokenizer.push([token]) for token in (world, hello)] == [" world", " Hello"]

    def test_a_character_of_several_byte_tokens_is_sent_once_it_is_whole(self):
        tokenizer = byte_fallback_tokenizer()
        detokenizer = Detokenizer(tokenizer, [tokenizer.convert_tokens_to_ids("▁Hello")])
        assert [detokenizer.push([byte]) for byte in "🦊".encode()] == ["", "", "", "🦊"]

    def test_a_broken_byte_does_not_take_a_sent_character_back(self):
        tokenizer = byte_fallback_tokenizer()
        letter = tokenizer.convert_tokens_to_ids("a")
        detokenizer = Detokenizer(tokenizer, [letter])
        sent = [detokenizer.push([token]) for token in (*"€".encode(), 0xE2, letter)]
        assert "".join(sent) == f"€{REPLACEMENT}a"


def cut_text(text: str, stop: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    strings = StopStrings(stop)
    sent = ""
    for piece in pieces:
        fresh, stopped = strings.push(piece)
        sent += fresh
        if stopped:
            return sent, True
    return sent + strings.finish(), False


def reference(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The shortest prefix of `text` that ends in a stop string, without the longest one it ends in."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text(alphabet="ab\n", max_size=16),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    data=st.data(),
)
@example(text="xabcd", stop=["abcd", "c"], data=None)
def test_stop_strings_cut_alike_in_any_pieces(text, stop, data):
    pieces = list(text) if data is None else ["".join(piece) for piece in cut(list(text), data)]
    assert cut_text(text, stop, pieces) == reference(text, stop)


@pytest.mark.parametrize(("piece", "sent"), [("ab", ""), ("b", "b"), ("xa", "x")])
def test_only_what_may_begin_a_stop_string_is_held_back(piece, sent):
    assert StopStrings(["abc"]).push(piece) == (sent, False)
