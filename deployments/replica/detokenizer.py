"""Token ids to text, one event at a time: every character is sent once, and only when it is final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# A cut-off UTF-8 character has at most 3 bytes, which a tokenizer shows as 1 to 3 replacement characters.
MAX_HELD_REPLACEMENTS = 3
# Context for tokenizers that drop the space in front of the first token they decode.
NUM_CONTEXT_TOKENS = 4


class Tokenizer(Protocol):
    """The one method of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """Decodes a growing sequence of output tokens.

    A sliding window [context | tokens not yet final] is decoded as a whole, because what a token reads as
    may depend on the ones before it (merged bytes, dropped leading spaces); what the window adds to the
    context's text is new. The window moves on whenever its text ends in a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []
        self._num_sent_chars = 0  # of the pending tokens' text

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""
        self._pending.extend(token_ids)
        text = self._pending_text()
        final = text[: len(text) - _num_unfinished(text)]
        fresh = self._send(final)
        if self._pending and len(final) == len(text) > 0:
            self._move_window()
        return fresh

    def finish(self) -> str:
        """What was held back: with no token to follow, a cut-off character is final as it is."""
        return self._send(self._pending_text())

    def _send(self, final: str) -> str:
        fresh = final[self._num_sent_chars :]
        self._num_sent_chars = max(self._num_sent_chars, len(final))
        return fresh

    def _pending_text(self) -> str:
        whole = self._decode(self._context + self._pending)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # Bytes of both sides joined: the context was sent as it was, so the pending tokens stand alone.
        return self._decode(self._pending)

    def _move_window(self) -> None:
        self._context, self._pending, self._num_sent_chars = self._pending, [], 0
        self._context_text = self._decode(self._context)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _num_unfinished(text: str) -> int:
    num_trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(num_trailing, MAX_HELD_REPLACEMENTS)


class StopStrings:
    """Cuts a stream of text at the first stop string, however the stream is divided into pieces.

    "First" is the one that is complete first; of several complete at the same character, the longest.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(sorted(stop, key=len, reverse=True))
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to send, whether a stop string was met). What may be the start of one is held back."""
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            self._held = ""
            return text[:found], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def finish(self) -> str:
        """What was held back: no stop string will be completed any more."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Start of the stop string that ends first, or None."""
        starts = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if not starts:
            return None
        end, negative_len = min(starts)
        return end + negative_len

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that a stop string begins with."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        for num_chars in range(longest, 0, -1):
            if any(stop.startswith(text[-num_chars:]) for stop in self._stop if len(stop) > num_chars):
                return num_chars
        return 0
