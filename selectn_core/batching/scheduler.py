"""Transformers' scheduler, which asks before it plans a step and tells what the step is before it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from selectn_core.batching.sampler import sampling_of
from selectn_core.latency.steps import Chunk, StepShape, step_of


class ObservedScheduler(FIFOScheduler):
    """First come first served, with a word before it plans a step, and one about what the step is before it runs.

    Of the requests that hold no KV it sees those that may begin, by name: memory was counted for them. A budget of
    tokens does not say who that is, where some are short and of others the beginning is in the cache.
    """

    def __init__(
        self,
        before: Callable[[], Sequence[str] | None],
        budget: Callable[[int], int],
        on_planned: Callable[[StepShape, float], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._before, self._budget, self._on_planned = before, budget, on_planned
        self._beginning: Sequence[str] | None = ()

    def _get_waiting_candidates(self) -> list[RequestState]:
        waiting = self.waiting_requests
        if self._beginning is None:
            return list(waiting.values())
        return [waiting[request_id] for request_id in self._beginning if request_id in waiting]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        started_s = time.perf_counter()
        self._beginning = self._before()
        planned = super().schedule_batch(self._budget(token_budget), cache_budget)
        if planned[0]:
            self._on_planned(_shape(planned[0]), started_s)
        return planned


def to_compute(state: RequestState) -> list[int]:
    """The tokens whose keys are still to be computed."""
    return state.tokens_to_process if state.status == RequestStatus.DECODING else state.remaining_prefill_tokens


def _shape(batch: Sequence[FutureRequestState]) -> StepShape:
    choosing = [sampling_of(request)[0] for request in batch if request.has_new_token]
    num_sampled = sum(not params.is_greedy for params in choosing)
    step = step_of([Chunk(request.query_length, request.state.position_offset) for request in batch])
    return step.sampling(num_sampled, sum(params.is_truncated for params in choosing))
