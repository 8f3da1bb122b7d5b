"""Reads a YAML file that somebody else may have written: bounded, and whatever is wrong with it is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from selectn_core.errors import SelectNError

MAX_FILE_BYTES = 16 << 20
# Values with aliases expanded: a few lines of anchors can stand for more than any memory holds.
MAX_VALUES = 200_000


def read_yaml(path: Path, refuse: type[SelectNError], *, advice: str = "") -> Any:
    """What the file holds. Raises `refuse`, naming the file and ending in `advice`, where it is no YAML to be used."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL in it
        raise refuse(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}{advice}") from None
    if len(data) > MAX_FILE_BYTES:
        raise refuse(f"{path}: is larger than {MAX_FILE_BYTES:,} bytes{advice}")
    try:
        document = yaml.safe_load(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refuse(f"{path}: is not YAML: byte {error.start} is not UTF-8{advice}") from None
    except RecursionError:
        raise refuse(f"{path}: is not YAML that can be used: it is nested too deeply{advice}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date or number that is none
        raise refuse(f"{path}: is not YAML: {' '.join(str(error).split())}{advice}") from None
    if _num_values(document) > MAX_VALUES:
        raise refuse(f"{path}: has more than {MAX_VALUES:,} values, its aliases expanded{advice}")
    return document


def _num_values(document: Any) -> int:
    """Values in the document, counted up to just above the most that are allowed: an alias may contain itself."""
    left, count = [document], 0
    while left and count <= MAX_VALUES:
        value = left.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            # Before they are taken: a list of lists of lists grows by its length at every step.
            left.extend(value.values() if isinstance(value, dict) else value)
            count += len(left) if len(left) > MAX_VALUES else 0
    return count
