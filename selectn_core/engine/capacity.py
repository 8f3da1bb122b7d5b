"""What an engine can take on: the numbers that admission and routing decide by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from selectn_core.control.guarantee import Guarantee
from selectn_core.latency.steps import StepRecord
from selectn_core.memory.kv_geometry import KvGeometry
from selectn_core.offload.offloading import Offloading
from selectn_core.weights.architecture import ContextLimit

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


class TokenLimits:
    """How many tokens one request of an engine may have, and how many its KV cache holds; any thread may ask."""

    def __init__(self, offloading: Offloading, guarantee: Guarantee, context_limit: ContextLimit | None) -> None:
        self._target, self._guarantee, self._context_limit = offloading.target, guarantee, context_limit
        self._geometry, self._pages = offloading.geometry, offloading.batching.pages
        self._num_sectors = offloading.arena.num_sectors
        self._largest_unit_bytes = max(unit.num_bytes for unit in offloading.units)

    @property
    def model_limit(self) -> int | None:
        """The model's own limit of one request; None where it has none."""
        return self._context_limit.num_tokens if self._context_limit is not None else None

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens that one request may have: the model's limit, or what the KV cache can hold.

        That is what it holds with every unit offloaded: they are, while a request needs it.
        """
        capacity = self._geometry.longest_request_in(self._target.most_kv_sectors)
        return min(self.model_limit or capacity, capacity)

    @property
    def max_model_len_reason(self) -> str:
        """What `max_model_len` follows from."""
        limit = self._context_limit
        if limit is not None and limit.num_tokens == self.max_model_len:
            return limit.reason
        return "what the KV cache can hold with every unit offloaded"

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds now, whoever they belong to."""
        return self._geometry.tokens_in(self._pages.num_sectors)

    @property
    def used_kv_tokens(self) -> int:
        """Tokens that the parts of the KV cache in use would hold."""
        return self._geometry.tokens_in(self._pages.num_in_use)

    def reachable_kv_tokens(self, k_max: int | None = None) -> int:
        """Tokens of footprints that the KV cache holds if up to `k_max` units are offloaded; None: `guarantee.plan`.

        Where units are unequal these are so many of the largest, or more of others that have no more bytes together.
        """
        plan, plans = self._guarantee.plan, self._target.plans
        if k_max is not None:
            most_bytes = k_max * self._largest_unit_bytes
            if most_bytes > plans.offloaded_bytes(plan):
                plan = plans.most_within(plan.num_slots, most_bytes)
        return capacity_tokens(self._geometry, self._num_sectors, self._target.kv_sectors(plan))

    def footprint_tokens(self, total_tokens: int) -> int:
        """What a request of `total_tokens`, prompt and output, takes of `reachable_kv_tokens`."""
        return footprint_tokens(self._geometry, self._num_sectors, total_tokens)


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
