"""Attention for packed batches, each request to its own keys, so that a step's cost grows with their lengths.

Continuous batching packs the tokens of all requests into one row. Its default attends every query to every
request's keys under a block mask, which costs O(requests^2 x length). This one, registered through transformers'
public AttentionInterface, runs scaled_dot_product_attention once for each request with several tokens, and takes those
with one token together where `attend_in_place` does it. Where `attention_path` says so, it takes all requests together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from selectn_core.batching.decode_attention import Decodes, attend_in_place, can_attend_in_place
from selectn_core.batching.packed_attention import Packed, attend_packed

ATTENTION_NAME = "selectn_varlen"
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One request's tokens of a step, several of them: its queries, which are also the last of its keys.

    `past_rows` are the rows of the cache with the keys before them; `mask` [num_queries, num_keys] only where needed.
    """

    query_start: int
    query_end: int
    past_rows: torch.Tensor  # int64 [num_past]
    mask: torch.Tensor | None
    is_causal: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Attended:
    """What the layers of one type of attention read and write in a step.

    `write_rows` [num_tokens] are the rows of the cache that the step's own keys go to. With `packed` all requests are
    attended for in one call, and there are neither `segments` nor `decodes`.
    """

    write_rows: torch.Tensor  # int64
    segments: Sequence[Segment]
    decodes: Sequence[Decodes]
    packed: Packed | None = None


def make_segment(
    query_start: int, query_end: int, past_rows: torch.Tensor, *, sliding_window: int | None = None
) -> Segment:
    """A request's segment; `sliding_window` is the keys that a query sees at most, its own included (None: all)."""
    num_queries = query_end - query_start
    num_keys = num_queries + len(past_rows)
    needs_mask = len(past_rows) > 0 or (sliding_window is not None and num_keys > sliding_window)
    return Segment(
        query_start=query_start,
        query_end=query_end,
        past_rows=past_rows,
        mask=_mask(num_queries, num_keys, sliding_window, past_rows.device) if needs_mask else None,
        is_causal=not needs_mask,
    )


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Any = None,
    attended: Sequence[Attended] | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [num_heads]
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the paged cache; `attended[layer_idx]` is what the layer reads and writes.

    `softcap` bounds logits by a tanh. `s_aux` are attention sinks: for every head a logit that takes its part of the
    softmax and has no value.

    Returns [1, num_tokens, num_heads, value_dim]. Raises RuntimeError outside continuous batching, and where a packed
    step meets a cap or sinks.
    """
    if cache is None or attended is None:
        raise RuntimeError(f"{ATTENTION_NAME} needs the paged cache of continuous batching, passed on by every layer")
    layer_idx = cast(int, module.layer_idx)
    mine, (keys, values) = attended[layer_idx], cache.layer_to_allocator[layer_idx]._kv_token_views[layer_idx]
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    new_keys, new_values = _as_rows(key, keys), _as_rows(value, values)
    if mine.packed is not None:
        if softcap is not None or s_aux is not None:
            raise RuntimeError(f"layer {layer_idx} has soft caps or sinks, and no layer like it had them in the probe")
        all_keys = mine.packed.write_and_gather(keys, new_keys, mine.write_rows)
        all_values = mine.packed.write_and_gather(values, new_values, mine.write_rows)
        attended_to = attend_packed(query[0].transpose(0, 1), all_keys, all_values, mine.packed, scaling)
        return attended_to[None, ..., :value_dim], None
    # Before anything is written: in the ring of a sliding window new tokens take the places of old ones.
    chunks = [(_with_past(it, new_keys, keys), _with_past(it, new_values, values)) for it in mine.segments]
    keys.index_copy_(0, mine.write_rows, new_keys)
    values.index_copy_(0, mine.write_rows, new_values)
    attend = _attend if softcap is None and s_aux is None else partial(_attend_as_defined, softcap=softcap, sinks=s_aux)
    output = query.new_empty(query.shape[2], query.shape[1], value_dim)
    for segment, (its_keys, its_values) in zip(mine.segments, chunks, strict=True):
        queries = query[:, :, segment.query_start : segment.query_end]
        output[segment.query_start : segment.query_end] = attend(
            queries, _heads_first(its_keys, key_dim), _heads_first(its_values, value_dim), segment, scaling
        )
    for decodes in mine.decodes:
        queries = query[0].transpose(0, 1)[decodes.queries]
        if can_attend_in_place(keys):
            attended_to = attend_in_place(queries, keys, values, decodes, scaling, softcap=softcap, sinks=s_aux)
        else:
            attended_to = _attend_each(attend, queries, keys, values, decodes, scaling, value_dim)
        output[decodes.queries] = attended_to[..., :value_dim]
    return output.unsqueeze(0), None


def _as_rows(states: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_kv_heads, width] of a step's keys or values; the cache's rows are as wide as the wider."""
    rows, missing = states[0].transpose(0, 1), cached.shape[-1] - states.shape[-1]
    return pad(rows, (0, missing)) if missing else rows  # padding by nothing would be a copy


def _with_past(segment: Segment, new: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """All keys, or values, [num_keys, num_kv_heads, width] of a request's segment."""
    own = new[segment.query_start : segment.query_end]
    return torch.cat([cached[segment.past_rows], own]) if len(segment.past_rows) else own


def _heads_first(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """[1, num_kv_heads, num_keys, dim] of rows [num_keys, num_kv_heads, width]."""
    return rows[..., :dim].transpose(0, 1).unsqueeze(0)


def _attend_each(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,  # [num_requests, num_heads, head_dim]
    keys: torch.Tensor,  # [num_rows, num_kv_heads, width], the cache's
    values: torch.Tensor,  # [num_rows, num_kv_heads, width], the cache's
    decodes: Decodes,
    scaling: float | None,
    value_dim: int,
) -> torch.Tensor:  # [num_requests, num_heads, value_dim]
    """Attention of requests with one query, one after the other, over gathered keys and values."""
    used = torch.cat([rows[:number] for rows, number in zip(decodes.rows, decodes.num_keys, strict=True)])
    gathered = (each[used].split(list(decodes.num_keys)) for each in (keys, values))
    return torch.cat(
        [
            attend(
                one[None, :, None],
                _heads_first(its_keys, query.shape[-1]),
                _heads_first(its_values, value_dim),
                _ONE_QUERY,
                scaling,
            )
            for one, its_keys, its_values in zip(query, *gathered, strict=True)
        ]
    )


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


_ONE_QUERY = Segment(query_start=0, query_end=1, past_rows=torch.empty(0), mask=None, is_causal=False)

AttentionInterface.register(ATTENTION_NAME, varlen_attention)
