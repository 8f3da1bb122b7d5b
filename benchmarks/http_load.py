"""A cheap HTTP load: streamed completions on one event loop, at given times or in turn, and what each client saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import aiohttp

from selectn_core.requests import attainment
from selectn_core.requests.handle import Gaps, RequestTiming
from selectn_core.requests.objectives import Objectives

TIMEOUT_S = 120.0
ERROR_FIELDS = {"message", "type", "param", "code"}
UNSUCCESSFUL: dict[int, attainment.Outcome] = {429: "refused", 503: "refused", 0: "failed", 500: "failed"}


@dataclass(frozen=True, kw_only=True)
class ClientRequest:
    """A completion to ask for, and who asks: the API key `key` of the owner `owner`."""

    owner: str
    key: str
    priority: str
    prompt: str
    max_tokens: int

    def body(self, model: str) -> bytes:
        """The request's body: greedy, streamed, exactly `max_tokens` tokens."""
        fields = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "priority": self.priority,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields).encode()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a client saw of its request. Times are `time.perf_counter`'s.

    `status` 0: no answer within `TIMEOUT_S`, or a broken connection. `is_whole`: a 200 came to its end without an
    error, anything else has OpenAI's error shape, and a 429 a `Retry-After` as well.
    """

    owner: str
    priority: str
    status: int
    is_whole: bool
    sent_s: float
    ended_s: float
    first_s: float | None = None
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    itl_p99_s: float | None = None
    retry_after_s: float | None = None
    code: str | None = None

    @property
    def outcome(self) -> attainment.Outcome | None:
        """How it ended, as the server counts it; None: it was never offered, being wrong in itself."""
        if self.status == 200:
            return "completed" if self.is_whole else "failed"
        return UNSUCCESSFUL.get(self.status)

    @property
    def timing(self) -> RequestTiming:
        """What the client saw, as the server's own timing says it."""
        has_token = self.first_s is not None
        return RequestTiming(
            ttft_s=self.ttft_s if has_token else None,
            tpot_s=self.tpot_s if has_token and self.num_tokens > 1 else None,
            itl_p99_s=self.itl_p99_s,
            waited_s=self.latency_s,
        )

    def met(self, objectives: Objectives) -> bool:
        """By the definition that the server's own attainment has; what was never offered has not."""
        return self.outcome is not None and attainment.is_met(self.timing, objectives, self.outcome)

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Over the tokens after the first."""
        assert self.first_s is not None
        return (self.ended_s - self.first_s) / max(1, self.num_tokens - 1)

    def tokens_between(self, begin_s: float, end_s: float) -> float:
        """Tokens that came in this time: as if they had come evenly between the first and the last."""
        if self.first_s is None or self.ended_s <= self.first_s:
            return 0.0
        overlap_s = min(end_s, self.ended_s) - max(begin_s, self.first_s)
        return self.num_tokens * max(0.0, overlap_s) / (self.ended_s - self.first_s)


class Seen(TypedDict):
    """What an `Outcome` says of its request as soon as that is sent."""

    owner: str
    priority: str
    sent_s: float


class Load:
    """Sends requests to one server and follows them."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str) -> None:
        self._session, self._url, self._model = session, f"{base_url}/v1/completions", model

    async def arrive(self, asks: Iterable[tuple[float, ClientRequest]]) -> list[asyncio.Task[Outcome]]:
        """Sends each request at its time, in seconds from now, whatever became of the others.

        Returns when the last one has been sent.
        """
        began_s, tasks = time.perf_counter(), []
        for at_s, ask in asks:
            await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.complete(ask)))
        return tasks

    async def keep_busy(self, asks: Iterator[ClientRequest], num_clients: int, duration_s: float) -> list[Outcome]:
        """`num_clients` that ask again as soon as they have an answer, or may return after a 429."""
        until_s, outcomes = time.perf_counter() + duration_s, list[Outcome]()

        async def client() -> None:
            while time.perf_counter() < until_s:
                outcome = await self.complete(next(asks))
                outcomes.append(outcome)
                if outcome.status != 200:
                    await asyncio.sleep(outcome.retry_after_s or 1.0)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return outcomes

    async def complete(self, ask: ClientRequest) -> Outcome:
        """Asks once and reads the answer to its end."""
        sent_s = time.perf_counter()
        headers = {"Authorization": f"Bearer {ask.key}", "Content-Type": "application/json"}
        seen: Seen = {"owner": ask.owner, "priority": ask.priority, "sent_s": sent_s}
        try:
            async with self._session.post(self._url, data=ask.body(self._model), headers=headers) as response:
                if response.status == 200:
                    return await _follow(response, seen)
                return await _refusal(response, seen)
        except (aiohttp.ClientError, TimeoutError):
            return Outcome(**seen, status=0, is_whole=False, ended_s=time.perf_counter())


def client_session() -> aiohttp.ClientSession:
    """A session for any number of requests at once; they do not go through $http_proxy."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), trust_env=False)


async def _follow(response: aiohttp.ClientResponse, seen: Seen) -> Outcome:
    """Reads a stream of events, of which only the last ones are looked into: the usage, and the end or an error."""
    first_s = last_s = None
    tail, gaps = b"", Gaps()
    async for data in response.content.iter_any():
        if b'"text":' in data:
            now_s = time.perf_counter()
            if last_s is not None:
                gaps.add(now_s - last_s, data.count(b'"text":'))
            first_s, last_s = first_s or now_s, now_s
        tail = (tail + data)[-4096:]
    usage = {"completion_tokens": 0, "prompt_tokens": 0}
    for line in tail.splitlines():
        if line.startswith(b'data: {"') and b'"usage":{' in line:
            usage = json.loads(line.removeprefix(b"data: "))["usage"]
    num_tokens = usage["completion_tokens"]
    return Outcome(
        **seen,
        status=200,
        is_whole=tail.rstrip().endswith(b"data: [DONE]") and first_s is not None and num_tokens > 0,
        ended_s=last_s or time.perf_counter(),
        first_s=first_s,
        num_tokens=num_tokens,
        num_prompt_tokens=usage["prompt_tokens"],
        itl_p99_s=gaps.p99_s,
    )


async def _refusal(response: aiohttp.ClientResponse, seen: Seen) -> Outcome:
    data = await response.read()
    ended_s = time.perf_counter()
    try:
        error = json.loads(data)["error"]
        is_whole = set(error) == ERROR_FIELDS
    except (ValueError, KeyError, TypeError):
        error, is_whole = {}, False
    after = response.headers.get("Retry-After", "")
    retry_after_s = float(after) if after.isdigit() else None
    return Outcome(
        **seen,
        status=response.status,
        is_whole=is_whole and (response.status != 429 or retry_after_s is not None),
        ended_s=ended_s,
        retry_after_s=retry_after_s,
        code=error.get("code"),
    )
