"""The HTTP application by itself: in which order it looks at a request, and what it leaves to the collector."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.api_keys import load_api_keys
from deployments.config import RequestLimits
from deployments.draining import Stopping
from deployments.ingress import Ingress, Service, build_api

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
    json = {"content_type": "application/json"}
    key = {"authorization": f"Bearer {KEY}"}
    body = [piece(b"x" * 500)] * 4
    assert ask(api, path, *body, **json) == (401, 0)
    assert ask(api, path, *body, **json, authorization="Bearer other", content_length="9") == (401, 0)
    assert ask(api, path, *body, **key) == (415, 0)
    assert ask(api, path, *body, **key, **json, content_length="2000") == (413, 0)
    assert ask(api, path, *body, **key, **json) == (413, 3)
    assert ask(api, path, piece(b"{"), {"type": "http.request", "body": b""}, **key, **json) == (400, 2)


def test_the_collector_does_not_look_through_what_stays():
    gc.unfreeze()
    try:
        Ingress.__serve_build_asgi_app__(
            SimpleNamespace(
                _service=None, _limits=RequestLimits(), _keys=load_api_keys(None, None), _stopping=Stopping()
            )
        )
        assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    finally:
        gc.unfreeze()
