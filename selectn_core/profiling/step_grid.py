"""The steps that a profile measures: from the corners of a grid to what lies between, each a few requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from selectn_core.config import BatchConfig
from selectn_core.latency.steps import StepShape
from selectn_core.memory.kv_geometry import KvGeometry

Requests = tuple[tuple[int, int], ...]  # tokens in the step, keys before them


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How large the shapes of a profile get: tokens and requests in a step, keys of one request, keys in all.

    `windows` are the sliding windows of the model's attention: steps get no slower beyond them, if all of it has one.
    """

    max_tokens: int
    max_requests: int
    max_length: int
    kv_tokens: int
    windows: tuple[int, ...] = ()

    def fits(self, requests: Requests, geometry: KvGeometry, num_sectors: int) -> bool:
        """Whether the KV cache can hold the keys of such a step, and it is within the limits."""
        tokens = sum(tokens for tokens, _ in requests)
        sectors = sum(geometry.sectors_for_request(sum(request)) for request in requests)
        longest = max(map(sum, requests))
        within = tokens <= self.max_tokens and len(requests) <= self.max_requests and longest <= self.max_length
        return within and sectors <= num_sectors


def extent_of(batch: BatchConfig, max_length: int, kv_tokens: int, windows: tuple[int, ...] = ()) -> Extent:
    """The largest shapes that this batching can meet."""
    return Extent(
        max_tokens=batch.max_batch_tokens,
        max_requests=batch.max_requests,
        max_length=max_length,
        kv_tokens=kv_tokens,
        windows=windows,
    )


def coarse_grid(extent: Extent) -> list[Requests]:
    """The corners and a coarse inside, largest first where the largest may turn out not to fit."""
    batches = _geometric(extent.max_requests, 4)
    chunks = _geometric(extent.max_tokens, 4)
    longest = extent.max_length
    windows = [window for window in extent.windows if window < longest]
    shapes: list[Requests] = [
        _decode(batch, length) for batch in batches for length in (32, *windows, longest_beside(extent, batch))
    ]
    shapes += [_prefill(tokens, past) for tokens in chunks for past in (0, min(512, longest - tokens))]
    shapes += [_prefill(extent.max_tokens, past) for past in (*windows, longest - extent.max_tokens)]
    for batch in (extent.max_requests, max(1, extent.max_requests // 4)):
        for tokens in (extent.max_tokens - batch, max(1, extent.max_tokens // 4)):
            for past in (0, min(512, longest - tokens)):
                shapes.append((*_prefill(tokens, past), *_decode(batch - 1, min(256, longest_beside(extent, batch)))))
    return _distinct(shapes)


def fine_grid(extent: Extent) -> list[Requests]:
    """What lies between the shapes of `coarse_grid`, the likely ones first."""
    batches = _geometric(extent.max_requests, 2)
    middle = [batch + batch // 2 for batch in batches if batch >= 2 and batch + batch // 2 <= extent.max_requests]
    chunks = _geometric(extent.max_tokens, 2)
    lengths = sorted({128, 512, 1024, 2048, *extent.windows})
    decodes = [
        _decode(b, length) for length in lengths for b in sorted({*batches, *middle}) if length < extent.max_length
    ]
    prefills = [_prefill(n, past) for past in (0, 256, 1024) for n in chunks]
    mixed = [
        (*_prefill(tokens, past), *_decode(batch, length))
        for batch in sorted({*batches, *middle})
        for tokens in chunks
        for past, length in ((0, 128), (256, 512))
    ]
    order = []
    for i in range(max(len(decodes), len(prefills), len(mixed))):  # interleaved: each kind gets its share of the time
        order += [shapes[i] for shapes in (decodes, prefills, mixed) if i < len(shapes)]
    return _distinct(order)


def _geometric(most: int, factor: int) -> list[int]:
    values, value = [], 1
    while value < most:
        values.append(value)
        value *= factor
    return [*values, most]


def longest_beside(extent: Extent, batch: int) -> int:
    """Keys of each request where `batch` of them share the KV cache, as large as it gets; a quarter is kept free."""
    return max(2, min(extent.max_length, extent.kv_tokens * 3 // 4 // batch))


def _decode(batch: int, length: int) -> Requests:
    return ((1, max(1, length - 1)),) * batch


def _prefill(tokens: int, past: int) -> Requests:
    return ((tokens, max(0, past)),)


def _distinct(shapes: Iterable[Requests]) -> list[Requests]:
    return list(dict.fromkeys(shape for shape in shapes if shape and all(tokens > 0 for tokens, _ in shape)))


def shape_of(requests: Requests) -> StepShape:
    """The shape of a step with these requests."""
    return StepShape.of(
        prefills=[(tokens, past) for tokens, past in requests if tokens > 1 or past == 0],
        decodes=[past + 1 for tokens, past in requests if tokens == 1 and past > 0],
    )


def described(requests: Requests) -> str:
    """These requests in words, for people who wait."""
    shape = shape_of(requests)
    parts = []
    if shape.num_tokens > shape.num_decodes:
        parts.append(f"prefill of {shape.num_tokens - shape.num_decodes} tokens")
    if shape.num_decodes:
        parts.append(f"{shape.num_decodes} decoding, {shape.decode_kv_tokens // shape.num_decodes} keys each")
    return ", ".join(parts)
