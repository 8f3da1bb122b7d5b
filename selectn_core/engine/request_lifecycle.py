"""The life of a request in an engine: it is checked, queued, handed its tokens as they come, ended and counted."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence

from selectn_core.batching import ContinuousBatching, GenerationOutput
from selectn_core.engine.capacity import TokenLimits
from selectn_core.errors import EngineOverloaded, EngineUnavailable, RequestError, RequestTooLarge
from selectn_core.requests.attainment import Attainment, Outcome
from selectn_core.requests.handle import RequestHandle, TokenEvent
from selectn_core.requests.objectives import Objectives
from selectn_core.requests.observer import Observer
from selectn_core.requests.sampling import SamplingParams
from selectn_core.requests.table import RequestTable


class RequestLifecycle:
    """An engine's. Requests are submitted and cancelled from any thread, and go on on the generation thread."""

    def __init__(
        self,
        requests: RequestTable,
        batching: ContinuousBatching,
        limits: TokenLimits,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        objectives: Callable[[], Objectives | None],
        percentile: float,
    ) -> None:
        """`objectives` are those of requests that do not name their own; `eos_ids` end a generation."""
        self._requests, self._batching, self._limits = requests, batching, limits
        self._vocab_size, self._eos_ids, self._objectives = vocab_size, eos_ids, objectives
        self.attainment = Attainment(percentile)
        self.observer: Observer | None = None

    # -- it comes -----------------------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError for what `submit` would refuse whenever it came, RequestTooLarge for want of memory."""
        if not prompt_ids:
            raise RequestError("the prompt is empty: at least one token is needed", field="prompt")
        if not all(0 <= token < self._vocab_size for token in prompt_ids):
            raise RequestError(f"the prompt has token ids outside 0..{self._vocab_size - 1}", field="prompt")
        num_tokens, longest = len(prompt_ids) + params.max_tokens, self._limits.max_model_len
        if num_tokens > longest:
            is_model_limit = num_tokens > (self._limits.model_limit or 0) > 0
            raise (RequestError if is_model_limit else RequestTooLarge)(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} are more than the "
                f"{longest} tokens that a request may have here ({self._limits.max_model_len_reason})",
                field="max_tokens" if len(prompt_ids) < longest else "prompt",
            )

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        objectives: Objectives | None = None,
        waited_s: float = 0.0,
        returns: bool = False,
    ) -> RequestHandle:
        """Queues a request and returns at once (`Engine.submit`)."""
        self.check(prompt_ids, params)
        handle = RequestHandle(request_id or uuid.uuid4().hex, len(prompt_ids), self._cancel, waited_s=waited_s)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        eos_ids = () if params.ignore_eos else self._eos_ids
        handle.eos_ids = frozenset((*eos_ids, *params.stop_token_ids))
        handle.max_total_tokens += params.max_tokens
        handle.params, handle.objectives = params, objectives
        if self.observer is not None:
            handle.when_tokens = self.observer.tokens
        try:
            self._queue(handle, prompt_ids, params, seed)
        except (EngineOverloaded, EngineUnavailable):
            if not returns:
                self._count(handle, "refused")
            raise
        return handle

    def _queue(self, handle: RequestHandle, prompt_ids: Sequence[int], params: SamplingParams, seed: int) -> None:
        self._requests.add(handle)
        if not self._batching.submit(handle.ticket, prompt_ids, params, sorted(handle.eos_ids), seed):
            self._requests.remove(handle.ticket)
            raise EngineUnavailable("generation is being restarted after an error; send the request again")

    # -- it has tokens, and ends --------------------------------------------------------------------------------

    def on_outputs(self, outputs: Sequence[GenerationOutput]) -> None:
        """Hands every request what a step has generated for it."""
        for output in outputs:
            self._on_output(output)

    def _on_output(self, output: GenerationOutput) -> None:
        handle = self._requests.get(output.request_id)
        if handle is None:  # cancelled, or submitted while generation failed: nobody reads it
            if not output.is_finished():
                self._batching.cancel(output.request_id)
            return
        new = tuple(output.generated_tokens[handle.num_tokens :])
        if not output.is_finished():
            handle.push(TokenEvent(token_ids=new))
            return
        self._requests.remove(output.request_id)
        if output.error is not None:
            self._end(handle, "failed", TokenEvent(token_ids=new, finish_reason="error", error=output.error))
        else:
            stopped = output.generated_tokens[-1] in handle.eos_ids
            self._end(handle, "completed", TokenEvent(token_ids=new, finish_reason="stop" if stopped else "length"))

    def _cancel(self, ticket: str) -> None:
        handle = self._requests.remove(ticket)
        if handle is not None:
            self._batching.cancel(ticket)
            outcome: Outcome = "completed" if handle.has_enough else "cancelled"
            self._end(handle, outcome, TokenEvent(token_ids=(), finish_reason="cancelled"))

    def fail_all(self, reason: str) -> None:
        """Ends every request with this error."""
        for handle in self._requests.remove_all():
            self._end(handle, "failed", TokenEvent(token_ids=(), finish_reason="error", error=reason))

    def _end(self, handle: RequestHandle, outcome: Outcome, last: TokenEvent) -> None:
        """Counts it, and then lets its reader know: who has the end finds it in `snapshot`."""
        reason = "stop" if outcome == "completed" and last.finish_reason == "cancelled" else last.finish_reason
        handle.push(last, before_seen=lambda: self._count(handle, outcome, reason or ""))

    def _count(self, handle: RequestHandle, outcome: Outcome, finish_reason: str = "") -> None:
        objectives = handle.objectives or self._objectives()
        self.attainment.add(handle.timing, objectives, outcome)
        if self.observer is not None:
            self.observer.ended(handle, outcome, finish_reason, objectives)
