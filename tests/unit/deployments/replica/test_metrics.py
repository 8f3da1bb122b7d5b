"""What an engine's requests, steps and state become as metrics: a real engine, and meters that keep what they get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.metrics.table import REPLICA, VLLM
from deployments.replica.metrics import MOST_GAPS, ReplicaMetrics, RequestNumbers
from selectn_core.engine.engine import Engine
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives
from tests.support.engines import CheckedEngine, engine_config, greedy, make_prompts
from tests.support.meters import KeptMeters
from tests.support.tiny_models import tiny_model

# Of a cluster, a controller or a preemption, none of which is here.
ELSEWHERE = {
    "selectn_link_share_bytes_per_second",
    "selectn_coordinator_lease_left_seconds",
    "selectn_link_measured_bytes_per_second",
    "selectn_prediction_error_ratio",
    "selectn_controller_share_ratio",
    "selectn_ttft_objective_seconds",
    "selectn_tpot_objective_seconds",
    "vllm_num_preemptions",
    "selectn_swapped_preemptions",
    "vllm_prefix_cache_hits",
    "selectn_plan_changes",
    "selectn_stall_seconds",
}
LOOSE, TIGHT = Objectives(ttft_s=1e3, tpot_s=1e3), Objectives(ttft_s=1e-9, tpot_s=1e-9)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with CheckedEngine(tiny_model(), engine_config(num_offloaded=2)) as engine:
        yield engine


def metrics_of(engine: Engine, meters: KeptMeters) -> ReplicaMetrics:
    def state() -> dict:
        return {**engine.snapshot(), "at_door": 3, "headroom_tokens": 7, "cluster": None}

    metrics = ReplicaMetrics(meters, state, engine.steps.records)
    engine.observe(metrics.numbers)
    engine.startup_s["weights"] = 1.0
    return metrics


def test_every_metric_of_a_replica_has_a_value_and_counts_are_exact(engine: Engine) -> None:
    meters = KeptMeters("replica", model_name="m")
    metrics = metrics_of(engine, meters)
    prompts, num_tokens = make_prompts()[:3], 6
    handles = [engine.submit(prompt, greedy(num_tokens), objectives=LOOSE) for prompt in prompts]
    for handle in handles:
        handle.result()
    missed = engine.submit(prompts[0], greedy(num_tokens), objectives=TIGHT)
    missed.result()
    gone = engine.submit(prompts[1], greedy(200), objectives=LOOSE)
    next(iter(gone))
    gone.cancel()
    metrics.close()
    metrics.publish()
    names = {metric.name for metric in (*VLLM, *REPLICA) if metric.owner == "replica"}
    assert names - meters.told <= ELSEWHERE
    assert meters.of("vllm_request_success", "length") == 4
    assert meters.of("vllm_request_success", "abort") == 1
    assert meters.of("selectn_requests", "completed") == 4
    assert meters.of("selectn_slo_requests", "both", "true") == 4, "the one that left was in time so far"
    assert meters.of("selectn_slo_requests", "both", "false") == 1
    assert meters.of("selectn_slo_requests", "ttft", "false") == 1
    assert meters.of("vllm_generation_tokens") == 4 * num_tokens + gone.num_tokens
    assert meters.of("selectn_goodput_tokens") == 3 * num_tokens + gone.num_tokens
    assert meters.of("vllm_prompt_tokens") == sum(len(prompt) for prompt in (*prompts, prompts[0], prompts[1]))
    assert len(meters.of("vllm_time_to_first_token_seconds")) == 5
    assert len(meters.of("vllm_inter_token_latency_seconds")) == 4 * (num_tokens - 1) + gone.num_tokens - 1
    assert len(meters.of("selectn_step_seconds")) == engine.steps.num_steps
    assert meters.of("vllm_num_requests_waiting_by_reason", "capacity") == 3
    assert meters.of("selectn_offloaded_units") == 2
    assert meters.of("selectn_plan_limited_by", "by_hand") == 1
    assert meters.of("selectn_plan_limited_by", "objective") == 0


def test_a_requests_times_add_up(engine: Engine) -> None:
    meters = KeptMeters("replica", model_name="m")
    metrics = metrics_of(engine, meters)
    handle = engine.submit(make_prompts()[0], greedy(5), waited_s=2.0)
    handle.result()
    metrics.close()
    (queue_s,), (prefill_s,), (decode_s,), (total_s,), (ttft_s,) = (
        meters.of(f"vllm_{name}_seconds")
        for name in (
            "request_queue_time",
            "request_prefill_time",
            "request_decode_time",
            "e2e_request_latency",
            "time_to_first_token",
        )
    )
    assert queue_s >= 2.0
    assert ttft_s == pytest.approx(queue_s + prefill_s)
    assert total_s == pytest.approx(queue_s + prefill_s + decode_s, abs=0.05)


def test_by_opentelemetrys_names_as_well_where_that_is_wanted(engine: Engine) -> None:
    numbers, genai = RequestNumbers(), KeptMeters("genai", model_name="m")
    engine.observe(numbers)
    engine.submit(make_prompts()[0], greedy(5), request_id="chatcmpl-1").result()
    engine.submit(make_prompts()[0], greedy(1), request_id="cmpl-1").result()
    numbers.publish(KeptMeters("replica", model_name="m"), genai)
    assert len(genai.of("gen_ai_server_request_duration_seconds", "chat", "selectn")) == 1
    assert len(genai.of("gen_ai_server_time_per_output_token_seconds", "chat", "selectn")) == 1
    assert len(genai.of("gen_ai_server_time_to_first_token_seconds", "text_completion", "selectn")) == 1
    assert genai.of("gen_ai_server_time_per_output_token_seconds", "text_completion", "selectn") is None


def test_of_many_times_between_tokens_a_fair_sample_is_observed() -> None:
    numbers, meters = RequestNumbers(), KeptMeters("replica", model_name="m")
    handle = RequestHandle("r", 1, lambda ticket: None)
    for number in range(10 * MOST_GAPS):
        numbers.tokens(handle, 1, gap_s=float(number % 2))
    numbers.publish(meters)
    observed = meters.of("vllm_inter_token_latency_seconds")
    assert len(observed) == MOST_GAPS
    assert 0.3 < sum(observed) / MOST_GAPS < 0.7
    assert meters.of("vllm_generation_tokens") == 10 * MOST_GAPS


def test_what_cannot_be_published_is_said_once_and_serving_goes_on(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.replica.metrics.PERIOD_S", 0.01)
    metrics = ReplicaMetrics(KeptMeters("replica", model_name="m"), dict, engine.steps.records)  # a state of nothing
    engine.observe(metrics.numbers)
    engine.submit(make_prompts()[0], greedy(20)).result()
    metrics.close()
    assert sum("metrics are not published" in each.message for each in caplog.records) == 1
