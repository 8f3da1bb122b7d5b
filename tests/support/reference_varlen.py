"""What `torch.nn.attention.varlen.varlen_attn` computes, written from its documentation and its kernels' source.

A stand-in for CUDA alone: on a GPU the tests call torch's own. It takes any dtype, as what is not taken is the business
of `attention_path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest
from torch.nn.functional import scaled_dot_product_attention

import selectn_core.batching.attention_path as path_module
import selectn_core.batching.packed_attention as packed_module

_MOST_HEAD_DIM = 256


def varlen_attn(
    query: torch.Tensor,  # [num_queries, num_heads, head_dim]
    key: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    cu_seq_q: torch.Tensor,  # int32 [num_requests + 1]
    cu_seq_k: torch.Tensor | None,  # int32 [num_requests + 1]
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One request at a time. The last query is at the last key: masks are aligned at the bottom right.

    (`col_idx_limit_right = row_idx + 1 + seqlen_k - seqlen_q + window_size_right` in FlashAttention's mask.h.)
    """
    assert cu_seq_k is not None
    assert return_aux is seqused_k is block_table is None, "not written down here"
    _check(query, key, value, enable_gqa)
    for starts, states in ((cu_seq_q, query), (cu_seq_k, key)):
        assert starts.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert starts.is_contiguous()
        assert (int(starts[0]), int(starts[-1])) == (0, len(states))
    assert len(cu_seq_q) == len(cu_seq_k)
    queries, keys, values = (
        torch.tensor_split(states, starts[1:-1].cpu().long())
        for states, starts in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
    )
    assert max_q >= max(map(len, queries)), "queries beyond max_q would not be attended for"
    assert max_k >= max(map(len, keys))
    assert num_splits == 1, "results would depend on the rest of the batch"
    return torch.cat([_one(*each, window_size, scale) for each in zip(queries, keys, values, strict=True)])


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    if not enable_gqa and num_heads != num_kv_heads:
        raise ValueError(f"Expect query and key/value to have the same number of heads but got {num_heads}")
    if num_heads % num_kv_heads != 0:
        raise ValueError("Expect number of query heads to be a multiple of kv heads for GQA")
    assert key.shape == value.shape, "heads of values are as wide as those of keys"
    assert key.shape[2] == head_dim
    if head_dim > _MOST_HEAD_DIM or head_dim % 8:
        raise RuntimeError(f"head dimension {head_dim}")
    assert query.dtype == key.dtype == value.dtype
    assert all(each.stride(-1) == 1 for each in (query, key, value)), "must have contiguous last dimension"


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    left, right = window_size
    row = torch.arange(len(query))[:, None] + len(key) - len(query)
    column = torch.arange(len(key))
    seen = torch.ones(len(query), len(key), dtype=torch.bool)
    if left >= 0:
        seen &= column >= row - left
    if right >= 0:
        seen &= column <= row + right
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    return output[0].transpose(0, 1)


def kernel_branch(arguments: dict[str, Any], num_heads: int, num_kv_heads: int) -> tuple[Any, ...]:
    """What a call's `max_q`, `max_k` and windows decide before a kernel starts: others in the batch may change it.

    From `mha_varlen_fwd` of FlashAttention 2, which torch is built with, and `mha_fwd` of 3, which may be put in its
    place.
    """
    max_q, max_k = arguments["max_q"], arguments["max_k"]
    left, right = arguments["window_size"]
    is_causal = (left, right) == (-1, 0)  # as varlen_attn passes on
    left_2, right_2 = left if left < max_k else -1, right if right < max_k else -1
    packs_groups = max_q == 1 and num_heads > num_kv_heads and left < 0 and right < 0
    left_3, right_3 = left if left < max_k - 1 else -1, right if right < max_q - 1 else -1
    is_causal_3 = is_causal and not (max_q == 1 and (left_3, right_3) == (-1, -1))
    if is_causal_3:
        right_3 = 0
    return (left_2, right_2, is_causal and max_q != 1, packs_groups, left_3, right_3, is_causal_3)


@contextmanager
def packing(attend: Any = varlen_attn) -> Iterator[None]:
    """Meanwhile engines on the CPU take the path that they would take on a GPU, in float32 too, with `attend`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "varlen_attn", attend)
        patch.setattr(path_module, "_refused_device", lambda device: None)
        patch.setattr(path_module, "_DTYPES", (*path_module._DTYPES, torch.float32))
        yield
