"""Rows of the cache are those that transformers would list, one number at a time."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR

from selectn_core.batching.batch_inputs import PageRows, step_positions

CPU = torch.device("cpu")


def allocator_of(kind: str, page_size: int, window: int):
    allocator = ATTN_TYPE_TO_ALLOCATOR[kind](
        index=0,
        config=SimpleNamespace(head_dim=4, sliding_window=window),
        num_key_value_heads=1,
        cache_dtype=torch.float32,
        page_size=page_size,
        layer_indices=[0, 1],
        allow_block_sharing=False,
    )
    allocator.write_trash_index, allocator.sentinel_index = 7, -1
    return allocator


@given(
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(ATTN_TYPE_TO_ALLOCATOR)),
    page_size=st.integers(1, 5),
    window=st.integers(1, 12),
)
def test_equals_the_lists_of_transformers(requests, kind, page_size, window) -> None:
    allocator = allocator_of(kind, page_size, window)
    blocks = random.Random(0).sample(range(200), 200)
    for i, (length, past) in enumerate(requests):
        num_blocks = allocator.needs_new_blocks(str(i), past, length)
        allocator.block_table[str(i)] = [blocks.pop() for _ in range(num_blocks)]
    lengths, pasts = [length for length, _ in requests], [past for _, past in requests]
    pages = PageRows(allocator, list(allocator.block_table.values()), CPU)
    written, expected = pages.written(lengths, step_positions(lengths, pasts, CPU)).tolist(), []
    for i, (length, past) in enumerate(requests):
        expected += allocator.get_write_indices(str(i), past, length)
        read = [row for row in allocator.get_read_indices(str(i), past, length) if row != allocator.sentinel_index]
        num_past = allocator.get_seqlen_k(past, length) - length
        assert pages.past(i, past).tolist() == read[:num_past]
    assert written == expected


@given(
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(ATTN_TYPE_TO_ALLOCATOR)),
    page_size=st.integers(1, 5),
    window=st.integers(1, 12),
)
def test_packed_keys_are_those_of_transformers_one_request_after_the_other(requests, kind, page_size, window) -> None:
    """Pages may be of several requests, as those of a prefix are."""
    allocator, rng = allocator_of(kind, page_size, window), random.Random(0)
    for i, (length, past) in enumerate(requests):
        num_blocks = allocator.needs_new_blocks(str(i), past, length)
        allocator.block_table[str(i)] = [rng.randrange(4) for _ in range(num_blocks)]
    lengths, pasts = [length for length, _ in requests], [past for _, past in requests]
    num_keys = [allocator.get_seqlen_k(past, length) for length, past in requests]
    packed = PageRows(allocator, list(allocator.block_table.values()), CPU).packed(lengths, pasts, num_keys)
    query_starts, key_starts = packed.query_starts.tolist(), packed.key_starts.tolist()
    assert [end - start for start, end in pairwise(query_starts)] == lengths
    assert [end - start for start, end in pairwise(key_starts)] == num_keys
    own: list[int] = []
    for i, (length, past) in enumerate(requests):
        rows = packed.rows[key_starts[i] : key_starts[i + 1]].tolist()
        assert rows[:-length] == allocator.get_read_indices(str(i), past, length)[: num_keys[i] - length]
        if packed.own is None:  # they have been written when they are read
            assert rows[-length:] == allocator.get_write_indices(str(i), past, length)
        own += range(key_starts[i + 1] - length, key_starts[i + 1])
    assert packed.own is None or packed.own.tolist() == own
    assert (packed.own is None) == (kind == "full_attention")


@given(pasts=st.lists(st.integers(0, 30), min_size=1, max_size=5), page_size=st.integers(1, 5))
@pytest.mark.parametrize("kind", sorted(ATTN_TYPE_TO_ALLOCATOR))
def test_a_single_query_sees_what_is_read_and_itself(kind, pasts, page_size) -> None:
    allocator = allocator_of(kind, page_size, window=8)
    blocks = random.Random(0).sample(range(200), 200)
    for i, past in enumerate(pasts):
        allocator.block_table[str(i)] = [blocks.pop() for _ in range(allocator.needs_new_blocks(str(i), past, 1))]
    pages = PageRows(allocator, list(allocator.block_table.values()), CPU)
    num_keys = [allocator.get_seqlen_k(past, 1) for past in pasts]
    rows = pages.used(range(len(pasts)), num_keys)
    for i, past in enumerate(pasts):
        read = allocator.get_read_indices(str(i), past, 1)[: num_keys[i] - 1]
        own = allocator.get_write_indices(str(i), past, 1)
        assert sorted(rows[i, : num_keys[i]].tolist()) == sorted([*read, *own])
