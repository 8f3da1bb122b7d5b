"""An ingress's side of a generation: by which objective it waits, and what becomes of it when a replica fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.api.errors import ApiError, unavailable
from deployments.messages import Accepted, Delta, EndReason, Finished, GenerateRequest, ModelCard, Refused, Sampling
from deployments.routing.admission_events import Unheard
from deployments.routing.replica_client import Generation, ReplicaClient
from deployments.routing.sizing import PromptSizes
from tests.support.routing import TIMEOUT_S, run
from tests.unit.deployments.routing.test_admission import FULL, Case

ANSWER = (Accepted(num_prompt_tokens=3), Delta(text="a"), Finished(reason="stop", num_output_tokens=1))


class Stream:
    """In place of Serve's: yields what it is given, raises what is an exception, and calls what can be called."""

    def __init__(self, *events: Any, unassigned: Exception | None = None) -> None:
        self._events = [unassigned] if unassigned is not None else list(events)
        self.is_cancelled, self.unassigned = False, unassigned

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        while self._events:
            event = self._events.pop(0)
            if isinstance(event, Exception):
                raise event
            if not callable(event):
                return event
            event()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Serve's raises what kept it from assigning the call."""
        self.is_cancelled = True
        if self.unassigned is not None:
            raise self.unassigned


class Handle:
    """In place of a deployment's: answers each call of `generate` with the next stream, or raises."""

    def __init__(self, *answers: Stream | Exception) -> None:
        self._answers, self.requests = list(answers), list[GenerateRequest]()

    def options(self, *, stream: bool) -> Handle:
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, request: GenerateRequest) -> Stream:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def text_of(generation: Generation) -> str:
    async with aclosing(generation.messages) as messages:
        return "".join([each.text async for each in messages if isinstance(each, Delta)])


class Client(Case):
    """An ingress's client over an admission, and one replica "a" that answers like this."""

    def __init__(self, *answers: Stream | Exception, configured_s: float | None = None, **config: Any) -> None:
        super().__init__(**config)
        self.handle = Handle(*answers)
        self._client = ReplicaClient(
            self.handle, self.admission, PromptSizes(256), ttft_s=configured_s, timeout_s=TIMEOUT_S
        )

    async def ask(self, read: Callable[[Generation], Awaitable[Any]] = text_of, **fields: Any) -> Any:
        """What is read of an answer."""
        self.num += 1
        sampling = Sampling(max_tokens=10)
        request = GenerateRequest(request_id=f"r{self.num}", prompt=(1, 2, 3), sampling=sampling, **fields)
        return await self._client.generate(request, read, key="k", priority="normal")

    async def error(self, **fields: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.ask(**fields)
        return caught.value

    @property
    def num_sent(self) -> int:
        with self.shared.locked() as board:
            return len(board._sent)


def test_an_answer_is_whole_and_leaves_nothing_behind() -> None:
    async def check() -> None:
        client = Client(Stream(*ANSWER))
        client.report()
        assert await client.ask() == "a"
        assert client.num_sent == 0

    run(check)


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_one_that_fails_before_its_first_text_has_a_status_of_its_own(reason: EndReason, status: int) -> None:
    async def check() -> None:
        failed = Finished(reason=reason, num_output_tokens=0, error="secret")
        client = Client(Stream(ANSWER[0], failed), Stream(*ANSWER[:2], failed))
        client.report()
        has_begun = False

        async def read(generation: Generation) -> None:
            nonlocal has_begun
            has_begun = True
            await generation.messages.aclose()

        error = await client.error(read=read)
        assert (error.status, has_begun) == (status, False)
        assert "secret" not in str(error)
        await client.ask(read=read)
        assert has_begun, "what fails later is for its reader to say"
        assert client.num_sent == 0

    run(check)


UNAVAILABLE = DeploymentUnavailableError("Replica")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (UNAVAILABLE, 503),
        (Stream(unassigned=UNAVAILABLE), 503),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429),
        (Stream(unassigned=ValueError("a defect")), 500),
    ],
)
def test_a_call_that_serve_cannot_assign_is_its_own_error_and_gives_its_place_back(answer: Any, status: int) -> None:
    async def check() -> None:
        client = Client(answer)
        client.report()
        assert (await client.error()).status == status
        assert client.num_sent == 0

    run(check)


def test_a_retry_goes_anywhere_but_where_the_request_was_when_that_died() -> None:
    async def check() -> None:
        places = list[str | None]()

        def note() -> None:
            with client.shared.locked() as board:
                places.append(board.replica_of("r1"))

        def move() -> None:
            with client.shared.locked() as board:
                (other,) = {"a", "b"} - {board.replica_of("r1")}
                board.moved("r1", other)

        client = Client(Stream(note, move, note, ActorDiedError()), Stream(note, *ANSWER))
        client.report("a", "b")
        assert await client.ask() == "a"
        placed, moved_to, retried_on = places
        assert placed == retried_on != moved_to
        assert client.num_sent == 0

    run(check)


def test_one_that_is_broken_off_is_cancelled() -> None:
    async def check() -> None:
        stream = Stream(*ANSWER)
        client = Client(stream)
        client.report()

        async def read(generation: Generation) -> None:
            await generation.messages.aclose()

        await client.ask(read)
        assert stream.is_cancelled
        assert client.num_sent == 0

    run(check)


def test_one_that_came_to_a_replica_of_another_model_is_sent_on() -> None:
    async def check() -> None:
        client = Client(Stream(Refused(kind="unavailable", message="another model")), Stream(*ANSWER))
        client.report("a")
        asking = asyncio.ensure_future(client.ask(model="new"))
        await asyncio.sleep(0.01)
        assert not asking.done()
        client.report("b", model="new")
        assert await asking == "a"
        assert [request.model for request in client.handle.requests] == ["new", "new"]

    run(check)


class TestObjectives:
    @staticmethod
    async def full(client: Client, *replica_ids: str, **fields: Any) -> None:
        client.report(*replica_ids, promises=FULL, drain_tokens_per_s=1.0, **fields)
        for _ in replica_ids or ("a",):
            await client.enter(5)  # one at each door

    def test_requests_are_admitted_by_what_replicas_have_now(self) -> None:
        async def check() -> None:
            client = Client(configured_s=3.0)
            await self.full(client, ttft_s=0.5)
            assert "objective of 500 ms" in str(await client.error())
            client.report(promises=FULL, drain_tokens_per_s=1.0, ttft_s=0.25)  # another `user_config`
            assert "objective of 250 ms" in str(await client.error())
            assert "objective of 700 ms" in str(await client.error(ttft_ms=700.0))

        run(check)

    def test_until_a_replica_has_said_its_own_what_is_configured_counts(self) -> None:
        async def check() -> None:
            client = Client(configured_s=0.3)
            await self.full(client)
            assert "objective of 300 ms" in str(await client.error())

        run(check)

    def test_one_of_its_own_that_is_not_allowed_is_a_400_on_a_full_server_too(self) -> None:
        async def check() -> None:
            client = Client()
            await self.full(client, ttft_s=0.5, tightest_ttft_s=0.25, loosest_ttft_s=50.0)
            for ttft_ms in (249.0, 50_001.0):
                error = await client.error(ttft_ms=ttft_ms)
                assert (error.status, error.param, error.code) == (400, "slo.ttft_ms", "invalid_value")
                assert str(error) == f"slo.ttft_ms={ttft_ms:g} is not allowed: expected 250 to 50000"
            assert (await client.error(ttft_ms=250.0)).status == 429

        run(check)

    def test_without_reports_a_replica_decides(self) -> None:
        async def check() -> None:
            client = Client(Stream(Refused(kind="invalid", message="not allowed", field="slo.ttft_ms")))
            client.report()
            error = await client.error(ttft_ms=1.0)
            assert (error.status, error.param) == (400, "slo.ttft_ms")
            assert len(client.handle.requests) == 1

        run(check)


class Heard(Unheard):
    """Counts what admission says."""

    def __init__(self) -> None:
        self.admitted_s: list[float] = []
        self.reasons: list[str] = []

    def admitted(self, waited_s: float) -> None:
        self.admitted_s.append(waited_s)

    def refused(self, reason: str, status: int) -> None:
        self.reasons.append(reason)


BACK_PRESSURE = BackPressureError(num_queued_requests=1, max_queued_requests=1)
OVERDUE = Refused(kind="overdue", message="no room came free in time")
INVALID = Refused(kind="invalid", message="no such thing")


@pytest.mark.parametrize(
    ("answers", "status", "refused", "num_admitted"),
    [
        ([Stream(*ANSWER)], None, 0, 1),
        ([Stream(INVALID)], 400, 0, 0),
        ([Stream(OVERDUE)], 429, 1, 0),
        ([UNAVAILABLE], 503, 1, 0),
        ([BACK_PRESSURE], 429, 1, 0),
        ([ActorDiedError(), ActorDiedError()], 503, 1, 0),
        ([ActorDiedError(), Stream(*ANSWER)], None, 0, 1),
    ],
    ids=["served", "invalid", "overdue", "no replica", "full", "died twice", "died once"],
)
def test_what_no_engine_has_had_counts_once_and_is_admitted_by_a_replica_alone(
    answers: list[Any], status: int | None, refused: int, num_admitted: int
) -> None:
    async def check() -> None:
        client = Client(*[Stream(each) if isinstance(each, Exception) else each for each in answers])
        client.admission.events = heard = Heard()
        client.report("a", "b")
        if status is None:
            assert await client.ask() == "a"
        else:
            assert (await client.error()).status == status
        assert client.admission.offered.snapshot()["outcomes"]["refused"] == refused
        assert len(heard.admitted_s) == num_admitted

    run(check)


def test_a_request_counts_while_no_replica_is_there_at_all() -> None:
    async def check() -> None:
        client = Client()

        async def unavailable_card(name: str) -> ModelCard:
            raise unavailable()

        client._client.models.card = unavailable_card  # type: ignore[method-assign]
        with pytest.raises(ApiError):
            await client._client.card("m")
        assert client.admission.offered.snapshot()["outcomes"]["refused"] == 1

    run(check)


def test_a_replica_is_told_how_long_a_request_may_wait_at_its_door() -> None:
    async def check() -> None:
        client = Client(Stream(*ANSWER), timeout_s=3.0)
        client.report()
        await client.ask()
        assert 2.0 < (client.handle.requests[0].wait_s or 0.0) <= 3.0

    run(check)
