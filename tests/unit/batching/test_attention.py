"""Per-request attention equals dense attention under explicit masks, whatever is packed into a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import pad

from selectn_core.batching.attention import make_segments, varlen_attention

HEAD_DIM = 8


class FirstLayer(nn.Module):
    layer_idx = 0


class CacheThatIsFull:
    """Stands in for the paged cache: `update` returns keys and values that a real one would have gathered."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert key_states.shape[-1] == value_states.shape[-1] == self.keys.shape[-1], "rows of the cache have one width"
        return self.keys, self.values


def dense_attention(query, key, value, query_lengths, key_lengths, window, softcap=None, sinks=None) -> torch.Tensor:
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
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp()
            total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None])
            rows.append(torch.einsum("hk,hkd->hd", weights / total, values[:, first : last + 1]))
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
    value_dim=st.sampled_from([HEAD_DIM, 5, 11]),
    softcap=st.sampled_from([None, 1.5]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_dense_attention(requests, num_kv_heads, groups, window, value_dim, softcap, has_sinks, seed) -> None:
    """Fresh prompts, chunks with a past, and decodes, with shared key heads, sliding windows, caps and sinks."""
    query_lengths = [num_queries for num_queries, _ in requests]
    # A sliding cache keeps window - 1 past keys at most.
    pasts = [past if window is None else min(past, window - 1) for _, past in requests]
    key_lengths = [num_queries + past for num_queries, past in zip(query_lengths, pasts, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, num_kv_heads * groups, sum(query_lengths), HEAD_DIM, generator=generator)
    key = torch.randn(1, num_kv_heads, sum(key_lengths), HEAD_DIM, generator=generator)
    value = torch.randn(1, num_kv_heads, sum(key_lengths), value_dim, generator=generator)
    sinks = torch.randn(num_kv_heads * groups, generator=generator) if has_sinks else None
    layer = FirstLayer()
    segments = make_segments(bounds(query_lengths), bounds(key_lengths), sliding_window=window)
    wide = [pad(each, (0, max(HEAD_DIM, value_dim) - each.shape[-1])) for each in (key, value)]
    output, _ = varlen_attention(
        layer,
        query,
        key,
        value,
        None,
        scaling=HEAD_DIM**-0.5,
        cache=CacheThatIsFull(*wide),
        segments=[segments],
        softcap=softcap,
        s_aux=sinks,
    )
    expected = dense_attention(query, key, value, query_lengths, key_lengths, window, softcap, sinks)
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_keys", [9, 14])
def test_long_chunks_are_taken_a_few_queries_at_a_time(monkeypatch, num_keys) -> None:
    """Fresh, and behind keys of before; in pieces that do and do not divide the chunk."""
    query, key, value = torch.randn(3, 1, 2, num_keys, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    query = query[:, :, :9]
    layer = FirstLayer()
    segments = [make_segments([0, 9], [0, num_keys])]
    results = []
    for at_once in (256, 4, 3):
        monkeypatch.setattr("selectn_core.batching.attention._QUERIES_AT_ONCE", at_once)
        cache = CacheThatIsFull(key, value)
        results.append(varlen_attention(layer, query, key, value, None, cache=cache, segments=segments, softcap=2.0)[0])
    assert results[0].shape == (1, 9, 2, HEAD_DIM)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_masks_are_only_made_where_causality_does_not_do() -> None:
    fresh, chunk, decode = make_segments([0, 4, 7, 8], [0, 4, 12, 20])
    assert (fresh.is_causal, fresh.mask) == (True, None)
    assert chunk.mask is not None
    assert not chunk.is_causal
    assert (decode.is_causal, decode.mask) == (False, None)
