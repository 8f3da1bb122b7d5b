"""A small streaming client for this machine's own server: answers with the latencies their reader saw."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. TTFT is from sending the request; TPOT is over the tokens after the first."""

    question: str
    text: str
    num_tokens: int
    ttft_s: float
    tpot_s: float


def stream_chat(base_url: str, model: str, question: str, *, max_tokens: int) -> Answer:
    """Asks one question, greedily, and reads the answer as it is generated. Raises OSError or RuntimeError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s = last_s = 0.0
    pieces, num_tokens = [], 0
    for event in _events(f"{base_url}/v1/chat/completions", body):
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if text:
            last_s = time.perf_counter()
            first_s = first_s or last_s
            pieces.append(text)
    return Answer(
        question=question,
        text="".join(pieces),
        num_tokens=num_tokens,
        ttft_s=first_s - started_s,
        tpot_s=(last_s - first_s) / max(1, num_tokens - 1),
    )


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to [DONE]."""
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    # The server is on this machine: not through $http_proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT_S) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
