"""A request's time in the engine as spans of OpenTelemetry, below Ray Serve's own, where Serve traces.

A room of its own because only this file knows OpenTelemetry, and nothing is done for a request that is not traced.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from selectn_core.requests.handle import RequestHandle

if TYPE_CHECKING:  # which imports torch
    from selectn_core.engine.engine import Engine

logger = logging.getLogger(__name__)

SYSTEM = "selectn"


class TracedRequest:
    """Begins with a call of the replica; `end` makes spans "queue", "prefill" and "decode" of what it was.

    Attributes have the names of the GenAI semantic conventions where there are any. What the link carried to the device
    meanwhile is an event of the last span: copies are for all requests of a step.
    """

    def __init__(self, engine: Engine) -> None:
        self._span = trace.get_current_span()
        self._is_traced = self._span.is_recording()
        if self._is_traced:
            self._engine, self._copied_bytes = engine, engine.device.link_usage().copied_bytes

    def end(self, handle: RequestHandle) -> None:
        """The request is over. A span processor that raises changes nothing for it."""
        if not self._is_traced:
            return
        self._is_traced = False
        try:
            self._end(handle)
        except Exception:
            logger.exception("the spans of a request are lost")

    def _end(self, handle: RequestHandle) -> None:
        self._span.set_attributes(
            {
                "gen_ai.operation.name": operation_of(handle.request_id),
                "gen_ai.provider.name": SYSTEM,
                "gen_ai.request.model": self._engine.model_name,
                "gen_ai.response.id": handle.request_id,
                "gen_ai.usage.input_tokens": handle.num_prompt_tokens,
                "gen_ai.usage.output_tokens": handle.num_tokens,
            }
        )
        spans, to_unix_s = handle.spans, time.time() - time.perf_counter()
        began_s = handle.arrived_s + to_unix_s
        copied_bytes = self._engine.device.link_usage().copied_bytes - self._copied_bytes
        transfers = {
            "selectn.copied_bytes": copied_bytes,
            "selectn.offloaded_units": self._engine.executor.plan.num_offloaded,
        }
        for name, seconds in (("queue", spans.queue_s), ("prefill", spans.prefill_s), ("decode", spans.decode_s)):
            self._child(name, began_s, began_s + seconds, transfers if name == "decode" else None)
            began_s += seconds

    def _child(self, name: str, began_s: float, ended_s: float, transfers: dict[str, Any] | None) -> None:
        context = trace.set_span_in_context(self._span)
        span = trace.get_tracer(SYSTEM).start_span(f"selectn.{name}", context, start_time=_ns(began_s))
        if transfers is not None:
            span.add_event("selectn.transfers", transfers, timestamp=_ns(ended_s))
        span.end(_ns(ended_s))


def operation_of(request_id: str) -> str:
    """The GenAI name of what was asked for, by the id that the ingress gave it."""
    return "chat" if request_id.startswith("chatcmpl-") else "text_completion"


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
