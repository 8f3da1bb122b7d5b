"""One party that is asked again and again: never twice at once, so one that hangs holds one call of ours, not many."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a party said; or, for people, why it said nothing."""

    value: Any = None
    problem: str | None = None


class Asked:
    """For one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[Any]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._call: asyncio.Task[Any] | None = None
        self._since_s = 0.0

    async def answer(self, wait_s: float) -> Answer:
        """What it says within `wait_s`. A call that is late goes on, and its answer is of no use any more."""
        if self._call is None or self._call.done():  # what came too late is no news any more
            # In a context of its own: calls by a Serve handle that are made at once for one HTTP request have its id,
            # and of several with one id Serve's router leaves all but the first waiting for ever.
            context = contextvars.Context()
            self._since_s, self._call = self._clock(), asyncio.create_task(self._awaited(), context=context)
        call = self._call
        await asyncio.wait({call}, timeout=wait_s)
        if not call.done():
            return Answer(problem=f"no answer for {max(wait_s, self._clock() - self._since_s):.0f} s")
        self._call = None
        return call.result()

    def close(self) -> None:
        """Nobody asks any more."""
        if self._call is not None:
            self._call.cancel()

    async def _awaited(self) -> Answer:
        try:
            return Answer(value=await self._ask())
        except Exception as error:  # its text may be anything, a traceback with others' names among it
            return Answer(problem=f"the call failed: {type(error).__name__}")
