"""A paged cache of one layer, filled with the keys of requests, and attention to it by the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from selectn_core.batching.attention import Attended, varlen_attention
from selectn_core.batching.batch_inputs import PageRows, attended, step_positions

TRASH_PAGES = 2
CPU = torch.device("cpu")


class FirstLayer(nn.Module):
    layer_idx = 0


@dataclass(kw_only=True)
class PagedRequests:
    """Requests of a step, each with (tokens, keys before them), whose keys and values of before are in a cache.

    What is in the cache and is no key of theirs is NaN.
    """

    requests: Sequence[tuple[int, int]]
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int = 4
    window: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    seed: int = 0
    keys: list[torch.Tensor] = field(init=False)  # of every request [num_kv_heads, past + tokens, head_dim]
    values: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.keys = [self.random(self.num_kv_heads, sum(request), self.head_dim) for request in self.requests]
        self.values = [self.random(self.num_kv_heads, sum(request), self.value_dim) for request in self.requests]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)

    def new(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The step's own, [1, num_kv_heads, num_tokens, dim]."""
        own = [each[:, past:] for each, (_, past) in zip(states, self.requests, strict=True)]
        return torch.cat(own, dim=1)[None]

    def attend(self, query: torch.Tensor, *, is_packed: bool = False, **kwargs: Any) -> torch.Tensor:
        """By `varlen_attention`: [num_tokens, num_heads, value_dim]."""
        return self.attend_and_write(query, is_packed=is_packed, **kwargs)[0]

    def attend_and_write(
        self, query: torch.Tensor, *, is_packed: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """As `attend`, and the cache's keys and values after it."""
        layer = FirstLayer()
        cache, step = self.cache_and_step(is_packed=is_packed)
        output, _ = varlen_attention(
            layer, query, self.new(self.keys), self.new(self.values), None, cache=cache, attended=[step], **kwargs
        )
        return output[0], cache.layer_to_allocator[0]._kv_token_views[0]

    def cache_and_step(self, *, is_packed: bool = False) -> tuple[Any, Attended]:
        cache, tables = self.cache_and_tables()
        return cache, self.step(cache, tables, is_packed=is_packed)

    def step(self, cache: Any, tables: Sequence[Sequence[int]], *, is_packed: bool = False) -> Attended:
        lengths, pasts = [n for n, _ in self.requests], [past for _, past in self.requests]
        seen = [past if self.window is None else min(past, self.window - 1) for past in pasts]
        num_keys = [length + past for length, past in zip(lengths, seen, strict=True)]
        positions = step_positions(lengths, pasts, self.device)
        pages = PageRows(cache.layer_to_allocator[0], tables, self.device)
        return attended(pages, lengths, pasts, num_keys, positions, is_packed=is_packed)

    def cache_and_tables(self) -> tuple[Any, list[list[int]]]:
        """Keys and values of before, and every request's pages."""
        pasts = [past for _, past in self.requests]
        places = [sum(request) if self.window is None else min(sum(request), self.window) for request in self.requests]
        num_pages = [-(-number // self.page_size) for number in places]
        generator = torch.Generator().manual_seed(self.seed)
        order = (torch.randperm(sum(num_pages), generator=generator) + TRASH_PAGES).tolist()
        tables = [[order.pop() for _ in range(number)] for number in num_pages]
        allocator = SimpleNamespace(
            tokens_per_page=self.page_size,
            block_physical_stride=self.page_size,
            write_trash_index=self.page_size,
            sliding_window=self.window,
        )
        num_rows = (sum(num_pages) + TRASH_PAGES) * self.page_size
        width = max(self.head_dim, self.value_dim)
        shape = (num_rows, self.num_kv_heads, width)
        views = tuple(torch.full(shape, torch.nan, dtype=self.dtype, device=self.device) for _ in range(2))
        for table, past, *states in zip(tables, pasts, self.keys, self.values, strict=True):
            positions = torch.arange(max(0, past - (self.window or past)), past)
            slots = positions if self.window is None else positions % self.window
            rows = torch.tensor(table)[slots // self.page_size] * self.page_size + slots % self.page_size
            for view, each in zip(views, states, strict=True):
                view[rows] = pad(each[:, positions], (0, width - each.shape[-1])).transpose(0, 1)
        allocator._kv_token_views = {0: views}
        return SimpleNamespace(layer_to_allocator={0: allocator}), tables

    def attend_by_definition(
        self, query: torch.Tensor, *, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One query of one request at a time, in float32: [num_tokens, num_heads, value_dim]."""
        rows: list[torch.Tensor] = []
        groups = query.shape[1] // self.num_kv_heads
        for (num_tokens, past), keys, values in zip(self.requests, self.keys, self.values, strict=True):
            keys, values = (each.float().repeat_interleave(groups, dim=0) for each in (keys, values))
            for last in range(past, past + num_tokens):
                first = 0 if self.window is None else max(0, last - self.window + 1)
                one = query[0, :, len(rows)].float()
                scores = torch.einsum("hd,hkd->hk", one, keys[:, first : last + 1]) / self.head_dim**0.5
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                weights = scores.exp()
                total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None])
                rows.append(torch.einsum("hk,hkd->hd", weights / total, values[:, first : last + 1]))
        return torch.stack(rows)
