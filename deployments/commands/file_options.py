"""Options of the command line that name files."""

from __future__ import annotations

from pathlib import Path

from selectn_core.errors import SelectNError


class NoName(SelectNError):
    """A file was asked for by an empty name, as of a shell variable that is not set."""


def file_name(text: str) -> Path:
    """An option's value as a path. An empty one would be the current directory. Raises NoName."""
    if not text.strip():
        raise NoName(f"a file's name is {text!r}: expected a path")
    return Path(text)
