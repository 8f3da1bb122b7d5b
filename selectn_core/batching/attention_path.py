"""Which way a model's layers attend: all requests of a step in one call, or each by itself. Chosen once, here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from selectn_core.batching import packed_attention
from selectn_core.batching.packed_attention import Packed, attend_packed, longest
from selectn_core.batching.probe import KvShape

_DTYPES = (torch.float16, torch.bfloat16)
_MOST_HEAD_DIM = 256
_LEAST_CAPABILITY = (8, 0)
_ARGUMENTS = {"scale", "window_size", "enable_gqa", "num_splits"}  # that older releases of torch lack in part
_TOLERANCE = 5e-2  # for sums of numbers near 1, of 8 bits; a key too many or too few is far beyond it


@dataclass(frozen=True, kw_only=True)
class AttentionPath:
    """`packed` is one call for all requests, `by_request` is a call for each; `reason` says why not the former."""

    name: Literal["packed", "by_request"]
    reason: str | None = None


def attention_path(device: torch.device, dtype: torch.dtype, shape: KvShape, window: int | None) -> AttentionPath:
    """How layers with keys and values of this shape, and this window, attend on this device."""
    reason = (
        _refused_device(device) or _refused_layers(dtype, shape) or _failed_trial(device, dtype, shape.head_dim, window)
    )
    return AttentionPath(name="by_request" if reason else "packed", reason=reason)


def _refused_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "varlen_attn is for CUDA"
    if missing := sorted(_ARGUMENTS - set(inspect.signature(packed_attention.varlen_attn).parameters)):
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"varlen_attn wants compute capability {'.'.join(map(str, _LEAST_CAPABILITY))}"
    return None


def _refused_layers(dtype: torch.dtype, shape: KvShape) -> str | None:
    if dtype not in _DTYPES:
        return f"varlen_attn takes no {dtype}"
    if not shape.is_plain:
        return "varlen_attn has no argument for sinks or soft caps"
    if shape.head_dim > _MOST_HEAD_DIM or shape.head_dim % 8:
        return f"varlen_attn takes heads of a multiple of 8, up to {_MOST_HEAD_DIM}: not {shape.head_dim}"
    return None


def _failed_trial(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> str | None:
    """Why it is not to be used, by a small case of a decode and a chunk, both behind other keys; None if it may be."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    lengths, num_keys = [1, 3], [6, 8]
    most_queries, most_keys = longest(lengths, num_keys, window)
    packed = Packed(
        query_starts=torch.tensor([0, 1, 4], dtype=torch.int32, device=device),
        key_starts=torch.tensor([0, 6, 14], dtype=torch.int32, device=device),
        rows=torch.arange(14, device=device),
        own=None,
        window=window,
        most_queries=most_queries,
        most_keys=most_keys,
    )
    query, keys, values = random(4, 4, head_dim), random(14, 2, head_dim), random(14, 2, head_dim)
    try:
        output = attend_packed(query, keys, values, packed, None)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return f"varlen_attn refuses a trial: {str(error).splitlines()[0]}"
    expected = torch.cat(
        [
            _by_definition(query[0:1], keys[:6], values[:6], window),
            _by_definition(query[1:4], keys[6:], values[6:], window),
        ]
    )
    difference = float((output.float() - expected).abs().max())
    return None if difference < _TOLERANCE else f"varlen_attn is off by {difference:.2g} in a trial"


def _by_definition(
    query: torch.Tensor,  # [num_queries, num_heads, head_dim]
    keys: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    values: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    window: int | None,
) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
    positions = torch.arange(len(keys), device=query.device)
    before = positions[len(keys) - len(query) :, None] - positions  # how far a key is before a query
    seen = (before >= 0) & (before < (len(keys) if window is None else window))
    query, keys, values = (each.float().transpose(0, 1)[None] for each in (query, keys, values))
    return scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
