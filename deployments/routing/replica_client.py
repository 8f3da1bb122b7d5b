"""Calls of a replica through its Serve handle: a place first, bounded waits, one retry, failures as ApiErrors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.api.errors import ApiError, internal, out_of_range, overloaded, refused, unavailable
from deployments.api.protocol import FinishReason
from deployments.messages import (
    Accepted,
    Delta,
    Finished,
    GenerateMessage,
    GenerateRequest,
    ModelCard,
    Priority,
    Refused,
)
from deployments.routing.admission import Admission, Turn
from deployments.routing.ask import Ask
from deployments.routing.deliveries import Deliveries, DeliveryLost
from deployments.routing.inbox import Inbox
from deployments.routing.request_log import RequestLogger
from deployments.routing.served_models import ServedModels
from deployments.routing.sizing import PromptSizes

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
# A request that a replica was too full for is tried again at the next report, or after this time.
NEXT_ATTEMPT_S = 0.5
LEAST_TIMEOUT_S = 0.05
# The replica itself says when a request's time at its door is over: so it is known whether an engine has had it. One
# that does not answer is given so much longer.
ANSWER_TIMEOUT_S = 1.0

T = TypeVar("T")


class ReplicaDied(ApiError):
    """503: the replica that had the request is gone."""

    def __init__(self) -> None:
        super().__init__(503, "the replica that ran this request has died", code="replica_died", retry_after_s=1)


class Messages:
    """What is left of a generation: the first text, which is there, and whatever `rest` yields; then `aclose`."""

    def __init__(
        self, first: Delta | Finished, rest: AsyncGenerator[Delta | Finished, None], inbox: Inbox | None = None
    ) -> None:
        self._first: Delta | Finished | None = first
        self._rest, self._inbox = rest, inbox

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        return self

    async def __anext__(self) -> Delta | Finished:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._rest)

    def hold(self, until_s: float) -> None:
        """The next text may be as late as that, by `time.monotonic`, and all that has come by then; the end may not."""
        if self._inbox is not None:
            self._inbox.hold(until_s)

    @property
    def has_end(self) -> bool:
        """Whether the end is here: nothing more is waited for."""
        return self._inbox is not None and self._inbox.has_end

    async def aclose(self) -> None:
        await self._rest.aclose()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generation whose first text is there; what is left of it are Delta messages and one Finished."""

    num_prompt_tokens: int
    messages: Messages


class ReplicaClient:
    """The ingress's side of the replica deployment."""

    def __init__(
        self,
        handle: DeploymentHandle,
        admission: Admission,
        sizes: PromptSizes,
        *,
        ttft_s: float | None,
        timeout_s: float,
        model_names: Collection[str] = (),
    ) -> None:
        """`ttft_s`: the objective until a replica has reported its own. `model_names`: what replicas may come with."""
        self._handle, self._admission, self._sizes = handle, admission, sizes
        self._stream_handle = handle.options(stream=True)
        self._ttft_s, self._timeout_s = ttft_s, timeout_s
        self._deliveries = Deliveries(admission.origin)
        self._readers: set[asyncio.Task[None]] = set()
        self.models = ServedModels(admission.shared, self._any_card, model_names)

    async def _any_card(self) -> ModelCard:
        call: Awaitable[ModelCard] = self._handle.model_card.remote()
        return await self._bounded(call, self._timeout_s)

    @property
    def longest_tokens(self) -> int | None:
        """What a request may have at most, whatever its model; None until a replica has said."""
        return self.models.most_tokens

    async def card(self, model: str) -> ModelCard:
        """Of the model that a request names. Raises ApiError: 404, or 503, which counts the request as refused."""
        try:
            return await self.models.card(model)
        except ApiError as error:
            if error.status == 503:
                self._admission.count_refused(error)
            raise

    async def check_health(self) -> None:
        """Raises ApiError 503 unless the replica that is asked is healthy."""
        await self._bounded(self._handle.check_health.remote(), HEALTH_TIMEOUT_S)

    async def generate(
        self,
        request: GenerateRequest,
        read: Callable[[Generation], Awaitable[T]],
        *,
        key: str,
        priority: Priority,
    ) -> T:
        """What `read` makes of the generation; it is called when the first text is there.

        Where the replica dies before `read` has returned the request is run once more, on another: `read` must not
        have sent anything by then. Raises ApiError when the request is refused or fails.
        """
        self._check_objective(request)
        longest = self.models.longest_tokens(request.model)
        request = replace(request, origin=self._admission.origin)
        size = self._sizes.ask(request, self._objective_s(request), longest)
        ask = replace(size, key=key, priority=priority, arrived_s=self._admission.now_s)
        try:
            turns: list[Turn] = []
            return await read(await self._first_text(request, ask, turns))
        except ReplicaDied:
            log = RequestLogger(logger, request.request_id)
            log.warning("its replica died before anything was sent: running it again")
            ask = ask.after_death(turns[-1].replica_id, self._admission.now_s)
            try:
                return await read(await self._first_text(request, ask, []))
            except ReplicaDied as error:  # what an engine has counted has died with it
                self._admission.count_refused(error)
                raise

    def _objective_s(self, request: GenerateRequest) -> float | None:
        """Seconds until the first token is wanted: the request's own, what replicas have now, or as configured."""
        if request.ttft_ms is not None:
            return request.ttft_ms / 1e3
        objective_s = self._admission.ttft_s
        return self._ttft_s if objective_s is None else objective_s

    def _check_objective(self, request: GenerateRequest) -> None:
        """Raises ApiError 400 for one of its own that no replica allows: it would be late before anyone has said so."""
        allowed_s = self._admission.ttft_range_s
        if request.ttft_ms is None or allowed_s is None:
            return
        low_ms, high_ms = (each_s * 1e3 for each_s in allowed_s)
        if not low_ms <= request.ttft_ms <= high_ms:
            raise out_of_range("slo.ttft_ms", request.ttft_ms, low_ms, high_ms)

    async def _first_text(self, request: GenerateRequest, ask: Ask, turns: list[Turn]) -> Generation:
        """The generation, once a replica has let it in and has text; notes its `turns`."""
        while True:
            turn = await self._admission.enter(ask)
            turns.append(turn)
            inbox = self._deliveries.open()
            messages = self._messages(request, turn, inbox)
            try:
                accepted = await anext(messages)
                if isinstance(accepted, Accepted):
                    self._sizes.counted(request, accepted.num_prompt_tokens)
                    first = await anext(messages)
                    assert isinstance(first, Delta | Finished)
                    if isinstance(first, Finished):
                        completed_reason(first)  # raises while a failure still has a status of its own
                    turn.started()
                    return Generation(
                        num_prompt_tokens=accepted.num_prompt_tokens, messages=Messages(first, messages, inbox)
                    )
            except BaseException:
                await messages.aclose()
                raise
            await messages.aclose()
            assert isinstance(accepted, Refused)
            if accepted.kind not in ("overloaded", "unavailable"):
                raise refused(accepted)
            # Another ingress was quicker, or the replica is stopping: this request is still the next one.
            with self._admission.counting(ask):
                await self._admission.news(NEXT_ATTEMPT_S)
            ask = ask.again()

    async def _messages(self, request: GenerateRequest, turn: Turn, inbox: Inbox) -> AsyncGenerator[Any, None]:
        """A replica's messages; closing this early cancels the request there. The place lasts as long."""
        now_s = self._admission.now_s
        waited_s, wait_s = now_s - turn.ask.arrived_s, max(LEAST_TIMEOUT_S, turn.deadline_s - now_s)
        numbered = replace(request, sequence=turn.sequence, waited_s=waited_s, wait_s=wait_s, inbox=inbox.number)
        stream: DeploymentResponseGenerator[GenerateMessage] | None = None
        log, is_complete = RequestLogger(logger, request.request_id), False
        try:
            with self._admission.counting(turn.ask):
                try:
                    stream = self._stream_handle.generate.remote(numbered)
                    first = await self._first(stream, turn, wait_s + ANSWER_TIMEOUT_S)
                except (BackPressureError, DeploymentUnavailableError) as error:
                    raise api_error(error) from error
                if isinstance(first, Refused) and first.kind == "overdue":
                    raise self._admission.overdue(turn.ask)
            if isinstance(first, Accepted):
                turn.begun()
                log.debug(
                    "begun by replica %s after %.3f s", turn.replica_id, self._admission.now_s - turn.ask.arrived_s
                )
                self._deliveries.accepted(inbox, first)
            yield first
            reader = self._read_call(inbox, stream)
            try:
                while not is_complete:
                    message = await inbox.take()
                    if isinstance(message, Finished):
                        is_complete = True
                        _log_end(log, message)
                    yield message
            finally:
                if not is_complete:
                    reader.cancel()
        except Exception as error:
            raise api_error(error, log) from error
        finally:
            self._deliveries.close(inbox)
            try:
                if stream is not None and not is_complete:
                    stream.cancel()
            except Exception as error:  # what kept Serve from assigning the call, which was raised before
                log.debug("nothing to cancel: %s", type(error).__name__)
            finally:
                turn.end()

    def _read_call(self, inbox: Inbox, stream: DeploymentResponseGenerator[GenerateMessage]) -> asyncio.Task[None]:
        """Reads the request's own call from here on, to its end, which may come after that of the text."""
        reader = asyncio.create_task(self._deliveries.read_call(inbox, stream))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        return reader

    async def _first(
        self, stream: DeploymentResponseGenerator[GenerateMessage], turn: Turn, timeout_s: float
    ) -> GenerateMessage:
        """Accepted or Refused: a replica that is full lets the request wait at its door, until its deadline."""
        try:
            async with asyncio.timeout(timeout_s):
                return await _awaited(anext(stream))
        except TimeoutError:
            raise self._admission.overdue(turn.ask) from None

    async def _bounded(self, call: Awaitable[T], timeout_s: float) -> T:
        try:
            return await asyncio.wait_for(_awaited(call), timeout_s)
        except TimeoutError:
            raise unavailable() from None
        except Exception as error:
            raise api_error(error) from error


def completed_reason(finished: Finished) -> FinishReason:
    """The API's word for how a generation ended. Raises ApiError for one that was broken off."""
    if finished.reason in ("stop", "length"):
        return finished.reason
    if finished.reason == "cancelled":
        raise unavailable("the request was cancelled by the server")
    raise internal()


def _log_end(log: RequestLogger, finished: Finished) -> None:
    """How a generation ended; what a step's failure says has no prompt in it."""
    if finished.reason in ("stop", "length", "cancelled"):
        log.debug("ended: %s, %d tokens", finished.reason, finished.num_output_tokens)
    else:
        log.error("the generation failed: %s", finished.error)


async def _awaited(call: Awaitable[T]) -> T:
    """A coroutine, which wait_for can cancel, around Serve's response objects, which are not futures."""
    return await call


def api_error(error: Exception, log: logging.Logger | RequestLogger = logger) -> ApiError:
    """What a failed call means to the client. The log gets the cause, which holds no prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return overloaded()
    if isinstance(error, RayActorError | DeliveryLost):
        log.warning("a replica is unavailable: %s", type(error).__name__)
        return ReplicaDied()
    if isinstance(error, DeploymentUnavailableError):
        log.warning("the replicas are unavailable")
        return unavailable()
    if isinstance(error, RayError) and "EngineUnavailable" in type(error).__name__:
        return unavailable()
    log.error("a call of a replica failed", exc_info=error)
    return internal()
