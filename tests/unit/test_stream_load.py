"""What the load of `bench_serving_path` says of a server: whole streams are whole, and what is wrong is seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import free_model, stream_load

NUM_TOKENS = 12
Answer = Callable[[dict[str, Any]], list[str]]


def whole(asked: dict[str, Any]) -> list[str]:
    """Events of a right answer, of one and of two tokens."""
    text = free_model.continuation(asked["prompt"], asked["max_tokens"])
    pieces: list[str] = []
    at = 0
    while at < len(text):
        pieces.append(text[at : at + 1 + len(pieces) % 2])
        at += len(pieces[-1])
    usage = {"prompt_tokens": 32, "completion_tokens": len(text)}
    return [
        *(event(choices=[{"index": 0, "text": piece, "finish_reason": None}]) for piece in pieces),
        event(choices=[{"index": 0, "text": "", "finish_reason": "length"}]),
        event(choices=[], usage=usage),
        "data: [DONE]\n\n",
    ]


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def lost(asked: dict[str, Any]) -> list[str]:
    return whole(asked)[1:]


def doubled(asked: dict[str, Any]) -> list[str]:
    first, *rest = whole(asked)
    return [first, first, *rest]


def swapped(asked: dict[str, Any]) -> list[str]:
    first, second, *rest = whole({**asked, "max_tokens": NUM_TOKENS})
    return [second, first, *rest]


def broken_off(asked: dict[str, Any]) -> list[str]:
    return whole(asked)[:-3]


def too_short(asked: dict[str, Any]) -> list[str]:
    return whole({**asked, "max_tokens": asked["max_tokens"] - 1})


def failed(asked: dict[str, Any]) -> list[str]:
    return [whole(asked)[0], event(error={"code": "internal_error"})]


def refused(asked: dict[str, Any]) -> list[str]:
    return []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stream_load, "MOST_WARM_UP_S", 0.3)
    monkeypatch.setattr(stream_load, "RETRY_S", 0.01)


def test_whole_streams_are_whole_however_their_bytes_come():
    seen = asyncio.run(load_of(whole))
    assert seen["wrong"] == {}
    assert seen["num_whole"] > 2
    assert seen["tokens"] > NUM_TOKENS
    assert seen["ttft_p50_s"] > 0


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (lost, "lost, doubled or out of order"),
        (doubled, "lost, doubled or out of order"),
        (swapped, "lost, doubled or out of order"),
        (broken_off, "broken off, status 200"),
        (too_short, "length after another number of tokens than asked for"),
        (failed, "error internal_error"),
        (refused, "status 429"),
    ],
)
def test_a_wrong_stream_is_seen(answer, what):
    seen = asyncio.run(load_of(answer))
    assert seen["wrong"][what] > 0
    assert seen["num_whole"] == 0


def test_of_another_model_tokens_are_what_usage_says():
    seen = asyncio.run(load_of(whole, prompts=["to", "be"]))
    assert seen["wrong"] == {}
    assert seen["num_cut"] == seen["num_other_texts"] == 0
    assert 0 < seen["tokens"] <= seen["num_whole"] * NUM_TOKENS


async def load_of(answer: Answer, prompts: list[str] | None = None) -> dict[str, Any]:
    """What two streams saw of a server that answers so, in chunks and writes that begin and end anywhere."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        events = "".join(answer(json.loads(await reader.readexactly(length)))).encode()
        chunks = [events[at : at + 50] for at in range(0, len(events), 50)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        data = b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n" % (b"200 OK" if events else b"429 No") + body
        for at in range(0, len(data), 37):
            writer.write(data[at : at + 37])
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        job = stream_load.Job(
            url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions",
            body={"stream": True},
            prompts=prompts,
            num_streams=2,
            num_tokens=NUM_TOKENS,
            warm_up_s=0.0,
            seconds=0.3,
            groups={},
        )
        return await stream_load.Load(job).run()
