"""The host work of a step as it was, written again in short: the side that `bench_host_work.py` compares with.

It does what the code at commit 7a89e6e did, with nothing around it. Rows of the cache were listed by transformers one
number at a time, free sectors were a sorted list, every row was sampled by itself, and a change of plan waited for all
that the device had been told to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

from selectn_core.device import Event
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.requests.sampling import SamplingParams


def listed_rows(allocator: CacheAllocator, pasts: Sequence[int], read: torch.Tensor, written: torch.Tensor) -> None:
    """Rows of the cache that requests with one token each read and write, into tensors of transformers' size."""
    read_index: list[int] = []
    write_index: list[int] = []
    for request_id, past in zip(allocator.block_table, pasts, strict=True):
        write_index.extend(allocator.get_write_indices(request_id, past, 1))
        read_index.extend(allocator.get_read_indices(request_id, past, 1))
    written[: len(write_index)] = torch.tensor(write_index, dtype=torch.int64)
    read[: len(read_index)] = torch.tensor(read_index, dtype=torch.int64)


class SortedPages:
    """The cache's sectors, a block each, with lists and sets of numbers."""

    def __init__(self, num_sectors: int, tables: dict[str, list[int]]) -> None:
        self.tables = tables
        self.mine = set(range(num_sectors))
        self.free = sorted(self.mine - self.live())

    def live(self) -> set[int]:
        return {block for table in self.tables.values() for block in table}

    def spare(self) -> int:
        """What a unit may take at most: asked before it does."""
        return len(self.mine) - len(self.live())

    def take(self, sectors: range) -> None:
        wanted = set(sectors)
        assert wanted <= self.mine
        outside = sorted(set(self.free) - wanted)
        blocks = sorted(block for block in self.live() if block in wanted)
        self.free = outside
        targets = [self.free.pop() for _ in blocks]
        moved = dict(zip(blocks, targets, strict=True))
        if moved:
            for table in self.tables.values():
                table[:] = [moved.get(block, block) for block in table]
        self.mine -= wanted

    def give(self, sectors: range) -> None:
        new = set(sectors)
        assert not new & self.mine
        self.mine |= new
        self.free = sorted([*self.free, *new])


def sampled_row_by_row(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> torch.Tensor:
    """Logits whose argmax is each row's token: transformers' warpers and a generator for every row."""
    if all(row.is_greedy for row in params):
        return logits
    chosen = logits.clone()
    for i, (row, seed, position) in enumerate(zip(params, seeds, positions, strict=True)):
        scores = logits[i : i + 1] / row.temperature
        no_tokens = torch.empty(1, 0, dtype=torch.long)
        if row.top_k:
            scores = TopKLogitsWarper(top_k=row.top_k)(no_tokens, scores)
        if row.top_p < 1:
            scores = TopPLogitsWarper(top_p=row.top_p)(no_tokens, scores)
        generator = torch.Generator().manual_seed(hash((seed, position)) & ((1 << 63) - 1))
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        chosen[i] = (scores - torch.log(-torch.log(uniform)).to(scores.dtype))[0]
    return chosen


class StoppingExecutor(OverlappedExecutor):
    """A change of plan waits until the device has done everything."""

    def _await_copies(self) -> None:
        self.device.synchronize()

    def _await_arrival(self, copy: Event) -> None:
        copy.synchronize()
