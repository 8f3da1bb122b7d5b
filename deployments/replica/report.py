"""What a replica reports of itself, for routers to rank it by and for its callers to admit requests by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from deployments.messages import ModelCard
from deployments.replica.door import Door
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.prefixes import RecentPrefixes

if TYPE_CHECKING:  # which imports torch
    from selectn_core.engine.engine import Engine


def replica_report(replica_id: str, engine: Engine, door: Door, prefixes: RecentPrefixes) -> HeadroomReport:
    """What the routers rank a replica by, and its callers admit requests by."""
    capacity, objectives, slo = engine.capacity(), engine.objectives, engine.config.slo
    slack = None
    if capacity.decode_step_s is not None and objectives is not None:
        slack = 1 - capacity.decode_step_s / objectives.tpot_s
    ttft_s = objectives.ttft_s if objectives is not None else None
    return HeadroomReport(
        replica_id=replica_id,
        reported_s=time.monotonic(),
        kv_capacity_tokens=capacity.kv_capacity_tokens,
        longest_request_tokens=capacity.longest_request_tokens,
        is_model_limit=capacity.is_model_limit,
        max_requests=engine.config.batch.max_requests,
        promises=door.promises(),
        num_waiting=door.num_waiting,
        waiting_prefill_tokens=capacity.waiting_prefill_tokens + door.waiting_prompt_tokens,
        drain_tokens_per_s=door.drain_tokens_per_s(),
        prefill_s_per_token=capacity.prefill_s_per_token,
        slack=slack,
        ttft_s=ttft_s,
        tightest_ttft_s=slo.tightest * ttft_s if ttft_s is not None else None,
        loosest_ttft_s=slo.loosest * ttft_s if ttft_s is not None else None,
        prefixes=prefixes.hashes(),
        # One whose engine has failed has all its room free, and would be sent everything until Serve replaces it.
        is_draining=door.is_closed or not engine.is_healthy(),
    )


def served_fields(card: ModelCard) -> dict[str, Any]:
    """What a report says of the model: `deployments/routing/served_models.py` makes the card of it again."""
    bound = card.text_bound
    return {
        "model": card.name,
        "max_model_len": card.max_model_len,
        "model_created_unix_s": card.created_unix_s,
        "most_prompt_chars": bound.max_chars if bound is not None else None,
        "uncounted_chars": bound.uncounted if bound is not None else "",
    }
