"""Sampling on a CPU: a row after the other, which its cache holds, by one number of (0, 1) for each.

The token is that one at which the probabilities, added up in the tokens' order, exceed the number. Noise for every
token, which a GPU has at once, takes a CPU several times as long.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.floating]
Tokens = npt.NDArray[np.int64]

# A score this far below the largest is as good as none, and exponentials below it would be denormal numbers, which take
# a hundred times as long.
_LEAST_SCORE = -80.0
_LEAST_WEIGHT = 2e-35  # more than its exponential
# Of blocks of so many tokens each, only the sum is looked at to find the one that the drawn token is in.
_SUM_BLOCK = 256
# Of smaller blocks only the largest score is, to find out how large the likeliest tokens' scores are.
_MAX_BLOCK = 32
# So many of the likeliest are looked at for top_p before all are sorted.
_NUM_CANDIDATES = (64, 1024)


class RowSampler:
    """Has the memory that a row takes. `largest` is the largest logit of the last row."""

    def __init__(self, vocab_size: int) -> None:
        self.largest = -math.inf
        self._scores, self._weights = torch.empty(vocab_size), torch.empty(vocab_size)

    def draw(
        self,
        logits: torch.Tensor,  # [vocab_size], float32, in a CPU's memory
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        uniform: float,
    ) -> int | None:
        """The token; None where logits are not finite, and no token is right. `top_k` 0 and `top_p` 1 cut nothing."""
        self.largest = float(logits.amax())
        if not math.isfinite(self.largest):
            return None
        scores = torch.sub(logits, self.largest, out=self._scores)
        if temperature != 1:
            scores /= temperature
        if top_k == 0 and top_p >= 1:
            return _drawn_of_all(scores.clamp_min_(_LEAST_SCORE).exp_(), uniform)
        tokens = self.kept_tokens(scores, top_k, top_p)
        weights = np.exp(scores.numpy()[tokens])
        return int(tokens[_where(weights.cumsum(dtype=np.float64), uniform)])

    def kept_tokens(self, scores: torch.Tensor, top_k: int, top_p: float) -> Tokens:  # [num_kept], ascending
        """What top_k and then top_p keep of a row of scores, 0 at the largest, with all as likely as the last of it."""
        vocab_size = len(scores)
        is_by_number = 0 < top_k < vocab_size
        if top_p >= 1 and not is_by_number:
            return np.arange(vocab_size)
        weights = torch.clamp_min(scores, _LEAST_SCORE, out=self._weights).exp_() if not is_by_number else None
        total = float(_sums(weights).sum(dtype=np.float64)) if weights is not None else None
        for number in (top_k,) if is_by_number else (*_NUM_CANDIDATES, vocab_size):
            tokens = _likeliest(scores, number)
            candidates = scores.numpy()[tokens]
            least = _least_kept(candidates, number if number in (top_k, vocab_size) else None, top_p, total)
            if least is not None:
                break
        return tokens[candidates >= least]


def _drawn_of_all(weights: torch.Tensor, uniform: float) -> int:
    ends = _sums(weights).cumsum(dtype=np.float64)
    block = _where(ends, uniform)
    left = uniform * ends[-1] - (ends[block - 1] if block else 0.0)
    first = block * _SUM_BLOCK
    of_block = weights.numpy()[first : first + _SUM_BLOCK]
    within = (of_block * (of_block > _LEAST_WEIGHT)).cumsum(dtype=np.float64)
    return first + _where(within, left / within[-1])


def _sums(weights: torch.Tensor) -> Floats:
    """Of every block of weights, the shorter one at the end included."""
    whole = len(weights) - len(weights) % _SUM_BLOCK
    sums = weights[:whole].view(-1, _SUM_BLOCK).sum(-1).numpy()
    return sums if whole == len(weights) else np.append(sums, weights[whole:].sum().numpy())


def _where(ends: Floats, uniform: float) -> int:
    """The first place at which what is added up to there exceeds this part of all."""
    place = int(ends.searchsorted(uniform * ends[-1], side="right"))
    return place if place < len(ends) else int(ends.searchsorted(ends[-1]))  # after that nothing is added


def _likeliest(scores: torch.Tensor, number: int) -> Tokens:
    """Tokens, ascending, among which are so many of the likeliest, and all that are as likely as the last of these.

    The largest scores of as many blocks are so many scores: none that is below all of them is wanted.
    """
    vocab_size = len(scores)
    whole = vocab_size - vocab_size % _MAX_BLOCK
    num_blocks = whole // _MAX_BLOCK
    if number >= num_blocks:
        return np.arange(vocab_size)
    largest = scores[:whole].view(-1, _MAX_BLOCK).amax(-1).numpy()
    bound = np.partition(largest, num_blocks - number)[num_blocks - number]
    blocks = np.flatnonzero(largest >= bound)
    tokens = (blocks[:, None] * _MAX_BLOCK + np.arange(_MAX_BLOCK)).ravel()
    tokens = np.append(tokens, np.arange(whole, vocab_size))
    return tokens[scores.numpy()[tokens] >= bound]


def _least_kept(candidates: Floats, top_k: int | None, top_p: float, total: float | None) -> np.floating | None:
    """The least score that is kept; None where it may be further down than these candidates, which are the likeliest.

    `total` is what all weights add up to, None: those of the first `top_k`.
    """
    ranked = np.sort(candidates)[::-1][:top_k]
    if top_p >= 1:
        return ranked[-1]
    weights = np.exp(np.maximum(ranked, _LEAST_SCORE))
    ends = weights.cumsum(dtype=np.float64)
    num_kept = max(1, int((ends - weights < top_p * (ends[-1] if total is None else total)).sum()))
    return ranked[num_kept - 1] if num_kept < len(ranked) or top_k is not None else None
