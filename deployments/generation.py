"""Calls of a replica through its Serve handle: bounded waits, and every failure as an ApiError."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.errors import ApiError, internal, overloaded, refused, unavailable
from deployments.messages import (
    Accepted,
    Delta,
    Finished,
    GenerateMessage,
    GenerateRequest,
    ModelCard,
    Refused,
)

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generation that a replica has taken: what is left of it are Delta messages and one Finished."""

    num_prompt_tokens: int
    messages: AsyncGenerator[Delta | Finished, None]


class ReplicaClient:
    """The ingress's side of the replica deployment."""

    def __init__(self, handle: DeploymentHandle, admission_timeout_s: float) -> None:
        self._handle = handle
        self._stream_handle = handle.options(stream=True)
        self._admission_timeout_s = admission_timeout_s
        self._card: ModelCard | None = None

    async def model_card(self) -> ModelCard:
        """What is served; asked once, since replicas of one deployment serve one model."""
        card = self._card
        if card is None:
            call: Awaitable[ModelCard] = self._handle.model_card.remote()
            card = self._card = await self._bounded(call, self._admission_timeout_s)
        return card

    async def check_health(self) -> None:
        """Raises ApiError 503 unless the replica that is asked is healthy."""
        await self._bounded(self._handle.check_health.remote(), HEALTH_TIMEOUT_S)

    async def generate(self, request: GenerateRequest) -> Generation:
        """Returns when a replica has taken the request. Raises ApiError when none does in time."""
        stream: DeploymentResponseGenerator[GenerateMessage] = self._stream_handle.generate.remote(request)
        try:
            first = await self._bounded(anext(stream), self._admission_timeout_s)
        except BaseException:
            stream.cancel()
            raise
        if isinstance(first, Refused):
            raise refused(first)
        assert isinstance(first, Accepted)
        return Generation(num_prompt_tokens=first.num_prompt_tokens, messages=_rest(stream))

    async def _bounded(self, call: Awaitable[T], timeout_s: float) -> T:
        try:
            return await asyncio.wait_for(_awaited(call), timeout_s)
        except TimeoutError:
            raise unavailable() from None
        except Exception as error:
            raise api_error(error) from error


async def _awaited(call: Awaitable[T]) -> T:
    """A coroutine, which wait_for can cancel, around Serve's response objects, which are not futures."""
    return await call


async def _rest(stream: DeploymentResponseGenerator[Any]) -> AsyncGenerator[Delta | Finished, None]:
    """The messages after the first; closing this early cancels the request in the replica."""
    is_complete = False
    try:
        async for message in stream:
            is_complete = isinstance(message, Finished)
            yield message
    except Exception as error:
        raise api_error(error) from error
    finally:
        if not is_complete:
            stream.cancel()


def api_error(error: Exception) -> ApiError:
    """What a failed call means to the client. The log gets the cause, which holds no prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return overloaded()
    if isinstance(error, (RayActorError, DeploymentUnavailableError)):
        logger.warning("a replica is unavailable: %s", type(error).__name__)
        return unavailable()
    if isinstance(error, RayError) and "EngineUnavailable" in type(error).__name__:
        return unavailable()
    logger.error("a call of a replica failed", exc_info=error)
    return internal()
