"""The table of metrics is one that Prometheus takes."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from cluster.metrics.table import BY_NAME, METRICS, VLLM, Metric

# vLLM's own, which its dashboards ask for.
MISNAMED = {"vllm_iteration_tokens_total"}


def test_every_name_is_there_once() -> None:
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_and_labels_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert re.fullmatch(r"(selectn|vllm|gen_ai)_[a-z0-9_]+", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")) or metric.name in MISNAMED
    assert all(re.fullmatch(r"[a-z_]+", label) for label in metric.all_labels)
    assert metric.means
    assert metric.unit


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_histograms_alone_have_buckets_which_ascend(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert all(low < high for low, high in pairwise(metric.buckets))


def test_what_rays_own_dashboard_asks_for_is_there() -> None:
    exported = {metric.exported for metric in VLLM}
    assert {
        "ray_vllm_time_to_first_token_seconds",
        "ray_vllm_request_time_per_output_token_seconds",
        "ray_vllm_prompt_tokens_total",
        "ray_vllm_generation_tokens_total",
        "ray_vllm_request_success_total",
        "ray_vllm_kv_cache_usage_perc",
        "ray_vllm_prefix_cache_hits_total",
        "ray_vllm_num_requests_swapped",
    } <= exported
