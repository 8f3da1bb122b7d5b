"""Per-request attention for packed batches, so that a step's cost grows with each request's own length.

Continuous batching packs the tokens of all requests into one row. Its default attends every query to every
request's keys under a block mask, which costs O(requests^2 x length). This one, registered through transformers'
public AttentionInterface, runs scaled_dot_product_attention once per request over that request's keys alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "selectn_varlen"
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One request's rows in the packed queries and keys; `mask` [num_queries, num_keys] only where needed."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    mask: torch.Tensor | None
    is_causal: bool


def make_segments(
    query_bounds: Sequence[int],
    key_bounds: Sequence[int],
    *,
    sliding_window: int | None = None,
    device: torch.device | None = None,
) -> list[Segment]:
    """The segments of one step for one type of attention.

    Args:
        query_bounds: cumulative query lengths, [num_requests + 1].
        key_bounds: cumulative key lengths, [num_requests + 1]; a request's queries are its last keys.
        sliding_window: keys a query sees at most, its own included; None for all.
    """
    segments = []
    for i in range(len(query_bounds) - 1):
        num_queries = query_bounds[i + 1] - query_bounds[i]
        num_keys = key_bounds[i + 1] - key_bounds[i]
        windowed = sliding_window is not None and num_keys > sliding_window
        needs_mask = num_queries > 1 and (num_keys != num_queries or windowed)
        segments.append(
            Segment(
                query_start=query_bounds[i],
                query_end=query_bounds[i + 1],
                key_start=key_bounds[i],
                key_end=key_bounds[i + 1],
                mask=_mask(num_queries, num_keys, sliding_window, device) if needs_mask else None,
                is_causal=num_queries > 1 and not needs_mask,
            )
        )
    return segments


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Any = None,
    segments: Sequence[Sequence[Segment]] | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [num_heads]
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the paged cache; `segments[layer_idx]` are the layer's segments.

    `softcap` bounds logits by a tanh. `s_aux` are attention sinks: for every head a logit that takes its part of the
    softmax and has no value.

    Returns [1, num_tokens, num_heads, value_dim]. Raises RuntimeError outside continuous batching.
    """
    if cache is None or segments is None:
        raise RuntimeError(f"{ATTENTION_NAME} needs the paged cache of continuous batching, passed on by every layer")
    key, value = _cached(cache, cast(int, module.layer_idx), key, value, kwargs)
    mine = segments[cast(int, module.layer_idx)]
    attend = _attend if softcap is None and s_aux is None else partial(_attend_as_defined, softcap=softcap, sinks=s_aux)
    if len(mine) == 1:
        return attend(query, key, value, mine[0], scaling).unsqueeze(0), None
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for segment in mine:
        output[segment.query_start : segment.query_end] = attend(
            query[:, :, segment.query_start : segment.query_end],
            key[:, :, segment.key_start : segment.key_end],
            value[:, :, segment.key_start : segment.key_end],
            segment,
            scaling,
        )
    return output.unsqueeze(0), None


def _cached(
    cache: Any, layer_idx: int, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's keys and values behind those in the cache, whose rows are as wide as the wider of the two."""
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    if key_dim != value_dim:  # padding by nothing would be a copy
        widest = max(key_dim, value_dim)
        key, value = (pad(each, (0, widest - each.shape[-1])) for each in (key, value))
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=kwargs)
    return key[..., :key_dim], value[..., :value_dim]


def _attend(
    query: torch.Tensor,  # [1, num_heads, num_queries, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_keys, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_keys, value_dim]
    segment: Segment,
    scaling: float | None,
) -> torch.Tensor:  # [num_queries, num_heads, value_dim]
    """One request's attention."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if query.shape[2] == 1:
        # One query: the heads that share a key head become its queries, and nothing is repeated.
        one = query.reshape(1, num_kv_heads, num_heads // num_kv_heads, -1)
        return scaled_dot_product_attention(one, key, value, scale=scaling).reshape(1, num_heads, -1)
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=segment.mask,
        is_causal=segment.is_causal,
        scale=scaling,
        enable_gqa=num_heads != num_kv_heads,
    )
    return attended[0].transpose(0, 1)


def _attend_as_defined(
    query: torch.Tensor,  # [1, num_heads, num_queries, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_keys, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_keys, value_dim]
    segment: Segment,
    scaling: float | None,
    *,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:  # [num_queries, num_heads, value_dim]
    """One request's attention, softmax and all, for what scaled_dot_product_attention has no argument for.

    Logits of a few queries at a time, so that a long chunk of prefill does not need all of them at once.
    """
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    groups, num_queries = query.shape[1] // num_kv_heads, query.shape[2]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    grouped = query[0].unflatten(0, (num_kv_heads, groups))  # [num_kv_heads, groups, num_queries, head_dim]
    rows = []
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, num_queries)
        logits = (grouped[:, :, start:end] @ key[0, :, None].transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if segment.is_causal:
            seen = _mask(end - start, end, None, query.device)
            logits[..., :end].masked_fill_(~seen, -torch.inf)
            logits[..., end:] = -torch.inf
        elif segment.mask is not None:
            logits.masked_fill_(~segment.mask[start:end], -torch.inf)
        if sinks is not None:
            shape = (num_kv_heads, groups, end - start, 1)
            logits = torch.cat([logits, sinks.float().view(num_kv_heads, groups, 1, 1).expand(shape)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_keys].to(value.dtype)
        rows.append((weights @ value[0, :, None]).flatten(0, 1).transpose(0, 1))  # [queries, num_heads, value_dim]
    return torch.cat(rows)


def _mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device | None) -> torch.Tensor:
    """True where a query may see a key: not after it, and fewer than `sliding_window` before it."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    if sliding_window is not None:
        seen.triu_(num_keys - num_queries - sliding_window + 1)
    return seen


AttentionInterface.register(ATTENTION_NAME, varlen_attention)
