"""Whether a text can fit a model's context, by its length alone: each token stands for so many characters at most.

How many follows from the tokenizer's own parts, once. Used by the ingress too, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The most characters that one composed character is made of (U+1F82 and its like).
MAX_COMPOSED = 4
WHITE_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
# Every character of a text leaves at least one behind: but for white space with those that remove it.
_KEEPING = {"Prepend", "Lowercase", "ByteLevel", "NFD", "NFKD", "Metaspace", "Digits", "UnicodeScripts"}
_COMPOSING = {"NFC", "NFKC"}
_REMOVING_SPACE = {"Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True, kw_only=True)
class TextBound:
    """A text with more than `max_chars`, `uncounted` ones left out, has more tokens than fit."""

    max_chars: int
    uncounted: str = ""

    def refusal(self, text: str) -> str | None:
        """Why this text cannot fit; None where its tokens have to be counted. Reads all of it, uncounted times."""
        num_chars = len(text)
        for char in self.uncounted:
            if num_chars <= self.max_chars:
                break
            num_chars -= text.count(char)
        if num_chars <= self.max_chars:
            return None
        return f"the prompt has {len(text)} characters; no text of more than {self.max_chars} fits this model's context"


def text_bound(tokenizer: Any, max_tokens: int) -> TextBound | None:
    """The bound for a context of `max_tokens`; None where one token may stand for any number of characters.

    A token stands for no more than it spells, unless a part of the tokenizer makes one of many characters (unknown
    words, composition), or drops some: those that its vocabulary lacks, or white space. These are not counted.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # nothing says what its parts are
        return None
    parts = [*_parts(_state(backend.normalizer)), *_parts(_state(backend.pre_tokenizer))]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    unknown = _dropped_as_unknown(backend.model, vocabulary, is_byte_level=any(p["type"] == "ByteLevel" for p in parts))
    if unknown is None or not all(_keeps_all_but_space(part) for part in parts):
        return None
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    removes_space = swallows or any(part["type"] in _REMOVING_SPACE for part in parts)
    composed: int = MAX_COMPOSED ** sum(part["type"] in _COMPOSING for part in parts)
    return TextBound(
        max_chars=max_tokens * max(map(len, vocabulary)) * composed,
        uncounted="".join(sorted({*unknown, *(WHITE_SPACE if removes_space else "")})),
    )


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _parts(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or the ones in it."""
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    inner = state.get("normalizers") or state.get("pretokenizers") or []
    return [part for each in inner for part in _parts(each)]


def _keeps_all_but_space(part: dict[str, Any]) -> bool:
    kind = part["type"]
    if kind == "Replace":
        replaced = part["pattern"].get("String")
        return replaced is not None and 0 < len(replaced) <= len(part["content"])
    if kind in ("Split", "Punctuation"):
        return part["behavior"] != "Removed"
    return kind in _KEEPING | _COMPOSING | _REMOVING_SPACE


def _dropped_as_unknown(model: Any, vocabulary: Mapping[str, int], *, is_byte_level: bool) -> str | None:
    """The characters that become no token; None where many may become one, or it does not show."""
    if type(model).__name__ != "BPE":  # in the others a whole unknown word, or a row of characters, is one token
        return None
    if is_byte_level:
        return _dropped_bytes(vocabulary)
    if model.byte_fallback and all(each in vocabulary for each in _BYTE_TOKENS):
        return ""
    return "" if model.unk_token in vocabulary and not model.fuse_unk else None


def _dropped_bytes(vocabulary: Mapping[str, int]) -> str | None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    missing = {byte for byte, char in bytes_to_unicode().items() if char not in vocabulary}
    # What is not ASCII leaves its continuation bytes at least.
    return None if missing & set(range(0x80, 0xC0)) else "".join(chr(byte) for byte in missing if byte < 0x80)
