"""Latency objectives in seconds: as configured, a stated multiple of the unloaded latency, or a request's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selectn_core.config import BatchConfig, SloConfig
from selectn_core.errors import RequestError
from selectn_core.latency.steps import StepShape

if TYPE_CHECKING:
    from selectn_core.latency.step_times import StepTimes

# Twice the unloaded step of a full batch: a link as fast as the model computes can then hold half of the layers.
TPOT_MULTIPLE = 2.0
# Ten full chunks of prefill: a prompt of a few chunks, with a few prompts before it.
TTFT_MULTIPLE = 10.0


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Time to first token and time per output token, in seconds."""

    ttft_s: float
    tpot_s: float


def resolve_objectives(slo: SloConfig, times: StepTimes, batch: BatchConfig) -> Objectives:
    """The configured objectives, with each "auto" replaced by its multiple of the unloaded latency.

    For TPOT that is a decode step of `batch.max_requests` requests that fill the KV cache's guaranteed part and sample,
    as by default; for TTFT a step of `batch.max_batch_tokens` tokens of prefill. Nothing is offloaded in either.
    """
    length = max(1, batch.kv_tokens // batch.max_requests)
    unloaded = {
        "ttft_s": times.expected_s(StepShape.prefill(batch.max_batch_tokens)) * TTFT_MULTIPLE,
        "tpot_s": times.expected_s(StepShape.decode(batch.max_requests, length).sampling()) * TPOT_MULTIPLE,
    }
    return Objectives(
        ttft_s=unloaded["ttft_s"] if slo.ttft_ms == "auto" else slo.ttft_ms / 1e3,
        tpot_s=unloaded["tpot_s"] if slo.tpot_ms == "auto" else slo.tpot_ms / 1e3,
    )


def configured_objectives(slo: SloConfig) -> Objectives | None:
    """The objectives where both are numbers; None where one is "auto" and nothing was measured."""
    if slo.ttft_ms == "auto" or slo.tpot_ms == "auto":
        return None
    return Objectives(ttft_s=slo.ttft_ms / 1e3, tpot_s=slo.tpot_ms / 1e3)


def requested_objectives(
    default: Objectives, slo: SloConfig, *, ttft_ms: float | None, tpot_ms: float | None
) -> Objectives:
    """A request's own objectives; None keeps the default. Raises RequestError outside of the configured range."""
    return Objectives(
        ttft_s=_within("slo.ttft_ms", ttft_ms, default.ttft_s, slo),
        tpot_s=_within("slo.tpot_ms", tpot_ms, default.tpot_s, slo),
    )


def _within(name: str, value_ms: float | None, default_s: float, slo: SloConfig) -> float:
    if value_ms is None:
        return default_s
    low_ms, high_ms = slo.tightest * default_s * 1e3, slo.loosest * default_s * 1e3
    if not low_ms <= value_ms <= high_ms:
        raise RequestError(f"{name}={value_ms:g} is not allowed: expected {low_ms:g} to {high_ms:g}", field=name)
    return value_ms / 1e3
