"""Spans of a request, by OpenTelemetry's own SDK, below a span such as Serve's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.replica.tracing import TracedRequest
from selectn_core.engine.engine import Engine
from tests.support.engines import CheckedEngine, engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # once in a process
    return exporter


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with CheckedEngine(tiny_model(), engine_config(num_offloaded=2, num_slots=1)) as engine:
        yield engine


def test_a_traced_request_has_a_span_for_each_part_of_its_time(spans: InMemorySpanExporter, engine: Engine) -> None:
    with trace.get_tracer("serve").start_as_current_span("generate"):
        traced = TracedRequest(engine)
        handle = engine.submit(make_prompts()[0], greedy(5), request_id="chatcmpl-7", waited_s=1.0)
        handle.result()
        traced.end(handle)
    ended: tuple[Any, ...] = spans.get_finished_spans()
    queue, prefill, decode, parent = ended
    assert [each.name for each in (queue, prefill, decode)] == ["selectn.queue", "selectn.prefill", "selectn.decode"]
    assert {each.parent.span_id for each in (queue, prefill, decode)} == {parent.context.span_id}
    assert queue.end_time - queue.start_time >= 1e9 - 1e6
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    (transfers,) = decode.events
    assert transfers.attributes["selectn.copied_bytes"] > 0
    assert transfers.attributes["selectn.offloaded_units"] == 2
    assert parent.attributes["gen_ai.operation.name"] == "chat"
    assert parent.attributes["gen_ai.usage.output_tokens"] == 5
    spans.clear()


def test_nothing_is_done_for_one_that_is_not_traced(spans: InMemorySpanExporter, engine: Engine) -> None:
    traced = TracedRequest(engine)
    handle = engine.submit(make_prompts()[0], greedy(2))
    handle.result()
    traced.end(handle)
    assert spans.get_finished_spans() == ()
