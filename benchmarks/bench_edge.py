"""What one client's large and broken bodies do to another client's short requests.

A real Serve application on this machine, real HTTP. One client sends a short request, waits for its whole answer, and
sends the next. In quiet parts no other client does anything. In hostile parts another client sends one kind of body, of
up to 4 MiB, each as soon as the last one was answered. The figure is the first client's p95 in a hostile part over that
in the quiet part before it; median of the rounds.

- `no key`: what has no API key; a megabyte of empty objects;
- `objects`: 4 MiB of empty objects as messages; `messages`: as many wrong messages as a body may have;
- `fields`: one message with 30,000 fields; `ids`: as many token ids as fit in a body;
- `text`: a prompt of 4 MiB, `chat`: a message of 4 MiB: neither can fit, and a chat is known by its rendered text only;
- `long`: a prompt of words, just short enough that its tokens have to be counted.

Clients and server share the machine's cores: part of the ratio is what it costs a client to send such a body.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.http_load import client_session
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.commands.serving import base_urls, deployed, free_port, wait_until_serving
from deployments.config import IMPORT_PATH, RequestLimits

MODEL, KEY = "bench", secrets.token_hex(16)
MAX_BODY_BYTES = RequestLimits().max_body_bytes
SHORT_TOKENS = 4
NUM_SHORT, NUM_SHORT_QUICK = 60, 20
NUM_ROUNDS, NUM_ROUNDS_QUICK = 3, 1
TARGET = 3.0
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
Hostile = tuple[str, bytes, bool, set[int]]  # path, body, whether it has a key, statuses that are right


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as directory, _serving(arguments.model, Path(directory)) as url:
        samples = asyncio.run(_run(url, quick=arguments.quick))
    kinds = list(dict.fromkeys(sample["kind"] for sample in samples))
    ratios = {kind: median(s["ratio"] for s in samples if s["kind"] == kind) for kind in kinds}
    counts = {kind: sum(s["num_hostile"] for s in samples if s["kind"] == kind) for kind in kinds}
    rows = [[kind, f"{ratios[kind]:.2f}", counts[kind]] for kind in kinds]
    print(table(("body", "p95 over quiet p95", "bodies"), rows))
    checks = [Check(name=f"p95 beside {kind} over quiet", value=ratios[kind], target=f"<= {TARGET}") for kind in kinds]
    checks.append(Check(name="bodies of the rarest kind in a part", value=min(counts.values()), target=">= 2"))
    checks.append(Check(name="wrong answers", value=sum(s["num_wrong"] for s in samples), target="<= 0"))
    return finish(arguments, "emulated", samples, checks)


async def _run(url: str, *, quick: bool) -> list[dict[str, Any]]:
    samples = []
    async with client_session() as session:
        longest = await _longest_tokens(session, url)
        bodies = _bodies(longest)
        await _short_requests(session, url, 10)  # connections, caches
        for number in range(NUM_ROUNDS_QUICK if quick else NUM_ROUNDS):
            for kind, hostile in bodies.items():
                samples.append({"round": number, "kind": kind, **await _pair(session, url, hostile, quick=quick)})
                print(samples[-1], flush=True)
    return samples


async def _pair(session: aiohttp.ClientSession, url: str, hostile: Hostile, *, quick: bool) -> dict[str, Any]:
    """A quiet part and a hostile one."""
    num_short = NUM_SHORT_QUICK if quick else NUM_SHORT
    quiet_s = await _short_requests(session, url, num_short)
    answers: list[tuple[int, float]] = []
    sending = asyncio.create_task(_send(session, url, hostile, answers))
    hostile_s = await _short_requests(session, url, num_short)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    return {
        "ratio": _p95(hostile_s) / _p95(quiet_s),
        "quiet_p95_s": _p95(quiet_s),
        "hostile_p95_s": _p95(hostile_s),
        "num_hostile": len(answers),
        "answer_s": median(seconds for _, seconds in answers) if answers else None,
        "num_wrong": sum(status not in hostile[3] for status, _ in answers),
    }


async def _short_requests(session: aiohttp.ClientSession, url: str, number: int) -> list[float]:
    """Seconds until each answer is whole."""
    body = {"model": MODEL, "prompt": "One, two,", "max_tokens": SHORT_TOKENS, "temperature": 0, "ignore_eos": True}
    seconds = []
    for _ in range(number):
        sent_s = time.perf_counter()
        async with session.post(url + COMPLETION, json=body, headers=_headers(True)) as response:
            answer = await response.json()
            assert response.status == 200, answer
        seconds.append(time.perf_counter() - sent_s)
    return seconds


async def _send(session: aiohttp.ClientSession, url: str, hostile: Hostile, answers: list[tuple[int, float]]) -> None:
    path, body, has_key, _ = hostile
    while True:
        sent_s = time.perf_counter()
        try:
            async with session.post(url + path, data=body, headers=_headers(has_key)) as response:
                await response.read()
                answers.append((response.status, time.perf_counter() - sent_s))
        except aiohttp.ClientError:  # refused before all of it was sent
            answers.append((min(hostile[3]), time.perf_counter() - sent_s))


def _headers(has_key: bool) -> dict[str, str]:
    key = {"Authorization": f"Bearer {KEY}"} if has_key else {}
    return {"Content-Type": "application/json", **key}


async def _longest_tokens(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url + "/v1/models", headers=_headers(True)) as response:
        return int((await response.json())["data"][0]["max_model_len"])


def _bodies(longest_tokens: int) -> dict[str, Hostile]:
    room = MAX_BODY_BYTES - 1000
    turn = {"role": "user", "content": "x"}

    def chat(messages: list[Any]) -> bytes:
        return json.dumps({"model": MODEL, "messages": messages}).encode()

    def completion(prompt: Any) -> bytes:
        return json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 1}).encode()

    objects = b'{"model":"%s","messages":[%s{}]}' % (MODEL.encode(), b"{}," * (room // 3))
    return {
        "no key": (CHAT, objects, False, {401}),
        "objects": (CHAT, objects, True, {400}),
        "messages": (CHAT, chat([{}] * 4096), True, {400}),
        "fields": (CHAT, chat([{**turn, **{f"f{number}": 1 for number in range(30_000)}}]), True, {400}),
        "ids": (COMPLETION, completion([12345] * (room // 7)), True, {400}),
        "text": (COMPLETION, completion("one two " * (room // 8)), True, {400}),
        "chat": (CHAT, chat([{"role": "user", "content": "one two " * (room // 8)}]), True, {400}),
        "long": (COMPLETION, completion("one two " * (longest_tokens * 8)), True, {400, 429}),
    }


def _p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1))]


@contextmanager
def _serving(source: str, directory: Path) -> Iterator[str]:
    """The base URL of a server with one replica, which offloads one of its layers."""
    keys = directory / "keys"
    keys.write_text(f"bench {KEY}\n", encoding="utf-8")
    args = {
        "model": {"source": source, "served_name": MODEL, "dtype": "float32"},
        "device": {"kind": "emulated", "link_gb_per_s": 1.0, "compute_threads": 1},
        "offload": {"num_offloaded": 1},
        "slo": {"ttft_ms": 60_000, "tpot_ms": 10_000},
        "cluster": {"coordinator": False},
        "limits": {"api_keys_file": str(keys)},
    }
    application = {"name": "selectn", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}
    document = {"http_options": {"host": "127.0.0.1", "port": free_port("127.0.0.1")}, "applications": [application]}
    with local_cluster(ClusterConfig(address="local", num_cpus=2)), deployed(document):
        wait_until_serving(document, lambda elapsed_s: None)
        yield base_urls(document)[0]


if __name__ == "__main__":
    sys.exit(main())
