"""API keys: whose a request is. Compared in constant time, and never shown."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from selectn_core.errors import ConfigError

ANONYMOUS = "anonymous"
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class ApiKeys:
    """Digests of keys, by the name each belongs to. Without any, everybody is let in as one and the same."""

    _digests: Mapping[str, bytes] = field(default_factory=dict, repr=False)

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
    """Keys from a file and from an environment variable, both optional; lines of "name key", # begins a comment.

    Raises ConfigError, which names line and name but never a key.
    """
    digests: dict[str, bytes] = {}
    for where, text in _sources(file, environment):
        for number, line in enumerate(text.replace(";", "\n").splitlines(), start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise ConfigError(f"{where}, line {number}: expected a name and a key, separated by a space")
            name, key = words
            if len(key) < MIN_KEY_LENGTH:
                raise ConfigError(
                    f"{where}, line {number}: the key of {name!r} has fewer than {MIN_KEY_LENGTH} characters"
                )
            if name in digests:
                raise ConfigError(f"{where}, line {number}: there is a key of {name!r} already")
            digests[name] = _digest(key)
        if not digests:
            raise ConfigError(f"{where}: has no key; leave the setting out to let everybody in")
    return ApiKeys(digests)


def _sources(file: str | None, environment: str | None) -> list[tuple[str, str]]:
    sources = []
    if file is not None:
        try:
            sources.append((f"limits.api_keys_file={file!r}", Path(file).expanduser().read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"limits.api_keys_file={file!r} cannot be read: {error.strerror}") from None
    if environment is not None:
        if environment not in os.environ:
            raise ConfigError(f"limits.api_keys_env={environment!r}: there is no such environment variable here")
        sources.append((f"limits.api_keys_env={environment!r}", os.environ[environment]))
    return sources


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
