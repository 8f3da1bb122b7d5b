"""The HTTP application by itself: in which order it looks at a request, and what it leaves to the collector."""

from __future__ import annotations

import asyncio
import gc
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.types import Message

from deployments.config import RequestLimits
from deployments.http.api_keys import load_api_keys
from deployments.http.draining import Stopping
from deployments.http.ingress import Ingress, Service, build_api

KEY = "a-key-of-the-tests-0"
URLS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture
def api(monkeypatch) -> Any:
    """The application, closed to those without the key. Nothing here gets as far as a replica."""
    monkeypatch.setenv("SOME_KEYS", f"tests {KEY}")
    service = cast(Service, SimpleNamespace(longest_tokens=None))
    return build_api(service, RequestLimits(max_body_bytes=1024), load_api_keys(None, "SOME_KEYS"))


def ask(api: Any, path: str, *events: dict[str, Any], **headers: str) -> tuple[int, int]:
    """The answer's status, and how many of these events of its body were received before."""
    left, sent = list(events), list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b""}
    asyncio.run(api(scope, receive, send))
    return sent[0]["status"], len(events) - len(left)


def piece(data: bytes) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": True}


@pytest.mark.parametrize("path", URLS)
def test_a_body_is_not_received_before_the_key_the_headers_and_the_length_are_known(api, path):
    plain = {"content_type": "application/json"}
    key = {"authorization": f"Bearer {KEY}"}
    body = [piece(b"x" * 500)] * 4
    assert ask(api, path, *body, **plain) == (401, 0)
    assert ask(api, path, *body, **plain, authorization="Bearer other", content_length="9") == (401, 0)
    assert ask(api, path, *body, **key) == (415, 0)
    assert ask(api, path, *body, **key, **plain, content_length="2000") == (413, 0)
    assert ask(api, path, *body, **key, **plain) == (413, 3)
    assert ask(api, path, piece(b"{"), {"type": "http.request", "body": b""}, **key, **plain) == (400, 2)


@pytest.mark.parametrize("path", URLS)
def test_a_wrong_field_is_refused_before_a_replica_is_asked_for(api, path):
    headers = {"content_type": "application/json", "authorization": f"Bearer {KEY}"}
    least = b'"prompt": "hi"' if path == "/v1/completions" else b'"messages": [{"role": "user", "content": "hi"}]'
    for wrong in (b'"temperature": 1e999', b'"top_p": "nan"', b'"top_k": -2', b'"n": true', b'"stream": "yes"'):
        body = b'{"model": "no such model", %s, %s}' % (least, wrong)
        events = [{"type": "http.request", "body": body, "more_body": False}]
        assert ask(api, path, *events, **headers) == (400, 1), wrong


def test_a_body_has_the_time_that_the_limits_say():
    keys, service = load_api_keys(None, None), cast(Service, SimpleNamespace(longest_tokens=None))
    api, sent = build_api(service, RequestLimits(body_timeout_s=0.05), keys), list[Message]()

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()  # never

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": URLS[0], "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    asyncio.run(asyncio.wait_for(api(scope, receive, send), 20))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


def test_an_unknown_url_is_shown_in_part_and_without_what_is_not_printed(api):
    sent = list[dict[str, Any]]()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/a\x1b\u2028b" + "x" * 60_000,
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(api(scope, asyncio.Event().wait, send))
    message = json.loads(sent[1]["body"])["error"]["message"]
    assert message.startswith(r"unknown URL: GET /a\x1b\u2028bxxx")
    assert len(message) < 300


def test_the_collector_does_not_look_through_what_stays():
    gc.unfreeze()
    try:
        Ingress.__serve_build_asgi_app__(
            cast(
                Ingress,
                SimpleNamespace(
                    _service=None,
                    _limits=RequestLimits(),
                    _keys=load_api_keys(None, None),
                    _stopping=Stopping(),
                    _collector=None,
                ),
            )
        )
        assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    finally:
        gc.unfreeze()
