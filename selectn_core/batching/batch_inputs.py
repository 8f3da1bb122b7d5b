"""A step's inputs, laid out over arrays.

Transformers lists every row of the cache that a step reads and writes, one number at a time, in Python. Here the pages
of all requests become rows at once, in the layout that our attention reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import TMP_TOKEN_ID, FutureRequestState, RequestState
from transformers.generation.continuous_batching.utils import stream_context

from selectn_core.batching.attention import Attended, make_segment
from selectn_core.batching.decode_attention import Decodes, alike_in_length
from selectn_core.batching.packed_attention import Packed, longest
from selectn_core.device import Device


class BatchInputs:
    """Prepares the inputs of every step in place of the `ContinuousBatchingIOs` that it is given."""

    def __init__(
        self,
        inputs_and_outputs: ContinuousBatchingIOs,
        cache: PagedAttentionCache,
        device: Device,
        *,
        packed: Collection[str] = (),
    ) -> None:
        """`packed` are the types of attention whose layers attend for all requests in one call."""
        self._io, self._cache, self._device, self._packed = inputs_and_outputs, cache, device, packed
        self._attended: list[Attended] = []  # of every layer
        self._model_kwargs = inputs_and_outputs.get_model_kwargs
        inputs_and_outputs.prepare_batch_tensors = self._prepare
        inputs_and_outputs.get_model_kwargs = self._get_model_kwargs

    def _get_model_kwargs(self, use_padding: bool = False) -> dict[str, Any]:
        kwargs = {**self._model_kwargs(use_padding), "attended": self._attended}
        # On CUDA transformers computes on a stream of its own, and waits there for nothing. Inputs, pages that have
        # moved and swapped KV that has come back are work of the stream that is current here.
        laid_out = self._device.record()
        with stream_context(self._io.compute_stream):
            self._device.wait(laid_out)
        return kwargs

    def _prepare(self, requests_in_batch: list[FutureRequestState], logits_processors: Any, **_: Any) -> None:
        """Lays out the step of these requests, and notes in them that it is under way."""
        io = self._io
        states = [request.state for request in requests_in_batch]
        lengths = [request.query_length for request in requests_in_batch]
        pasts = [state.position_offset for state in states]
        ends = list(accumulate(lengths))
        input_ids = list(chain.from_iterable(state.tokens_to_process for state in states))
        choosing = [end - 1 for end, request in zip(ends, requests_in_batch, strict=True) if request.has_new_token]
        for request, length in zip(requests_in_batch, lengths, strict=True):
            request.state.position_offset += length
            if request.has_new_token:
                request.state.tokens_to_process = [TMP_TOKEN_ID]
        io.requests_in_batch = list(requests_in_batch)
        io.num_request_in_batch = len(requests_in_batch)
        io.num_q_tokens = io.total_seqlen_q = ends[-1]
        io.max_length_q = max(lengths)
        io.use_block_table, io.max_kv_read = False, 0  # nothing is read by the index of transformers
        logits_processors.prepare_tensor_args(requests_in_batch, io._bulk_input_tensor[io.static_inputs :])
        positions = step_positions(lengths, pasts, io.device)
        _fill(io.input_ids, input_ids)
        io.position_ids[: ends[-1]] = positions
        _fill(io.cumulative_seqlens_q, [0, *ends])
        # Requests that get no token have a place there too, after the others; what is computed of it means nothing.
        _fill(io.logits_indices, choosing + [0] * (len(states) - len(choosing)))
        by_type = {
            name: self._attended_by(allocator, states, lengths, pasts, positions)
            for name, allocator in self._cache.cache_allocators.items()
        }
        num_layers = len(self._cache.layer_to_allocator)
        self._attended = [by_type[self._cache.layer_to_allocator[i].layer_type] for i in range(num_layers)]

    def _attended_by(
        self,
        allocator: CacheAllocator,
        states: Sequence[RequestState],
        lengths: Sequence[int],
        pasts: Sequence[int],
        positions: torch.Tensor,
    ) -> Attended:
        """What the layers of one type of attention read and write."""
        tables = [allocator.block_table[state.request_id] for state in states]
        num_keys = [allocator.get_seqlen_k(past, length) for past, length in zip(pasts, lengths, strict=True)]
        self._note_key_lengths(allocator.layer_type, num_keys)
        pages, is_packed = PageRows(allocator, tables, positions.device), allocator.layer_type in self._packed
        return attended(pages, lengths, pasts, num_keys, positions, is_packed=is_packed)

    def _note_key_lengths(self, layer_type: str, num_keys: Sequence[int]) -> None:
        io, ends = self._io, list(accumulate(num_keys))
        _fill(io.cumulative_seqlens_k[layer_type], [0, *ends])
        io.total_seqlen_k[layer_type], io.max_length_k[layer_type] = ends[-1], max(num_keys)


class PageRows:
    """The rows of the cache that requests' pages are, in one type of attention; a page's rows follow each other."""

    def __init__(self, allocator: CacheAllocator, tables: Sequence[Sequence[int]], device: torch.device) -> None:
        """`tables` are the requests' blocks, in the order of their tokens: a block is a page in every layer."""
        self.page_size = allocator.tokens_per_page
        self.window: int | None = getattr(allocator, "sliding_window", None)
        self._trash = allocator.write_trash_index
        blocks = on_device(list(chain.from_iterable(tables)), device)
        self._first_rows = blocks * allocator.block_physical_stride  # of every page
        self._first_pages = [0, *accumulate(len(table) for table in tables)]
        self._in_page = torch.arange(self.page_size, device=device)
        self.device = device

    def written(self, lengths: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Where the keys of a step's tokens go, [num_tokens]; in a window's ring a key takes the oldest one's place."""
        device = self.device
        first_pages = on_device(self._first_pages[:-1], device)
        if len(positions) > len(lengths):
            first_pages = _repeated(first_pages, lengths)
        places = positions if self.window is None else positions % self.window
        rows = self._first_rows[first_pages + places // self.page_size] + places % self.page_size
        if self.window is not None and max(lengths) > self.window:  # only a chunk's last ones find a place
            last = on_device([end - 1 for end in accumulate(lengths)], device)
            number_after = _repeated(last, lengths) - torch.arange(len(positions), device=device)
            rows.masked_fill_(number_after >= self.window, self._trash)
        return rows

    def past(self, request: int, num_past: int) -> torch.Tensor:
        """Where the keys are that the next token's query sees beside its own, in the order of their tokens."""
        first_page, last_page = self._first_pages[request], self._first_pages[request + 1]
        first_rows = self._first_rows[first_page:last_page]
        if self.window is None or num_past < self.window:
            return (first_rows[:, None] + self._in_page).view(-1)[:num_past]
        places = torch.arange(num_past - self.window + 1, num_past, device=first_rows.device) % self.window
        return first_rows[places // self.page_size] + places % self.page_size

    def used(self, requests: Sequence[int], num_keys: Sequence[int]) -> torch.Tensor:
        """Where the first `num_keys` keys of requests are, in the order of their places: [len(requests), most keys].

        Of a window's ring these are all keys that a query sees, its own included, once that is written.
        """
        num_pages = -(-max(num_keys) // self.page_size)
        pages = on_device([self._first_pages[i] for i in requests], self.device)[:, None]
        pages = (pages + torch.arange(num_pages, device=pages.device)).clamp_max_(len(self._first_rows) - 1)
        return (self._first_rows[pages][:, :, None] + self._in_page).view(len(requests), -1)

    def packed(self, lengths: Sequence[int], pasts: Sequence[int], num_keys: Sequence[int]) -> Packed:
        """Where the queries and keys of all requests are: one array goes to the device, the rest is computed there."""
        query_starts, key_starts = [0, *accumulate(lengths)], [0, *accumulate(num_keys)]
        # What to add to a key's number among those of all requests for its position in its own.
        shifts = [
            past + length - number - start
            for past, length, number, start in zip(pasts, lengths, num_keys, key_starts, strict=False)
        ]
        numbers = on_device([query_starts, key_starts, [*shifts, 0], self._first_pages], self.device)
        starts = numbers[:2].to(torch.int32)
        keys = torch.arange(key_starts[-1], device=self.device)
        request = torch.bucketize(keys, numbers[1, 1:], right=True)
        places = keys + numbers[2, request]
        if self.window is not None:
            places %= self.window
        most_queries, most_keys = longest(lengths, num_keys, self.window)
        return Packed(
            query_starts=starts[0],
            key_starts=starts[1],
            rows=self._first_rows[numbers[3, request] + places // self.page_size] + places % self.page_size,
            own=None if self.window is None else self._own_places(numbers, query_starts[-1]),
            window=self.window,
            most_queries=most_queries,
            most_keys=most_keys,
        )

    def _own_places(self, starts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Of a step's tokens among the keys of all requests, [num_tokens]: they are the last of each request's."""
        query_ends, key_ends = starts[0, 1:], starts[1, 1:]
        queries = torch.arange(num_tokens, device=self.device)
        return queries + (key_ends - query_ends)[torch.bucketize(queries, query_ends, right=True)]


def attended(
    pages: PageRows,
    lengths: Sequence[int],
    pasts: Sequence[int],
    num_keys: Sequence[int],
    positions: torch.Tensor,
    *,
    is_packed: bool = False,
) -> Attended:
    """What layers read and write for requests of so many tokens (`lengths`), each after so many others (`pasts`)."""
    starts, write_rows = [0, *accumulate(lengths)], pages.written(lengths, positions)
    if is_packed:
        packed = pages.packed(lengths, pasts, num_keys)
        return Attended(write_rows=write_rows, segments=(), decodes=(), packed=packed)
    return Attended(
        write_rows=write_rows,
        segments=[
            make_segment(starts[i], starts[i + 1], pages.past(i, pasts[i]), sliding_window=pages.window)
            for i, length in enumerate(lengths)
            if length > 1
        ],
        decodes=_decodes(pages, lengths, starts, num_keys),
    )


def _decodes(pages: PageRows, lengths: Sequence[int], starts: Sequence[int], num_keys: Sequence[int]) -> list[Decodes]:
    """The requests with one token, those together that are alike in length."""
    single = [i for i, length in enumerate(lengths) if length == 1]
    groups = []
    for group in alike_in_length([num_keys[i] for i in single]) if single else []:
        requests = [single[i] for i in group]
        mine = [num_keys[i] for i in requests]
        queries = _as_slice([starts[i] for i in requests], pages.device)
        groups.append(Decodes(queries=queries, num_keys=mine, rows=pages.used(requests, mine)))
    return groups


def _as_slice(tokens: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """As an index that needs no copy where tokens follow each other."""
    if tokens[-1] - tokens[0] + 1 == len(tokens):  # they ascend
        return slice(tokens[0], tokens[-1] + 1)
    return on_device(tokens, device)


def step_positions(lengths: Sequence[int], pasts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The positions of a step's tokens in their requests, [num_tokens]."""
    if len(lengths) == sum(lengths):
        return on_device(pasts, device)
    starts = accumulate(lengths[:-1], initial=0)
    before = on_device([past - start for past, start in zip(pasts, starts, strict=True)], device)
    return torch.arange(sum(lengths), device=device) + _repeated(before, lengths)


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64, as long as `numbers`; the host does not wait until a GPU has them."""
    there = torch.tensor(numbers, dtype=torch.int64)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there


def _repeated(each: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Every number as often as its request has tokens, [num_tokens]."""
    # Told how many there will be, it does not ask the device.
    return each.repeat_interleave(on_device(lengths, each.device), output_size=sum(lengths))


def _fill(storage: torch.Tensor, numbers: Sequence[int]) -> None:
    storage[: len(numbers)] = on_device(numbers, storage.device)
