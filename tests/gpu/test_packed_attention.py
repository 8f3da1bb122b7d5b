"""One call of torch's varlen_attn for all requests, on a real GPU: what it computes, and that nothing waits for it.

`tests/unit/batching/test_packed_attention.py` has the same cases on the CPU, with a reference in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from selectn_core.batching import KvShape
from selectn_core.batching.attention import varlen_attention
from selectn_core.batching.attention_path import attention_path
from tests.support.engines import engine_config, generate
from tests.support.paged_attention import FirstLayer, PagedRequests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="FlashAttention wants compute capability 8.0",
    ),
]
CUDA = torch.device("cuda", 0)
NUM_KV_HEADS, GROUPS = 2, 4
# Fresh prompts, chunks behind other keys, decodes short and long; more than a tile of queries, and of keys.
REQUESTS = [(1, 0), (300, 0), (1, 17), (70, 500), (1, 1030), (5, 3), (129, 128), (1, 255)]


def requests_of(
    requests: list[tuple[int, int]], dtype: torch.dtype, head_dim: int, window: int | None
) -> PagedRequests:
    return PagedRequests(
        requests=requests,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        value_dim=head_dim,
        page_size=16,
        window=window,
        dtype=dtype,
        device=CUDA,
    )


def query_of(packed: PagedRequests) -> torch.Tensor:
    num_tokens = sum(length for length, _ in packed.requests)
    return packed.random(1, NUM_KV_HEADS * GROUPS, num_tokens, packed.head_dim)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 100, 4096])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 256])


@DTYPES
@WINDOWS
@HEAD_DIMS
def test_it_is_taken(dtype, window, head_dim) -> None:
    path = attention_path(CUDA, dtype, KvShape(num_heads=NUM_KV_HEADS, head_dim=head_dim), window)
    assert (path.name, path.reason) == ("packed", None)


def test_float32_goes_by_request() -> None:
    path = attention_path(CUDA, torch.float32, KvShape(num_heads=2, head_dim=64), None)
    assert (path.name, path.reason) == ("by_request", "varlen_attn takes no torch.float32")


@DTYPES
@WINDOWS
@HEAD_DIMS
def test_equals_a_call_for_each_request(dtype, window, head_dim) -> None:
    packed = requests_of(REQUESTS, dtype, head_dim, window)
    query = query_of(packed)
    output, by_request = (packed.attend(query, is_packed=is_packed) for is_packed in (True, False))
    torch.testing.assert_close(output, by_request, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(output.float(), packed.attend_by_definition(query), rtol=2e-2, atol=2e-2)


def test_values_narrower_than_keys() -> None:
    packed = PagedRequests(
        requests=REQUESTS, num_kv_heads=2, head_dim=192, value_dim=128, dtype=torch.bfloat16, device=CUDA
    )
    query = packed.random(1, 2, sum(length for length, _ in REQUESTS), 192)
    output = packed.attend(query, is_packed=True)
    torch.testing.assert_close(output.float(), packed.attend_by_definition(query), rtol=2e-2, atol=2e-2)


@DTYPES
@WINDOWS
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_a_request_does_not_depend_on_those_beside_it(dtype, window, head_dim) -> None:
    """To the last bit: alone, beside one like it, and beside others that are longer."""
    packed = requests_of(REQUESTS, dtype, head_dim, window)
    query = query_of(packed)
    together, start = packed.attend(query, is_packed=True), 0
    for i, (length, past) in enumerate(REQUESTS):
        alone = requests_of([(length, past)], dtype, head_dim, window)
        alone.keys, alone.values = [packed.keys[i]], [packed.values[i]]
        output = alone.attend(query[:, :, start : start + length], is_packed=True)
        assert torch.equal(output, together[start : start + length]), f"request {i}: {length} after {past}"
        start += length


@contextmanager
def no_waiting() -> Iterator[None]:
    """Meanwhile the host must not wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@WINDOWS
def test_the_host_waits_for_nothing(window) -> None:
    """Neither when a step is laid out nor when a layer attends."""
    packed = requests_of(REQUESTS, torch.bfloat16, 64, window)
    query, (cache, tables) = query_of(packed), packed.cache_and_tables()
    keys, values, layer = packed.new(packed.keys), packed.new(packed.values), FirstLayer()
    with no_waiting():
        step = packed.step(cache, tables, is_packed=True)
        varlen_attention(layer, query, keys, values, None, cache=cache, attended=[step])


def test_a_layer_starts_one_attention_kernel() -> None:
    packed = requests_of(REQUESTS, torch.bfloat16, 128, None)
    query = query_of(packed)
    packed.attend(query, is_packed=True)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        packed.attend(query, is_packed=True)
        torch.cuda.synchronize()
    flash = [(each.key, each.count) for each in profiled.key_averages() if "flash" in each.key.lower()]
    assert [count for _, count in flash] == [1], flash


@DTYPES
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen2_moe"])
def test_tokens_with_offloading_are_those_without(family, dtype) -> None:
    tokens = [generate(family, engine_config(k, 1, kind="cuda"), dtype=dtype) for k in (0, 3)]
    assert tokens[0] == tokens[1]
