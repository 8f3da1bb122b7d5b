"""Attention of one layer on a GPU: all requests in one call against a call for each, and which kernels they start.

Without a CUDA device it says so and measures nothing. The layer is one of Llama-3-8B's in bfloat16, with its keys in
pages of 16 tokens. The two sides alternate. A time is the host's, from the layer's call until the device is done: it
has gathering and starting kernels in it, which is most of what many small calls cost.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Check, finish, parse_arguments, table
from selectn_core.batching.attention import varlen_attention
from selectn_core.batching.batch_inputs import PageRows, attended, step_positions

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
PATHS = ("packed", "by_request")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests of a step as (tokens, keys before them)."""

    name: str
    requests: Sequence[tuple[int, int]]


BATCHES = (
    Batch(name="1 decode, 2,048 keys", requests=[(1, 2047)]),
    Batch(name="8 decodes, 2,048 keys", requests=[(1, 2047)] * 8),
    Batch(name="32 decodes, 512 keys", requests=[(1, 511)] * 32),
    Batch(name="32 decodes, 2,048 keys", requests=[(1, 2047)] * 32),
    Batch(name="31 decodes and a chunk", requests=[(1, 2047)] * 31 + [(512, 1024)]),
    Batch(name="1 decode, 32,768 keys", requests=[(1, 32767)]),
)


class Layer(nn.Module):
    layer_idx = 0


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not torch.cuda.is_available():
        print(f"no CUDA device: nothing was measured (torch {torch.__version__})")
        return 0
    device, num_rounds = torch.device("cuda", torch.cuda.current_device()), 20 if arguments.quick else 100
    samples = [_sample(batch, device, torch.bfloat16, num_rounds) for batch in BATCHES]
    rows = [
        [s["batch"], *(f"{s[f'{path}_us']:.0f} ({s[f'{path}_spread_us']:.0f})" for path in PATHS), f"{s['ratio']:.2f}"]
        for s in samples
    ]
    print(table(("batch", "packed, us (spread)", "by request, us (spread)", "ratio"), rows))
    for sample in samples:
        for path in PATHS:
            print(f"{sample['batch']}, {path}: {', '.join(sample[f'{path}_kernels'])}")
    checks = [
        Check(name=f"{s['batch']}: packed over by request", value=s["ratio"], target="<= 1.0", is_timed=True)
        for s in samples
        if len(s["requests"]) > 1
    ]
    return finish(arguments, "measured", samples, checks)


def _sample(batch: Batch, device: torch.device, dtype: torch.dtype, num_rounds: int) -> dict[str, Any]:
    attend = {path: _attention(batch, device, dtype, is_packed=path == "packed") for path in PATHS}
    kernels = {path: _kernels(attend[path], device) for path in PATHS}
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(num_rounds):
        for path in PATHS:
            times[path].append(_seconds(attend[path], device) * 1e6)
    quartiles = {path: statistics.quantiles(times[path], n=4) for path in PATHS}
    return {
        "batch": batch.name,
        "requests": list(batch.requests),
        **{f"{path}_us": quartiles[path][1] for path in PATHS},
        **{f"{path}_spread_us": quartiles[path][2] - quartiles[path][0] for path in PATHS},
        **{f"{path}_kernels": kernels[path] for path in PATHS},
        "ratio": quartiles["packed"][1] / quartiles["by_request"][1],
    }


def _attention(batch: Batch, device: torch.device, dtype: torch.dtype, *, is_packed: bool) -> Callable[[], Any]:
    """One layer's attention over a cache of its own, whose pages lie in any order."""
    lengths, pasts = [length for length, _ in batch.requests], [past for _, past in batch.requests]
    num_keys = [length + past for length, past in batch.requests]
    num_pages = [-(-number // PAGE_SIZE) for number in num_keys]
    order = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[order.pop() for _ in range(number)] for number in num_pages]
    rows = (sum(num_pages) * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    views = tuple(torch.randn(rows, dtype=dtype, device=device) for _ in range(2))
    allocator = SimpleNamespace(
        tokens_per_page=PAGE_SIZE, block_physical_stride=PAGE_SIZE, write_trash_index=0, _kv_token_views={0: views}
    )
    positions = step_positions(lengths, pasts, device)
    step = attended(PageRows(allocator, tables, device), lengths, pasts, num_keys, positions, is_packed=is_packed)
    query, key, value = (
        torch.randn(1, num_heads, sum(lengths), HEAD_DIM, dtype=dtype, device=device)
        for num_heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    layer, cache = Layer(), SimpleNamespace(layer_to_allocator={0: allocator})
    return lambda: varlen_attention(layer, query, key, value, None, cache=cache, attended=[step])


def _kernels(attend: Callable[[], Any], device: torch.device) -> list[str]:
    """Names of the kernels of attention, each with how often it is started; cut to what tells them apart."""
    attend()
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as profiled:
        attend()
        _wait(device)
    found = {each.key: each.count for each in profiled.key_averages()}
    wanted = ("flash", "fmha", "attention", "attn", "sdp")
    return [f"{count}x {name[:60]}" for name, count in found.items() if any(word in name.lower() for word in wanted)]


def _seconds(attend: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started_s = time.perf_counter()
    attend()
    _wait(device)
    return time.perf_counter() - started_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
