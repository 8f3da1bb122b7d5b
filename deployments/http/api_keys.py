"""API keys: whose a request is. Compared in constant time, and never shown."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from selectn_core.errors import ConfigError

ANONYMOUS = "anonymous"
MIN_KEY_LENGTH = 16
# Within a word # is part of it: a key that was cut there would let in who knows its beginning.
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass(frozen=True)
class ApiKeys:
    """Digests of keys, by the name each belongs to. Without any, everybody is let in as one and the same."""

    _digests: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def are_required(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """The name behind an `Authorization: Bearer ...` header; None if it is no key of ours."""
        if not self._digests:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        # Every one is compared, and none of it depends on where two keys begin to differ.
        matching = [name for name, known in self._digests.items() if hmac.compare_digest(known, digest)]
        return matching[0] if matching and scheme.lower() == "bearer" else None


def load_api_keys(file: str | None, environment: str | None) -> ApiKeys:
    """Keys from a file and from an environment variable, both optional: lines of "name key".

    A # at the beginning of a line or after a space begins a comment. Raises ConfigError, which names line and name but
    never a key.
    """
    digests: dict[str, bytes] = {}
    for where, lines in _sources(file, environment):
        num_before = len(digests)
        for number, line in enumerate(lines, start=1):
            words = _COMMENT.sub("", line).split()
            if words:
                name, digest = _entry(words, f"{where}, line {number}")
                _add(digests, name, digest, f"{where}, line {number}")
        if len(digests) == num_before:
            raise ConfigError(f"{where}: has no key; leave the setting out to let everybody in")
    return ApiKeys(digests)


def _entry(words: list[str], where: str) -> tuple[str, bytes]:
    if len(words) != 2:
        raise ConfigError(f"{where}: expected a name and a key, separated by a space")
    name, key = words
    if len(key) < MIN_KEY_LENGTH:
        raise ConfigError(f"{where}: the key of {name!r} has fewer than {MIN_KEY_LENGTH} characters")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{where}: the key of {name!r} has a character that clients cannot send in an HTTP header: "
            "use ASCII letters, digits and punctuation"
        )
    return name, _digest(key)


def _add(digests: dict[str, bytes], name: str, digest: bytes, where: str) -> None:
    if name in digests:
        raise ConfigError(f"{where}: there is a key of {name!r} already")
    for other, known in digests.items():
        if hmac.compare_digest(known, digest):
            raise ConfigError(f"{where}: {name!r} has the same key as {other!r}: requests could be either's")
    digests[name] = digest


def _sources(file: str | None, environment: str | None) -> Iterator[tuple[str, list[str]]]:
    """Where keys may be, with the lines there."""
    if file is not None:
        where = f"limits.api_keys_file={file!r}"
        yield where, _lines_of(Path(file).expanduser(), where)
    if environment is not None:
        where = f"limits.api_keys_env={environment!r}"
        if environment not in os.environ:
            raise ConfigError(f"{where}: there is no such environment variable here")
        yield where, os.environ[environment].replace(";", "\n").split("\n")


def _lines_of(path: Path, where: str) -> list[str]:
    try:
        data = path.read_bytes()
        # Not splitlines(): it splits at characters that a key may have been meant to have.
        return data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}, line {line}: is not UTF-8; save the file as UTF-8, or without accents") from None


def _digest(key: str) -> bytes:
    # Headers come as Latin-1, and what is no key of ours may be any text at all.
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
