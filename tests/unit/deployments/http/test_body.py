"""Bodies: what is wrong with one is found before it costs anything, and off the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator
from starlette.requests import Request

from deployments.api.errors import ApiError
from deployments.api.protocol import ChatCompletionRequest, ClientObject, CompletionRequest
from deployments.http import body as request_body
from deployments.http.body import (
    MAX_CONTAINERS,
    MAX_INLINE_BYTES,
    MAX_NAMES,
    BodyReader,
    check_headers,
    decoded,
    outside_strings,
)

JSON = {"content-type": "application/json"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab\\"{}[],:é\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab\\"{}[],:'), inner),
    max_leaves=30,
)


def request(*pieces: bytes, headers: dict[str, str] = JSON) -> Request:
    """A request whose body comes in these pieces; `receives` counts how often more is asked for."""
    events = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    events.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return events.pop(0)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def refusal(data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decoded(data)
    return caught.value


def structure(value: Any) -> tuple[int, int, int]:
    """Objects and lists, names, and commas of a value as JSON."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    counts = [structure(each) for each in inner]
    own = (isinstance(value, dict | list), len(value) if isinstance(value, dict) else 0, max(0, len(inner) - 1))
    return tuple(map(sum, zip(own, *counts, strict=True)))  # type: ignore[return-value]


@given(json_values, st.integers(1, 9), st.booleans())
def test_what_is_counted_is_what_is_there_however_the_body_is_cut(value, piece_bytes, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    outside = b"".join(outside_strings(data, piece_bytes))
    assert (outside.count(b"{") + outside.count(b"["), outside.count(b":"), outside.count(b",")) == structure(value)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"[" + b"{}," * MAX_CONTAINERS + b"{}]", "objects and lists"),
        (b'{"a":[' + b"[" * MAX_CONTAINERS, "objects and lists"),
        (b"{" + b",".join(b'"%d":0' % number for number in range(MAX_NAMES + 1)) + b"}", "names"),
        (b'{"prompt":[' + b"1," * (MAX_NAMES + request_body.MAX_TOKEN_IDS) + b"1,1]}", "values"),
    ],
)
def test_more_than_any_request_has_is_refused_undecoded(data, what, monkeypatch):
    decodings = list[object]()
    monkeypatch.setattr(request_body.json, "loads", decodings.append)
    error = refusal(data)
    assert (error.status, decodings) == (400, [])
    assert what in str(error)


def test_what_is_in_strings_is_text():
    text = '{"[,:\\"' * 20_000
    assert decoded(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_thousand_wrong_items_make_one_error():
    wrong: dict[str, Any] = {"messages": [{}] * 4000}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", **wrong})
    assert caught.value.error_count() == 2  # role and content of the first message
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": [1] + [{}] * 4000, "stop": [5, 6]})
    assert caught.value.error_count() == 2  # the prompt, and the first stop string
    turn = {"role": "user", "content": "x", **{f"k{number}": 1 for number in range(4000)}}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [turn]})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (rb'{"model": "\ud83d"}', "model"),
        (rb'{"prompt": "a\udc00"}', "prompt"),
        (rb'{"stop": ["a", "\uDBFF"]}', "stop[1]"),
        (rb'{"messages": [{"content": [{"text": "\ud83dx"}]}]}', "messages[0].content[0].text"),
        (rb'{"metadata": {"a": {"\ud83d": 1}}}', r"metadata.a.\ud83d"),
        (rb'{"\ud83d": 1}', r"\ud83d"),
    ],
)
def test_half_a_character_is_refused_where_it_is(data, param):
    error = refusal(data)
    assert (error.status, error.param) == (400, param)
    json.dumps(error.body().model_dump()).encode()
    error.response()


@given(st.text(st.characters(exclude_categories=[])))
def test_all_text_is_taken_and_nothing_else(text):
    data = json.dumps({"prompt": text}).encode()
    try:
        text.encode()
    except UnicodeEncodeError:
        assert refusal(data).param == "prompt"
    else:
        assert decoded(data) == {"prompt": text}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b'{"a": ', "Expecting value at line 1, column 7"),
        (b"\x1f\x8b\x08", "it looks compressed"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xed\xa0\xbd"}', "not UTF-8"),
        (b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "too many digits"),
    ],
)
def test_what_is_no_json_is_told_why(data, message):
    error = refusal(data)
    assert (error.status, error.code) == (400, "invalid_json")
    assert message in str(error)


@pytest.mark.parametrize("data", [b"[]", b"5", b'"x"', b"null"])
def test_a_body_is_an_object(data):
    assert refusal(data).code == "invalid_value"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
        ({"content-type": "text/plain"}, "unsupported_media_type"),
        ({**JSON, "content-encoding": "gzip"}, "unsupported_encoding"),
        ({"content-type": "application/json; charset=utf-16"}, "unsupported_charset"),
        ({"content-type": 'application/json; a="b;charset=utf-8"; charset="ISO-8859-1"'}, "unsupported_charset"),
        ({"content-type": 'application/json; charset="UTF-8"'}, None),
        (JSON, None),
        ({"content-type": "Application/JSON; charset=utf-8", "content-encoding": "identity"}, None),
    ],
)
def test_only_plain_json_is_read(headers, code):
    if code is None:
        check_headers(headers)
        return
    with pytest.raises(ApiError) as caught:
        check_headers(headers)
    assert (caught.value.status, caught.value.code) == (415, code)


@pytest.mark.parametrize("headers", [JSON, {**JSON, "content-length": "5"}, {**JSON, "content-length": "9" * 5000}])
def test_a_body_is_bounded_whatever_its_length_claims(headers):
    async def read() -> None:
        await BodyReader(10, 60).read(request(b'{"a":', b"1234567}", headers=headers), CompletionRequest)

    with pytest.raises(ApiError) as caught:
        asyncio.run(read())
    assert caught.value.status == 413


@pytest.mark.parametrize("pieces", [[], [b"{"]], ids=["stalled", "dripping"])
def test_a_body_that_never_ends_is_not_waited_for(pieces):
    async def receive() -> dict[str, Any]:
        await (asyncio.sleep(0.001) if pieces else asyncio.Event().wait())
        return {"type": "http.request", "body": pieces[0], "more_body": True}

    slow = request()
    slow._receive = receive
    with pytest.raises(ApiError, match="the body did not come within 0.05 s") as caught:
        asyncio.run(asyncio.wait_for(BodyReader(1 << 30, 0.05).read(slow, CompletionRequest), 20))
    assert (caught.value.status, caught.value.code) == (408, "body_timeout")
    assert caught.value.body().error.type == "invalid_request_error"
    assert caught.value.response().headers["Connection"] == "close"


def test_the_charset_that_was_sent_is_named():
    with pytest.raises(ApiError, match="charset=utf-16: send the body in UTF-8"):
        check_headers({"content-type": "application/json; charset=UTF-16"})


class Held(ClientObject):
    """A body whose validation waits to be let go."""

    prompt: str

    @model_validator(mode="before")
    @classmethod
    def _wait(cls, values: Any) -> Any:
        if len(values["prompt"]) > MAX_INLINE_BYTES:
            HOLD.begun.set()
            assert HOLD.let_go.wait(20)
        return values


class HOLD:
    begun, let_go = threading.Event(), threading.Event()


def test_a_small_body_does_not_wait_for_a_large_one():
    async def check() -> None:
        bodies = BodyReader(1 << 20, 60)
        large = asyncio.create_task(bodies.read(request(json.dumps({"prompt": "x" * 100_000}).encode()), Held))
        while not HOLD.begun.is_set():
            await asyncio.sleep(0)
        small = await bodies.read(request(b'{"prompt": "x"}'), Held)
        assert small.prompt == "x"
        assert not large.done()
        HOLD.let_go.set()
        assert len((await large).prompt) == 100_000

    asyncio.run(asyncio.wait_for(check(), 30))
