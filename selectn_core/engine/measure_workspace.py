"""Measures what a step needs of the device beside weights and KV cache, at the largest step there may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from selectn_core.batching import Callbacks, ContinuousBatching, KvShape
from selectn_core.batching.probe import Enough, stopping_after
from selectn_core.config import BatchConfig
from selectn_core.device import Device
from selectn_core.memory.kv_geometry import KvGeometry
from selectn_core.memory.workspace import Workspace
from selectn_core.requests.sampling import SamplingParams
from selectn_core.weights.units import Unit, last_of_a_new_kind

# Of the free sectors, what the cache of the measurement has: the rest is room for what is to be measured.
_SHARE = 0.7
# What takes most to choose tokens by, over a large vocabulary more than the model itself.
_LARGEST_SAMPLING = SamplingParams(temperature=1.0, top_k=1, top_p=0.5)

Request = tuple[int, int]  # tokens in the step, tokens before them


def measure_workspace(
    model: nn.Module,
    units: Sequence[Unit],
    config: BatchConfig,
    device: Device,
    geometry: KvGeometry,
    shapes: Mapping[str, KvShape],
    limit: int,
) -> Workspace:
    """Runs a step of `max_batch_tokens`, and the first units of it again without a past, with half, and all that fits.

    Units of a kind are alike; attention takes most where one request has the longest past, of `limit` tokens at most.
    The model must be able to run. What is computed means nothing. Raises DeviceMemoryExceeded.
    """
    config = replace(config, prefix_sharing=False)
    num_sectors = int(_SHARE * device.free_bytes / geometry.sector_bytes) - 2
    batching = ContinuousBatching(model, config, device, _IGNORE, shapes=shapes, num_sectors=max(1, num_sectors))
    last = last_of_a_new_kind(units).module
    try:
        requests = _requests(config, geometry, num_sectors, limit, 0)
        step_bytes = device.peak_bytes(partial(_run, batching, requests, _LARGEST_SAMPLING))
        with stopping_after(last):
            alone, half, full = (
                device.peak_bytes(partial(_run, batching, _requests(config, geometry, sectors, limit, past)))
                for sectors, past in ((num_sectors, 0), (num_sectors // 2, limit), (num_sectors, limit))
            )
    finally:
        batching.close()
        batching.release()  # the real cache comes next: there is room for one
    slope = max(0, full - half) / max(1, num_sectors - num_sectors // 2)
    return Workspace(
        step_bytes=step_bytes,
        past_bytes=max(0, full - alone - math.floor(slope * num_sectors)),
        bytes_per_sector=slope,
    )


def _requests(config: BatchConfig, geometry: KvGeometry, num_sectors: int, limit: int, past: int) -> list[Request]:
    """As many tokens as a step may have: one request with most of them, and as long a past as fits; others decode.

    Fewer requests where the device is that small; none, where not even one fits.
    """
    requests: list[Request] = []
    tokens, sectors = config.max_batch_tokens, num_sectors
    for others in reversed(range(config.max_requests)):
        share = sectors - others * geometry.sectors_for_request(1) if not requests else sectors // (others + 1)
        longest = min(limit, geometry.longest_request_in(share))
        length = min(tokens - others, longest)
        if length < 1:
            continue
        requests.append((length, min(past, longest - length)))
        sectors -= geometry.sectors_for_request(sum(requests[-1]))
        tokens -= length
    return requests


def _run(batching: ContinuousBatching, requests: Sequence[Request], params: SamplingParams | None = None) -> None:
    if not requests:
        return
    try:
        batching.run_step(requests, params)
    except Enough:
        batching.drop_requests()


_IGNORE = Callbacks(
    before_schedule=lambda: None,
    token_budget=lambda most: most,
    on_step_planned=lambda shape: None,
    on_step_done=lambda shape, duration_s: None,
    on_outputs=lambda outputs: None,
    swap_is_cheaper=lambda num_tokens, num_bytes: False,
)
