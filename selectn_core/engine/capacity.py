"""What an engine can take on: the numbers that admission and routing decide by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from selectn_core.latency.steps import StepRecord
from selectn_core.memory.kv_geometry import KvGeometry

_RECENT = 64
_PERCENT = 95


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an engine can take in all, whoever has it now; tokens are those of `footprint_tokens`.

    `kv_capacity_tokens`: what the KV cache holds when as much is offloaded as may be; `waiting_prefill_tokens`: prompts
    that have no token yet; `prefill_s_per_token` and `decode_step_s` (95th percentile) are as lately measured, None
    before there was any.
    """

    kv_capacity_tokens: int
    longest_request_tokens: int
    is_model_limit: bool
    waiting_prefill_tokens: int
    prefill_s_per_token: float | None
    decode_step_s: float | None


class InFlight(Protocol):
    """What is asked of a request's handle."""

    num_prompt_tokens: int
    num_tokens: int


def footprint_tokens(geometry: KvGeometry, num_sectors: int, total_tokens: int) -> int:
    """What a request of `total_tokens`, prompt and output, takes of an arena of `num_sectors`, whole sectors.

    Counted so that requests fit `n` sectors wherever their footprints sum up to `capacity_tokens(..., n)` or less.
    """
    sectors = geometry.sectors_for_request(total_tokens)
    return -(-sectors * _tokens_in(geometry, num_sectors) // num_sectors)


@lru_cache(maxsize=16)  # asked for every number of tokens, of the same arena
def _tokens_in(geometry: KvGeometry, num_sectors: int) -> int:
    return geometry.tokens_in(num_sectors)


def capacity_tokens(geometry: KvGeometry, num_sectors: int, kv_sectors: int) -> int:
    """Tokens of footprints that `kv_sectors` of an arena of `num_sectors` hold."""
    return kv_sectors * geometry.tokens_in(num_sectors) // num_sectors


def waiting_prefill_tokens(handles: Sequence[InFlight]) -> int:
    """Prompt tokens of requests that have no token yet."""
    return sum(handle.num_prompt_tokens for handle in handles if not handle.num_tokens)


def decode_step_s(records: Sequence[StepRecord]) -> float | None:
    """95th percentile of the latest steps in which somebody decoded; None before the first."""
    durations = sorted(record.duration_s for record in records if record.shape.num_decodes)
    return durations[min(len(durations) - 1, len(durations) * _PERCENT // 100)] if durations else None


def latest(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """The records that count as recent."""
    return list(records)[-_RECENT:]
