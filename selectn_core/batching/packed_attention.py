"""Attention of all requests of a step in one call of torch's `varlen_attn`, chunks of prefill and decodes alike.

Keys and values are gathered first: the call's own paged mode takes pages of multiples of 256 tokens, and no rings.
A request's result must not depend on which others are in the step, to the last bit. So keys are never split between
blocks, and the longest lengths that are passed on are such that kernels take no other branch for them (`Packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Where the queries and keys of all requests are, those of a request in the order of its tokens.

    A request's queries are the last of its keys. `rows` are the rows of the cache that keys are in. In a window's ring
    the step's own keys are not there yet when others are read: `own` are their places among the keys, in `rows` they
    mean nothing.
    """

    query_starts: torch.Tensor  # int32 [num_requests + 1]
    key_starts: torch.Tensor  # int32 [num_requests + 1]
    rows: torch.Tensor  # int64 [num_keys]
    own: torch.Tensor | None  # int64 [num_tokens]
    window: int | None  # keys that a query sees at most, its own included
    most_queries: int
    most_keys: int

    def write_and_gather(self, cached: torch.Tensor, new: torch.Tensor, write_rows: torch.Tensor) -> torch.Tensor:
        """Puts a step's own keys, or values, [num_tokens, num_kv_heads, width] into `write_rows` of the cache.

        Returns all that are attended to, [num_keys, num_kv_heads, width].
        """
        if self.own is None:
            cached.index_copy_(0, write_rows, new)
            return cached.index_select(0, self.rows)
        # Before anything is written: in the ring of a window new tokens take the places of old ones.
        gathered = cached.index_select(0, self.rows).index_copy_(0, self.own, new)
        cached.index_copy_(0, write_rows, new)
        return gathered


def longest(lengths: Sequence[int], num_keys: Sequence[int], window: int | None) -> tuple[int, int]:
    """The most queries and keys of a request, as the kernel is told: bounds that leave it one branch for any step.

    Told of one query at most, FlashAttention leaves causality out; told of no more keys than a window has, it leaves
    out the window. Either is another kernel, of other tiles, which rounds otherwise: what a request gets would depend
    on the longest beside it.
    """
    return max(2, *lengths), max(2 if window is None else window + 1, *num_keys)


def attend_packed(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    keys: torch.Tensor,  # [num_keys, num_kv_heads, width]
    values: torch.Tensor,  # [num_keys, num_kv_heads, width]
    packed: Packed,
    scaling: float | None,
) -> torch.Tensor:  # [num_tokens, num_heads, width]
    """Attention of every query to its request's keys up to its own, as far back as the window goes."""
    head_dim, width = query.shape[-1], keys.shape[-1]
    if width != head_dim:  # what keys are padded with is 0
        query = pad(query, (0, width - head_dim))
    attended = varlen_attn(
        query,
        keys,
        values,
        packed.query_starts,
        packed.key_starts,
        packed.most_queries,
        packed.most_keys,
        scale=scaling if scaling is not None else head_dim**-0.5,
        window_size=(-1 if packed.window is None else packed.window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        num_splits=1,
    )
    return cast(torch.Tensor, attended)
