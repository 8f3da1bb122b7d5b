"""An ingress that must stop: newcomers go elsewhere, what is under way may end, and what cannot is told why."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from deployments.api.errors import install_error_handlers
from deployments.http import draining
from deployments.http.draining import OrderlyEnd, Stopping

TIMEOUT_S = 20


class Front:
    """An application whose answers end when they are told to, behind the middleware."""

    def __init__(self) -> None:
        self.stopping, self.may_end, self.num_cancelled = Stopping(), asyncio.Event(), 0
        self.begun = asyncio.Event()
        api = FastAPI()
        install_error_handlers(api)
        api.add_middleware(OrderlyEnd, stopping=self.stopping)

        @api.get("/whole")
        async def whole() -> dict[str, str]:
            await self._ends()
            return {"text": "whole"}

        @api.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._events(), media_type="text/event-stream")

        @api.get("/late")
        async def late() -> dict[str, str]:
            raise TimeoutError

        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://front")

    async def _events(self) -> AsyncIterator[str]:
        yield 'data: {"text": "begun"}\n\n'
        await self._ends()
        yield "data: [DONE]\n\n"

    async def _ends(self) -> None:
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def under_way(self, path: str) -> asyncio.Task[httpx.Response]:
        task = asyncio.ensure_future(self.client.get(path))
        await self.begun.wait()
        return task


def run(check: Callable[[Front], Awaitable[None]]) -> None:
    async def checked() -> None:
        await check(Front())

    asyncio.run(asyncio.wait_for(checked(), TIMEOUT_S))


def is_told_to_come_again(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return (response.status_code, response.headers["Retry-After"], error["code"], error["type"]) == (
        *(503, "1", "unavailable", "server_error"),
    )


def test_whoever_comes_too_late_is_told_to_come_again_and_what_is_under_way_may_end() -> None:
    async def check(front: Front) -> None:
        answer = await front.under_way("/whole")
        teller = threading.Thread(target=front.stopping.begin, args=(60.0,))  # Serve's own thread
        teller.start()
        teller.join()
        for path in ("/whole", "/stream", "/anything"):
            assert is_told_to_come_again(await front.client.get(path))
        front.may_end.set()
        assert (await answer).json() == {"text": "whole"}

    run(check)


def test_one_that_has_sent_nothing_gets_an_error_of_its_own_before_the_end() -> None:
    async def check(front: Front) -> None:
        answer = await front.under_way("/whole")
        front.stopping.begin(0.02)
        assert is_told_to_come_again(await answer)
        assert front.num_cancelled == 1, "the replica is told that nobody reads"

    run(check)


def test_a_stream_ends_with_an_error_event_in_place_of_its_end() -> None:
    async def check(front: Front) -> None:
        answer = await front.under_way("/stream")
        front.stopping.begin(0.02)
        begun, last = (await answer).text.strip().split("\n\n")
        assert begun == 'data: {"text": "begun"}'
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("unavailable", "server_error")
        assert front.num_cancelled == 1

    run(check)


@pytest.mark.parametrize(("grace_s", "expected_s"), [(60.0, 58.0), (3.0, 1.5), (0.0, 0.0)])
def test_last_words_come_before_the_grace_is_over(
    monkeypatch: pytest.MonkeyPatch, grace_s: float, expected_s: float
) -> None:
    async def check(front: Front) -> None:
        answer = await front.under_way("/whole")
        (limit,) = front.stopping._limits
        now_s = asyncio.get_running_loop().time()
        front.stopping.begin(grace_s)
        front.stopping.begin(1e6)  # the controller asks again after a restart
        await asyncio.sleep(0)
        ends_s = limit.when()
        assert ends_s is not None
        assert expected_s <= ends_s - now_s < expected_s + 1
        answer.cancel()

    assert draining.LAST_WORDS_S == 2.0
    run(check)


def test_a_timeout_of_the_applications_own_is_none_of_its_end() -> None:
    async def check(front: Front) -> None:
        response = await front.client.get("/late")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")

    run(check)


def test_nothing_is_kept_of_answers_that_have_ended() -> None:
    async def check(front: Front) -> None:
        front.may_end.set()
        responses: list[Any] = [await front.client.get(path) for path in ("/whole", "/stream", "/late", "/nowhere")]
        assert [response.status_code for response in responses] == [200, 200, 500, 404]
        assert not front.stopping._limits

    run(check)
