"""Per-request attention equals dense attention under explicit masks, whatever is packed into a step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from selectn_core.attention import make_segments, varlen_attention

HEAD_DIM = 8


class CacheThatIsFull:
    """Stands in for the paged cache: `update` returns keys and values that a real one would have gathered."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


def dense_attention(query, key, value, query_lengths, key_lengths, window) -> torch.Tensor:
    """One request at a time, one query at a time, by the definition."""
    groups = query.shape[1] // key.shape[1]
    rows, key_start = [], 0
    query_start = 0
    for num_queries, num_keys in zip(query_lengths, key_lengths, strict=True):
        keys = key[0, :, key_start : key_start + num_keys].repeat_interleave(groups, dim=0)
        values = value[0, :, key_start : key_start + num_keys].repeat_interleave(groups, dim=0)
        for i in range(num_queries):
            last = num_keys - num_queries + i
            first = 0 if window is None else max(0, last - window + 1)
            one = query[0, :, query_start + i]
            scores = torch.einsum("hd,hkd->hk", one, keys[:, first : last + 1]) / HEAD_DIM**0.5
            rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), values[:, first : last + 1]))
        query_start += num_queries
        key_start += num_keys
    return torch.stack(rows)


def bounds(lengths) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@given(
    requests=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4),
    num_kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_attention(requests, num_kv_heads, groups, window, seed) -> None:
    """Fresh prompts, chunks with a past, and decodes, with shared key heads and sliding windows."""
    query_lengths = [num_queries for num_queries, _ in requests]
    # A sliding cache keeps window - 1 past keys at most.
    pasts = [past if window is None else min(past, window - 1) for _, past in requests]
    key_lengths = [num_queries + past for num_queries, past in zip(query_lengths, pasts, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, num_kv_heads * groups, sum(query_lengths), HEAD_DIM, generator=generator)
    key, value = torch.randn(2, 1, num_kv_heads, sum(key_lengths), HEAD_DIM, generator=generator)
    layer = nn.Module()
    layer.layer_idx = 0
    segments = make_segments(bounds(query_lengths), bounds(key_lengths), sliding_window=window)
    output, _ = varlen_attention(
        layer, query, key, value, None, scaling=HEAD_DIM**-0.5, cache=CacheThatIsFull(key, value), segments=[segments]
    )
    expected = dense_attention(query, key, value, query_lengths, key_lengths, window)
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


def test_masks_are_only_made_where_causality_does_not_do() -> None:
    fresh, chunk, decode = make_segments([0, 4, 7, 8], [0, 4, 12, 20])
    assert (fresh.is_causal, fresh.mask) == (True, None)
    assert chunk.mask is not None
    assert not chunk.is_causal
    assert (decode.is_causal, decode.mask) == (False, None)
