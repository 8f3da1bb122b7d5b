"""Attention of requests with one query each, over keys and values where they lie in the cache, all requests at once.

Gathering them first, for every layer, takes several times as long on a CPU as attending to them. Scores are a product
of queries and keys computed only where a query has a key (a sparse matrix, whose rows are heads of requests and whose
columns are rows of the cache), and the output is a weighted sum of rows of the cache by number (an embedding bag). Both
take every row for itself: what a request gets does not depend on which others are there, to the last bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# The softmax of a row adds up whole vectors: rows padded to a multiple of any vector's length give the same sums.
_LANES = 16
# Scores of requests are padded to one width while that makes at most this many times as many of them.
_MOST_PADDING = 2
_SUM = 0  # what an embedding bag does, by its number


@dataclass(frozen=True, kw_only=True, eq=False)
class Decodes:
    """Requests with one query each, and where in the cache their keys are, the query's own included.

    `queries` says which of the step's tokens they are. Of `rows` [num_requests, at least the most keys] those beyond a
    request's `num_keys` mean nothing.
    """

    queries: slice | torch.Tensor
    num_keys: Sequence[int]
    rows: torch.Tensor  # int64
    _scores: dict[tuple[int, int], SparseScores] = field(default_factory=dict, init=False)

    def scores(self, num_heads: int, num_kv_heads: int) -> SparseScores:
        """Where this many heads have scores: the same in every layer of a kind."""
        heads = (num_heads, num_kv_heads)
        if heads not in self._scores:
            self._scores[heads] = SparseScores(self, *heads)
        return self._scores[heads]


class SparseScores:
    """A score for every key of every head of every request: a row of a sparse matrix for each head of each request."""

    def __init__(self, decodes: Decodes, num_heads: int, num_kv_heads: int) -> None:
        rows, device, most_keys = decodes.rows, decodes.rows.device, max(decodes.num_keys)
        num_keys = torch.tensor(decodes.num_keys, device=device)
        width = -(-most_keys // _LANES) * _LANES
        kv_head = torch.arange(num_heads, device=device) // (num_heads // num_kv_heads)
        columns = torch.zeros(len(rows), num_heads, width, dtype=torch.int32, device=device)
        torch.add((rows[:, None, :most_keys] * num_kv_heads), kv_head[:, None], out=columns[..., :most_keys])
        is_key = (torch.arange(width, device=device) < num_keys[:, None])[:, None, :].expand_as(columns)
        # Where the scores are among those of all heads padded to one width, in turn: [num_scores].
        self._places = is_key.reshape(-1).nonzero()[:, 0]
        self.columns = columns.view(-1)[self._places]
        self.starts = torch.zeros(len(rows) * num_heads + 1, dtype=torch.int32, device=device)
        torch.cumsum(num_keys.repeat_interleave(num_heads), 0, out=self.starts[1:])
        self._padded = torch.full((len(self.starts) - 1, width), -torch.inf, device=device)
        self._values = torch.zeros(len(self.columns), device=device)
        # Layers see the cache from other places on, so that it ends sooner for some: no row after the last key counts.
        self._num_columns = int(self.columns.max()) + 1
        self._matrix = torch.sparse_csr_tensor(
            self.starts,
            self.columns,
            self._values,
            (len(self.starts) - 1, self._num_columns),
            check_invariants=False,
        )

    def of(self, query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores [num_scores] of `query` [num_requests * num_heads, head_dim] and `keys` [num_columns, head_dim]."""
        self._values.zero_()  # they are multiplied by 0 and added, and may be NaN
        columns = keys[: self._num_columns].T
        torch.sparse.sampled_addmm(self._matrix, query, columns, beta=0.0, alpha=scale, out=self._matrix)
        return self._values

    def softmax(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Weights [num_scores]; `sinks` [num_rows] are scores that take their part and have no value."""
        padded = self._padded
        padded.view(-1).index_copy_(0, self._places, scores)
        if sinks is None:
            return padded.softmax(-1).view(-1).index_select(0, self._places)
        first = padded.new_full((len(padded), _LANES), -torch.inf)
        first[:, 0] = sinks
        weights = torch.cat([first, padded], dim=-1).softmax(-1)[:, _LANES:]
        return weights.reshape(-1).index_select(0, self._places)

    def sum(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Of every row of scores the weighted sum [num_rows, value_dim] of `values` [num_columns, value_dim]."""
        bags: torch.Tensor = torch.embedding_bag(
            values, self.columns, self.starts[:-1], scale_grad_by_freq=False, mode=_SUM, per_sample_weights=weights
        )[0]
        return bags


def can_attend_in_place(keys: torch.Tensor) -> bool:
    """Whether `attend_in_place` does it where these keys are, and in their dtype."""
    is_cpu = keys.device.type == "cpu" and torch.backends.mkl.is_available()  # which multiplies sparse matrices
    return is_cpu and keys.dtype == torch.float32 and keys.shape[0] * keys.shape[1] < 1 << 31


def attend_in_place(
    query: torch.Tensor,  # [num_requests, num_heads, head_dim]
    keys: torch.Tensor,  # [num_rows, num_kv_heads, width], the cache's
    values: torch.Tensor,  # [num_rows, num_kv_heads, width], the cache's
    decodes: Decodes,
    scaling: float | None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> torch.Tensor:  # [num_requests, num_heads, width]
    """Attention of `decodes`, whose own keys and values are in the cache already."""
    num_requests, num_heads, head_dim = query.shape
    num_kv_heads, width = keys.shape[1:]
    if width != head_dim:  # what keys are padded with is 0
        query = torch.nn.functional.pad(query, (0, width - head_dim))
    scores = decodes.scores(num_heads, num_kv_heads)
    logits = scores.of(
        query.reshape(-1, width), keys.view(-1, width), scaling if scaling is not None else head_dim**-0.5
    )
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    weights = scores.softmax(logits, None if sinks is None else sinks.float().repeat(num_requests))
    return scores.sum(weights, values.view(-1, width)).view(num_requests, num_heads, width)


def alike_in_length(num_keys: Sequence[int]) -> list[list[int]]:
    """Which requests to attend for together: all, unless padding to the longest would take far more than there is."""
    if max(num_keys) * len(num_keys) <= _MOST_PADDING * sum(num_keys):
        return [list(range(len(num_keys)))]
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(num_keys):
        groups.setdefault(number.bit_length(), []).append(i)
    return list(groups.values())


def _warn_now() -> None:
    """Has torch say that its sparse tensors are new, which it does once, to nobody."""
    with warnings.catch_warnings(action="ignore"):
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


_warn_now()
