"""What libraries raise while a model is loaded, as one line that says which file and what is wrong with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from selectn_core.errors import ConfigError, HostMemoryExceeded, SelectNError, UnsupportedModel

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 400
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def blaming(
    what: object, *, raises: type[SelectNError] = ConfigError, values: dict[str, Any] | None = None
) -> Iterator[None]:
    """Whatever a library raises meanwhile becomes one line that begins with `what`.

    It is a `raises`, UnsupportedModel where a package is missing, or HostMemoryExceeded. Errors of this project pass.
    A name that a library does not know is looked up in `values`, to say which field of a configuration has it.
    """
    try:
        yield
    except (SelectNError, MemoryError):
        raise
    except Exception as error:
        logger.debug("%s", what, exc_info=error)
        if "can't allocate memory" in str(error):  # torch's own, which is a RuntimeError
            raise HostMemoryExceeded(f"{what}: {one_line(str(error))}") from None
        kind = UnsupportedModel if isinstance(error, ImportError) else raises
        raise kind(f"{what}: {_reason(error, values or {})}") from None


def one_line(text: str) -> str:
    """The first paragraph of `text` without line breaks, terminal codes or the end of what is very long."""
    words = " ".join(_TERMINAL_CODES.sub("", text.strip().split("\n\n")[0]).split())
    return words if len(words) <= _MOST_CHARACTERS else f"{words[:_MOST_CHARACTERS]}..."


def listed(what: str, names: Iterable[str]) -> str:
    """The first few of `names`, and what they are; nothing of none."""
    if not (shown := sorted(names)):
        return ""
    return f"{what}: {', '.join(shown[:3])}" + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _reason(error: Exception, values: dict[str, Any]) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        field = _field_with(values, error.args[0])
        if field is not None:
            return f"{field}={error.args[0]!r} is not known to transformers"
        if " " in error.args[0]:  # a sentence, not a key
            return one_line(error.args[0])
    text = one_line(str(error))
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _field_with(values: dict[str, Any], wanted: str) -> str | None:
    """The name of the field that has this value, with the names of the objects that it is in."""
    for name, value in values.items():
        if value == wanted:
            return name
        if isinstance(value, dict) and (inner := _field_with(value, wanted)) is not None:
            return f"{name}.{inner}"
    return None
