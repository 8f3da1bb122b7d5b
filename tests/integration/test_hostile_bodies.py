"""Bodies that are dear to refuse, at the real HTTP edge: keys come first, and another client is served meanwhile."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.integration.conftest import MODEL, PAIR_KEY

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
KEY = {"Authorization": f"Bearer {PAIR_KEY}"}
JSON = {"Content-Type": "application/json"}
ROOM = 4 * 2**20 - 1000


@pytest.fixture(scope="module")
def pair(urls) -> Iterator[httpx.Client]:
    """A client, without a key, of the application that wants one."""
    with httpx.Client(base_url=urls[2], timeout=90, trust_env=False) as client:
        yield client


def chat(messages: list) -> bytes:
    return json.dumps({"model": MODEL, "messages": messages}).encode()


def completion(prompt: str | list[int]) -> bytes:
    return json.dumps({"model": MODEL, "prompt": prompt}).encode()


OBJECTS = b'{"model":"%s","messages":[%s{}]}' % (MODEL.encode(), b"{}," * (ROOM // 3))
HOSTILE = {
    "objects": (CHAT, OBJECTS, "invalid_value"),
    "messages": (CHAT, chat([{}] * 4096), "invalid_value"),
    "fields": (CHAT, chat([{"role": "user", **{f"f{n}": 1 for n in range(30_000)}}]), "unsupported_field"),
    "text": (
        COMPLETION,
        json.dumps({"model": MODEL, "prompt": "a " * (ROOM // 2)}).encode(),
        "context_length_exceeded",
    ),
    "chat": (CHAT, chat([{"role": "user", "content": "a " * (ROOM // 2)}]), "context_length_exceeded"),
    "ids": (COMPLETION, completion([5] * (ROOM // 3)), "context_length_exceeded"),
}


@pytest.mark.parametrize("content", [OBJECTS, b'{"model": ', b"x" * (ROOM * 2)])
def test_without_a_key_the_body_does_not_matter(pair, content):
    for headers in (JSON, {}, {**JSON, "Authorization": f"Bearer {PAIR_KEY}x"}):
        response = pair.post(CHAT, content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_with_keys_the_schema_is_closed(pair):
    assert [pair.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json", "/health")] == [404] * 3 + [200]


def test_another_client_is_served_while_such_bodies_come(pair):
    answers, stop = Counter[tuple[str, int, str]](), threading.Event()

    def send(kind: str) -> None:
        path, body, _ = HOSTILE[kind]
        with httpx.Client(base_url=pair.base_url, timeout=90, trust_env=False, headers={**JSON, **KEY}) as client:
            while not stop.is_set():
                response = client.post(path, content=body)
                answers[kind, response.status_code, response.json()["error"]["code"]] += 1

    senders = [threading.Thread(target=send, args=(kind,)) for kind in HOSTILE]
    for sender in senders:
        sender.start()
    texts = set[str]()
    try:
        short = {"model": MODEL, "prompt": "a", "max_tokens": 2, "seed": 1}
        while len(answers) < len(HOSTILE) or len(texts) == 0:
            response = pair.post(COMPLETION, json=short, headers=KEY)
            assert response.status_code == 200, response.text
            texts.add(response.json()["choices"][0]["text"])
            assert all(sender.is_alive() for sender in senders)
    finally:
        stop.set()
        for sender in senders:
            sender.join()
    assert len(texts) == 1
    assert set(answers) == {(kind, 400, code) for kind, (_, _, code) in HOSTILE.items()}
