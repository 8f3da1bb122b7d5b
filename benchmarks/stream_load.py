"""The cheapest load of streamed completions, in a process of its own: always as many at once, each begun as one ends.

Reads a job from standard input and writes what it saw to standard output, both as JSON. No HTTP library: a connection
per completion, whose chunks are taken apart here, so that a token costs this process some tens of microseconds.

First completions are of all lengths, so that from then on some end and begin all the time. Counting begins when every
stream has had a token, and after a time. What a stream has said is checked: against the free model's known text, or of
other models against what the same prompt was answered before.

Several tokens may come as one text. Of the free model each character is a token, and streams under way at the end are
cut. Of other models a stream's tokens are those that its usage says, by the share of its text that came while it was
counted; so they go on to their ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from benchmarks import free_model
from benchmarks.cpu_use import CpuUse

MOST_WARM_UP_S = 120.0
RETRY_S = 0.2
TENTHS_OF_MS = 1e4


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to ask for, of whom, for how long. `body`: the fields of every request but its prompt and `max_tokens`.

    `prompts` None: the free model's, and each character is a token. `groups`: the server's processes.
    """

    url: str
    body: dict[str, Any]
    prompts: list[str] | None
    num_streams: int
    num_tokens: int
    warm_up_s: float
    seconds: float
    groups: dict[str, list[int]]

    @property
    def is_chat(self) -> bool:
        return self.url.endswith("/chat/completions")

    def prompt(self, client: int, number: int) -> str:
        if self.prompts is None:
            return free_model.prompt(client, number)
        return self.prompts[client % len(self.prompts)]

    def request(self, prompt: str, num_tokens: int) -> bytes:
        """A whole HTTP request."""
        url = urlsplit(self.url)
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        body = json.dumps({**self.body, **asked, "max_tokens": num_tokens}).encode()
        head = (
            f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(kw_only=True)
class Seen:
    """What came while it was counted. Times between texts are counted in tenths of milliseconds."""

    num_chars: int = 0
    num_texts: int = 0
    gaps: Counter[int] = field(default_factory=Counter)
    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)  # of streams that ended, each the mean over its tokens
    began_s: float = 0.0  # 0: what comes is not counted


@dataclass(kw_only=True)
class Verdict:
    """Of all streams, those while nothing was counted included. `wrong`: how many, by what was wrong."""

    num_whole: int = 0
    num_cut: int = 0
    counted_tokens: float = 0.0  # of whole ones, as their usage and their texts say
    wrong: Counter[str] = field(default_factory=Counter)
    num_other_texts: int = 0  # whole ones that are not what the same prompt was answered before
    texts: dict[str, str] = field(default_factory=dict)  # by prompt, the longest


class Load:
    """Keeps `job.num_streams` completions going."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.seen, self.verdict = Seen(), Verdict()
        self._streams: dict[int, Stream] = {}
        self._silent = set(range(job.num_streams))
        self._all_have_begun = asyncio.Event()
        self._is_over = False

    async def run(self) -> dict[str, Any]:
        clients = [asyncio.create_task(self._client(number)) for number in range(self._job.num_streams)]
        try:
            async with asyncio.timeout(MOST_WARM_UP_S):
                await self._all_have_begun.wait()
            await asyncio.sleep(self._job.warm_up_s)
        except TimeoutError:
            self.verdict.wrong["no token in time"] += len(self._silent)
        with CpuUse({**self._job.groups, "load": [os.getpid()]}) as use:
            self.seen = seen = Seen(began_s=time.perf_counter())
            await asyncio.sleep(self._job.seconds)
            self.seen, self._is_over = Seen(), True
        if self._job.prompts is None:
            self.verdict.num_cut = len(self._streams)
            for stream in list(self._streams.values()):
                stream.cut()
        await asyncio.gather(*clients)
        return self._result(seen, use)

    def has_begun(self, client: int) -> None:
        self._silent.discard(client)
        if not self._silent:
            self._all_have_begun.set()

    async def _client(self, client: int) -> None:
        number = 0
        while not self._is_over:
            num_tokens = self._job.num_tokens
            if number == 0:
                num_tokens = max(1, num_tokens * (client + 1) // self._job.num_streams)
            if not await self._complete(client, self._job.prompt(client, number), num_tokens):
                await asyncio.sleep(RETRY_S)
            number += 1

    async def _complete(self, client: int, prompt: str, num_tokens: int) -> bool:
        """One completion; whether it was right."""
        url = urlsplit(self._job.url)
        stream = Stream(self, client, num_tokens, self._job.prompts is None, self._job.request(prompt, num_tokens))
        try:
            await asyncio.get_running_loop().create_connection(lambda: stream, url.hostname or "", url.port or 80)
        except OSError:
            self.verdict.wrong["no connection"] += 1
            return False
        self._streams[client] = stream
        await stream.ended
        del self._streams[client]
        what = stream.wrong_so_far(prompt) or (None if stream.is_cut else stream.wrong_at_its_end())
        if what is not None:
            self.verdict.wrong[what] += 1
        elif not stream.is_cut:
            self._whole(stream, prompt)
        return what is None

    def _whole(self, stream: Stream, prompt: str) -> None:
        verdict = self.verdict
        verdict.num_whole += 1
        if stream.usage is not None and stream.num_chars:
            verdict.counted_tokens += stream.usage["completion_tokens"] * stream.num_counted_chars / stream.num_chars
        if self._job.prompts is not None:
            text, before = "".join(stream.texts), verdict.texts.get(prompt, "")
            verdict.num_other_texts += not (text.startswith(before) or before.startswith(text))
            verdict.texts.setdefault(prompt, text)
            if text.startswith(before):
                verdict.texts[prompt] = text

    def _result(self, seen: Seen, use: CpuUse) -> dict[str, Any]:
        verdict, seconds = self.verdict, use.used.seconds
        num_tokens = seen.num_chars if self._job.prompts is None else (verdict.counted_tokens or seen.num_texts)
        return {
            "seconds": seconds,
            "tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "texts": seen.num_texts,
            "ttft_p50_s": at(seen.ttfts_s, 0.5),
            "ttft_p99_s": at(seen.ttfts_s, 0.99),
            "num_ttfts": len(seen.ttfts_s),
            "itl_p50_s": _gap_s(seen.gaps, 0.5),
            "itl_p99_s": _gap_s(seen.gaps, 0.99),
            "tpot_s": median(seen.tpots_s) if seen.tpots_s else None,
            "num_whole": verdict.num_whole,
            "num_cut": verdict.num_cut,
            "wrong": dict(verdict.wrong),
            "num_other_texts": verdict.num_other_texts,
            **asdict(use.used),
        }


class Stream(asyncio.Protocol):
    """One completion on a connection of its own. `ended` is done when the connection is."""

    def __init__(self, load: Load, client: int, num_tokens: int, is_free: bool, request: bytes) -> None:
        self._load, self._client, self._num_tokens, self._is_free = load, client, num_tokens, is_free
        self._request = request
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.texts: list[str] = []
        self.num_chars = self.num_counted_chars = 0
        self.usage: dict[str, int] | None = None
        self.is_cut = False
        self._status: int | None = None
        self._buffer = b""  # of the response, what is not taken apart yet
        self._left = 0  # bytes that a chunk still has
        self._events = b""  # of the body, an event that is not whole yet
        self._finish_reason: str | None = None
        self._is_done = False
        self._problem: str | None = None
        self._first_s = self._last_s = 0.0

    def cut(self) -> None:
        """Goes away, as a client does that has had enough."""
        self.is_cut = True
        self._transport.abort()

    def wrong_so_far(self, prompt: str) -> str | None:
        """What is wrong with what has come, whether or not more was to come."""
        if self._problem is None and self._is_free:
            text = "".join(self.texts)
            if text != free_model.continuation(prompt, len(text)):
                return "lost, doubled or out of order"
        return self._problem

    def wrong_at_its_end(self) -> str | None:
        """What a whole answer would have that this one has not."""
        if self._status != 200 or not self._is_done or self._finish_reason is None:
            return f"broken off, status {self._status}"
        if self._is_free and (self.num_chars != self._num_tokens or self._finish_reason != "length"):
            return f"{self._finish_reason or 'no reason'} after another number of tokens than asked for"
        if self.usage is not None and self._is_free and self.usage["completion_tokens"] != self._num_tokens:
            return "usage counts other tokens than came"
        return None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sent_s = time.perf_counter()
        transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if self._last_s and self._is_done and self.num_chars > 1:
            num_tokens = self.usage["completion_tokens"] if self.usage is not None else len(self.texts)
            self._load.seen.tpots_s.append((self._last_s - self._first_s) / max(1, num_tokens - 1))
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._buffer += data
        if self._status is None:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            self._status = int(head.split(b" ", 2)[1])
            if self._status != 200:
                self._problem = f"status {self._status}"
                self._transport.abort()
                return
            self._buffer = rest
        *events, self._events = (self._events + self._body()).split(b"\n\n")
        for event in events:
            self._take(event, now_s)

    def _body(self) -> bytes:
        """What has come of the body, out of its chunks."""
        buffer, at, parts = self._buffer, 0, []
        while at < len(buffer):
            if self._left:
                part = buffer[at : at + self._left]
                parts.append(part)
                self._left -= len(part)
                at += len(part)
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            if end > at:  # else what ends the chunk before
                self._left = int(buffer[at:end], 16)
                if not self._left:
                    self._end()
            at = end + 2
        self._buffer = buffer[at:]
        return b"".join(parts).replace(b"\r", b"")

    def _end(self) -> None:
        """At the last event that OpenAI's servers send, or the last chunk of those that leave it out."""
        self._is_done = True
        self._transport.close()

    def _take(self, event: bytes, now_s: float) -> None:
        data = event.strip().removeprefix(b"data:").strip()
        if not data or data.startswith(b":"):
            return
        if data == b"[DONE]":
            self._end()
            return
        fields = json.loads(data)
        if "error" in fields:
            self._problem = f"error {fields['error'].get('code')}"
            return
        self.usage = fields.get("usage") or self.usage
        for choice in fields.get("choices") or ():
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            text = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
            if text:
                self._add(text, now_s)

    def _add(self, text: str, now_s: float) -> None:
        seen = self._load.seen
        num_tokens = len(text) if self._is_free else 1
        if self._first_s == 0.0:
            self._first_s = now_s
            self._load.has_begun(self._client)
            if seen.began_s and self._sent_s >= seen.began_s:
                seen.ttfts_s.append(now_s - self._sent_s)
        else:
            seen.gaps[round((now_s - self._last_s) * TENTHS_OF_MS)] += 1
        seen.gaps[0] += num_tokens - 1
        self._last_s = now_s
        self.texts.append(text)
        self.num_chars += len(text)
        self.num_counted_chars += len(text) if seen.began_s else 0
        seen.num_chars += len(text)
        seen.num_texts += 1


def at(values: list[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed; None where there is none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _gap_s(gaps: Counter[int], share: float) -> float | None:
    """As `at`, of counted values."""
    left = share * gaps.total()
    for tenths in sorted(gaps):
        left -= gaps[tenths]
        if left < 0:
            return tenths / TENTHS_OF_MS
    return None


async def _run(job: Job) -> dict[str, Any]:
    return await Load(job).run()


def main() -> None:
    job = Job(**json.load(sys.stdin))
    json.dump(asyncio.run(_run(job)), sys.stdout)


if __name__ == "__main__":
    main()
