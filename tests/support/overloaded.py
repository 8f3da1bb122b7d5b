"""An ingress's admission and a replica's door, as they are, under a load of requests; the engine and time are modelled.

Nobody waits for real: the event loop's clock jumps to whatever is due next. So minutes of overload take a second, and
the same seed gives the same answers on a machine of any speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from deployments.api.errors import ApiError
from deployments.messages import Priority
from deployments.replica.door import Door, Visit
from deployments.routing.admission import Admission, AdmissionConfig
from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.shared_board import SharedBoard

STEP_S, STEP_SPREAD = 0.2, 0.1
PREFILL_S_PER_TOKEN = 0.004
REPORT_PERIOD_S = 0.5
CALL_S = 0.01  # until an ingress knows that a replica has let its request in

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Where the loop would sleep its clock goes forward instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is not None:
            self.now_s += timeout
        return ready


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(main: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """What `main`, which gets the clock, returns when run in a time of its own."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        return runner.run(main(runner.get_loop().time))


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests at random times, `requests_per_s` of them on average, by keys and priorities in these shares."""

    requests_per_s: float
    seconds: float
    keys: Mapping[str, float]
    priorities: Mapping[Priority, float] = field(default_factory=lambda: {"normal": 1.0})
    output_tokens: tuple[int, int] = (8, 32)
    prompt_tokens: tuple[int, int] = (30, 36)
    ttft_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a request: when its first token came, or None and when that was said."""

    key: str
    priority: Priority
    tokens: int
    sent_s: float
    first_s: float | None
    ended_s: float
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.sent_s


class ModelledReplica:
    """A real door; behind it every step gives each request a token, and lets one more prompt in."""

    def __init__(self, shared: SharedBoard, now: Callable[[], float], seed: int, *, capacity: int, places: int) -> None:
        self._shared, self._capacity, self._places = shared, capacity, places
        self._door = Door(lambda: capacity, max_requests=places, max_waiting=16, clock=now)
        self._prompts: deque[_Request] = deque()
        self._running: dict[_Request, None] = {}
        self._rng, self._num_reports = random.Random(seed), 0

    async def step(self) -> None:
        while True:
            await asyncio.sleep(STEP_S * self._rng.uniform(1 - STEP_SPREAD, 1 + STEP_SPREAD))
            if self._prompts:
                self._running[self._prompts.popleft()] = None
            for request in list(self._running):
                request.progressed()
                if request.is_done:
                    del self._running[request]

    async def report(self) -> None:
        while True:
            self._door.let_in()
            self._num_reports += 1
            waiting_prompts = sum(request.visit.prompt_tokens for request in self._prompts)
            report = HeadroomReport(
                replica_id="a",
                reported_s=float(self._num_reports),
                kv_capacity_tokens=self._capacity,
                longest_request_tokens=self._capacity,
                max_requests=self._places,
                promises=self._door.promises(),
                num_waiting=self._door.num_waiting,
                waiting_prefill_tokens=waiting_prompts + self._door.waiting_prompt_tokens,
                drain_tokens_per_s=self._door.drain_tokens_per_s(),
                prefill_s_per_token=PREFILL_S_PER_TOKEN,
            )
            with self._shared.locked() as board:
                board.observe({"a": report})
            self._shared.changed()
            await asyncio.sleep(REPORT_PERIOD_S)

    async def generate(self, ask: Ask, sequence: int) -> AsyncGenerator[int, None]:
        """0 when the request has been let in, then how many tokens it has."""
        let_in = asyncio.get_running_loop().create_future()
        visit = Visit(
            origin=self._shared.origin,
            sequence=sequence,
            prompt_tokens=ask.prompt_tokens,
            total_tokens=ask.tokens,
            decide=lambda may_enter: None if let_in.done() else let_in.set_result(may_enter),
        )
        request = _Request(visit=visit)
        visit.num_generated = lambda: request.num_tokens
        self._door.knock(visit)
        try:
            assert await let_in
            yield 0
            self._prompts.append(request)
            while not request.is_done:
                yield await request.tokens.get()
                self._door.progressed()
        finally:
            self._running.pop(request, None)
            with contextlib.suppress(ValueError):
                self._prompts.remove(request)
            self._door.leave(visit)


@dataclass(eq=False, kw_only=True)
class _Request:
    visit: Visit
    num_tokens: int = 0
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    @property
    def is_done(self) -> bool:
        return self.visit.prompt_tokens + self.num_tokens >= self.visit.total_tokens

    def progressed(self) -> None:
        self.num_tokens += 1
        self.tokens.put_nowait(self.num_tokens)


def answers_to(load: Load, *, seed: int, capacity: int, places: int) -> list[Answer]:
    """What becomes of every request of a load on one replica, in the order in which they end."""

    async def main(now: Callable[[], float]) -> list[Answer]:
        shared = SharedBoard("me", clock=now)
        replica = ModelledReplica(shared, now, seed, capacity=capacity, places=places)
        config = AdmissionConfig(max_queued_requests=64, timeout_s=30.0, refuse_late=True)
        admission = Admission(shared, config, now)
        work = [asyncio.create_task(replica.report()), asyncio.create_task(replica.step())]
        answers: list[Answer] = []

        async def served(ask: Ask) -> float:
            turn = await admission.enter(replace(ask, arrived_s=now()))
            async with contextlib.aclosing(replica.generate(ask, turn.sequence)) as tokens:
                try:
                    async with asyncio.timeout(max(0.0, turn.deadline_s - now())):
                        await anext(tokens)
                    await asyncio.sleep(CALL_S)
                    turn.begun()
                    await anext(tokens)
                    turn.started()
                    first_s = now()
                    async for _ in tokens:
                        pass
                    return first_s
                except TimeoutError:
                    raise admission.overdue(turn.ask) from None
                finally:
                    turn.end()

        async def one(ask: Ask) -> None:
            sent_s, first_s, error = now(), None, None
            try:
                first_s = await served(ask)
            except ApiError as refusal:
                error = refusal.code
            answers.append(
                Answer(
                    key=ask.key,
                    priority=ask.priority,
                    tokens=ask.tokens,
                    sent_s=sent_s,
                    first_s=first_s,
                    ended_s=now(),
                    error=error,
                )
            )

        tasks = []
        for after_s, ask in _requests(load, random.Random(seed)):
            await asyncio.sleep(after_s)
            tasks.append(asyncio.create_task(one(ask)))
        await asyncio.gather(*tasks)
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        assert admission.num_waiting == 0
        return answers

    return run(main)


def _requests(load: Load, rng: random.Random) -> Iterator[tuple[float, Ask]]:
    at_s, number = 0.0, 0
    while True:
        after_s = rng.expovariate(load.requests_per_s)
        at_s, number = at_s + after_s, number + 1
        if at_s > load.seconds:
            return
        (key,) = rng.choices(list(load.keys), list(load.keys.values()))
        (priority,) = rng.choices(list(load.priorities), list(load.priorities.values()))
        prompt, output = rng.randint(*load.prompt_tokens), rng.randint(*load.output_tokens)
        tokens = prompt + output
        ask = Ask(
            request_id=str(number),
            tokens=tokens,
            least_tokens=tokens,
            prompt_tokens=prompt,
            ttft_s=load.ttft_s,
            key=key,
            priority=priority,
        )
        yield after_s, ask
