"""Attention equals dense attention by the definition, whatever is packed into a step and wherever its keys are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.batching.attention import make_segment
from selectn_core.batching.decode_attention import alike_in_length
from tests.support.paged_attention import PagedRequests

HEAD_DIM = 8
SHAPES = {
    "num_kv_heads": st.sampled_from([1, 2]),
    "groups": st.sampled_from([1, 3]),
    "window": st.sampled_from([None, 1, 4]),
    "value_dim": st.sampled_from([HEAD_DIM, 5, 11]),
    "softcap": st.sampled_from([None, 1.5]),
    "has_sinks": st.booleans(),
    "page_size": st.sampled_from([3, 4]),
    "seed": st.integers(0, 1000),
}


def step(requests, num_kv_heads, groups, window, value_dim, softcap, has_sinks, page_size, seed):
    """Requests with their keys in a cache, their queries, and what attention is told beside."""
    packed = PagedRequests(
        requests=requests,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        value_dim=value_dim,
        page_size=page_size,
        window=window,
        seed=seed,
    )
    num_heads = num_kv_heads * groups
    query = packed.random(1, num_heads, sum(n for n, _ in requests), HEAD_DIM)
    return packed, query, softcap, packed.random(num_heads) if has_sinks else None


@given(
    requests=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4),
    in_place=st.booleans(),
    **SHAPES,
)
def test_equals_dense_attention(requests, in_place, **shapes) -> None:
    """Fresh prompts, chunks with a past, and decodes, with shared key heads, sliding windows, caps and sinks."""
    packed, query, softcap, sinks = step(requests, **shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selectn_core.batching.attention.can_attend_in_place", lambda keys: in_place)
        output = packed.attend(query, softcap=softcap, s_aux=sinks)
    expected = packed.attend_by_definition(query, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@given(pasts=st.lists(st.integers(0, 200), min_size=2, max_size=6), **SHAPES)
def test_a_decode_does_not_depend_on_those_beside_it(pasts, **shapes) -> None:
    """To the last bit: alone, in another order, or beside a request with many more keys."""
    packed, query, softcap, sinks = step([(1, past) for past in pasts], **shapes)
    together = packed.attend(query, softcap=softcap, s_aux=sinks)
    for i in range(len(pasts)):
        alone, *_ = step([(1, pasts[i])], **shapes)
        alone.keys, alone.values = [packed.keys[i]], [packed.values[i]]
        assert torch.equal(alone.attend(query[:, :, i : i + 1], softcap=softcap, s_aux=sinks)[0], together[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype) -> None:
    requests = [(1, 30), (1, 3), (5, 4), (1, 0)]
    packed = PagedRequests(requests=requests, num_kv_heads=2, head_dim=HEAD_DIM, value_dim=HEAD_DIM, dtype=dtype)
    query = packed.random(1, 4, 8, HEAD_DIM)
    output = packed.attend(query)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), packed.attend_by_definition(query), rtol=2e-2, atol=2e-2)


def test_a_score_that_is_not_finite_is_gone_in_the_next_layer() -> None:
    """Scores of a layer are written over those of the one before it, in the same place."""
    packed = PagedRequests(requests=[(1, 5), (1, 9)], num_kv_heads=1, head_dim=HEAD_DIM, value_dim=HEAD_DIM)
    query = packed.random(1, 2, 2, HEAD_DIM)
    _, attended = packed.cache_and_step()
    scores = attended.decodes[0].scores(2, 1)
    keys = torch.ones(1000, HEAD_DIM)
    scores.of(torch.full((4, HEAD_DIM), torch.nan), keys, 1.0)
    assert scores.of(query[0].reshape(4, HEAD_DIM), keys, 1.0).isfinite().all()


def test_requests_are_taken_together_unless_that_is_mostly_padding() -> None:
    assert alike_in_length([50, 300, 120]) == [[0, 1, 2]]
    assert alike_in_length([7]) == [[0]]
    short = list(range(20))
    assert alike_in_length([10] * 20 + [9000, 10, 8500]) == [[*short, 21], [20, 22]]


@pytest.mark.parametrize("num_keys", [9, 14])
def test_long_chunks_are_taken_a_few_queries_at_a_time(monkeypatch, num_keys) -> None:
    """Fresh, and behind keys of before; in pieces that do and do not divide the chunk."""
    packed = PagedRequests(requests=[(9, num_keys - 9)], num_kv_heads=2, head_dim=HEAD_DIM, value_dim=HEAD_DIM)
    query = packed.random(1, 2, 9, HEAD_DIM)
    results = []
    for at_once in (256, 4, 3):
        monkeypatch.setattr("selectn_core.batching.attention._QUERIES_AT_ONCE", at_once)
        results.append(packed.attend(query, softcap=2.0))
    assert results[0].shape == (9, 2, HEAD_DIM)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_masks_are_only_made_where_causality_does_not_do() -> None:
    fresh, chunk = make_segment(0, 4, torch.arange(0)), make_segment(4, 7, torch.arange(5))
    assert (fresh.is_causal, fresh.mask) == (True, None)
    assert chunk.mask is not None
    assert not chunk.is_causal
    assert make_segment(0, 4, torch.arange(0), sliding_window=3).mask is not None
