"""A request's body: bounded before it is read, before it is decoded, and before it is validated, off the event loop.

Decoding and validating hold the interpreter's lock. What they may take is therefore bounded by counting first, in
pieces between which other threads run: a body of 4 MiB can be a million empty objects.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from deployments.api.errors import ApiError, context_length_exceeded, invalid_field
from deployments.api.fields import path_to, shown

# Decoded on the event loop: even the worst body of this size takes less than handing it to a thread may have to wait.
MAX_INLINE_BYTES = 16 * 1024
# Objects and lists, and names of fields, in one body: what 4,096 messages of six parts have.
MAX_CONTAINERS = 2**15
MAX_NAMES = 2**16
# Token ids, until a replica has said how long a request may be.
MAX_TOKEN_IDS = 2**20
PIECE_BYTES = 2**16
UTF_8 = ("utf-8", "utf8")

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

Body = TypeVar("Body", bound=BaseModel)
# A place in a decoded body: its parent's, and its own name or index in it.
_Path = tuple["_Path | None", str | int]


class BodyReader:
    """Reads bodies of `max_body_bytes` at most, for `timeout_s` at most: a slow one takes the place of a call.

    Large ones are decoded one at a time, in a thread of their own.
    """

    def __init__(self, max_body_bytes: int, timeout_s: float) -> None:
        self._max_body_bytes, self._timeout_s = max_body_bytes, timeout_s
        # One: the interpreter's lock lets no second one run, and those that wait are bounded by Serve.
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def read(self, request: Request, kind: type[Body], *, longest_tokens: int | None = None) -> Body:
        """The body as a `kind`. `longest_tokens`: of a request, if known. Raises ApiError for what is wrong with it."""
        check_headers(request.headers)
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await self._data(request)
        except TimeoutError:
            message = f"the body did not come within {self._timeout_s:g} s: send it faster, or a smaller one"
            raise ApiError(408, message, code="body_timeout") from None
        if len(data) <= MAX_INLINE_BYTES:
            return parsed_body(data, kind, longest_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._decoding, parsed_body, data, kind, longest_tokens)

    async def _data(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_body_bytes:
            raise self._too_large()
        pieces, num_bytes = [], 0
        try:
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes > self._max_body_bytes:  # whatever Content-Length claims
                    raise self._too_large()
                pieces.append(piece)
        except ClientDisconnect:
            raise ApiError(400, "the body ends before its length", code="incomplete_body") from None
        return b"".join(pieces)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_body_bytes} bytes"
        return ApiError(413, message, code="body_too_large")


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises ApiError 415 for a body that is not plain JSON.

    Browsers send other content types to any server without asking: a page could use a server on its reader's machine.
    """
    content_type = headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        sent = f"is '{shown(media_type)}'" if media_type else "is missing"
        message = f"the header Content-Type {sent}: send JSON, and say so (Content-Type: application/json)"
        raise ApiError(415, message, code="unsupported_media_type")
    charset = _charset(content_type)
    if charset not in UTF_8:
        message = f"the header Content-Type says charset={shown(charset)}: send the body in UTF-8"
        raise ApiError(415, message, code="unsupported_charset")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the header Content-Encoding is '{shown(encoding)}': send the body uncompressed"
        raise ApiError(415, message, code="unsupported_encoding")


def _charset(content_type: str) -> str:
    """The charset that the header names, in lower case; UTF-8 where it names none, as JSON is."""
    header = Message()
    header["Content-Type"] = content_type
    return str(header.get_content_charset("utf-8"))


def parsed_body(data: bytes, kind: type[Body], longest_tokens: int | None = None) -> Body:
    """A body as a `kind`. Raises ApiError for the first thing that is wrong with it."""
    body = decoded(data, MAX_TOKEN_IDS if longest_tokens is None else longest_tokens)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise invalid_field(problem, problem["loc"]) from None


def decoded(data: bytes, max_token_ids: int = MAX_TOKEN_IDS) -> dict[str, Any]:
    """The JSON object in a body, whose strings are all text. Raises ApiError otherwise."""
    check_structure(data, max_token_ids)
    try:
        body = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8{_as_if_compressed(data)}") from None
    except json.JSONDecodeError as error:
        found = "it is empty" if not data.strip() else f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise _not_json(found) from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise _not_json("it has a number with too many digits") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is JSON, but no object: expected fields in braces", code="invalid_value")
    if _SURROGATE_ESCAPE.search(data):
        _check_text(body)
    return body


def check_structure(data: bytes, max_token_ids: int) -> None:
    """Raises ApiError for more objects, lists, names or values than any request has, without decoding them."""
    limits = {
        "objects and lists": (b"{[", MAX_CONTAINERS),
        "names": (b":", MAX_NAMES),
        "values": (b",", MAX_NAMES + max_token_ids),
    }
    # What is in strings counts here, so this only ever lets through what may pass.
    if all(_count(data, marks) <= limit for marks, limit in limits.values()):
        return
    counts = dict.fromkeys(limits, 0)
    for piece in outside_strings(data):
        for what, (marks, limit) in limits.items():
            counts[what] += _count(piece, marks)
            if counts[what] > limit:
                raise _too_much(what, limit, max_token_ids)


def outside_strings(data: bytes, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """What of a JSON text is in no string, piece by piece. Up to the first defect, if it is no JSON."""
    in_string, carried = False, b""
    for start in range(0, len(data), piece_bytes):
        piece = carried + data[start : start + piece_bytes]
        # The last backslash of an odd number escapes what comes first in the next piece.
        carried = piece[len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2 :]
        piece = piece[: len(piece) - len(carried)]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0


def _too_much(what: str, limit: int, max_token_ids: int) -> ApiError:
    message = f"the body has more than {limit} {what}"
    if what == "values":  # only token ids are as many
        return context_length_exceeded(f"{message}, and a request may have {max_token_ids} tokens", param=None)
    return ApiError(400, message, code="invalid_value")


def _count(data: bytes, marks: bytes) -> int:
    return sum(data.count(mark) for mark in marks)


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")


def _as_if_compressed(data: bytes) -> str:
    return "; it looks compressed (gzip): send it uncompressed" if data.startswith(b"\x1f\x8b") else ""


def _check_text(body: dict[str, Any]) -> None:
    """Raises ApiError for a string, or a field's name, with half of a surrogate pair: no text, and no UTF-8."""
    places: list[tuple[_Path | None, Any]] = [(None, body)]
    while places:
        path, value = places.pop()
        if isinstance(value, str):
            if not _is_text(value):
                raise _no_text(path, "the text")
        elif isinstance(value, dict):
            for name, inner in value.items():
                if not _is_text(name):
                    raise _no_text((path, name), "the name of the field")
                places.append(((path, name), inner))
        elif isinstance(value, list):
            places.extend(((path, index), inner) for index, inner in enumerate(value))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_text(path: _Path | None, what: str) -> ApiError:
    parts: list[str | int] = []
    while path is not None:
        path, part = path
        parts.append(part)
    param = path_to(parts[::-1])
    message = f"{param}: {what} has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return ApiError(400, message, param=param, code="invalid_value")
