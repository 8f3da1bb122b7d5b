"""How a token is chosen: greedy, or sampled with noise that depends on the request and position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from selectn_core.errors import RequestError

MAX_TEMPERATURE = 2.0
_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request may choose. Raises RequestError, with the field, for a value out of range.

    `temperature` 0 is greedy; `top_k` 0 keeps all tokens; without a `seed` one is drawn. The same seed, prompt
    and parameters give the same tokens whatever else is in the batch.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            math.isfinite(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
            "temperature",
            self.temperature,
            f"0 to {MAX_TEMPERATURE:g}",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, up to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.seed is None or -_SEEDS <= self.seed < _SEEDS, "seed", self.seed, "a 64-bit integer, or null")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def perturb_for_argmax(
    logits: torch.Tensor,  # [num_tokens, vocab_size], float32
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> torch.Tensor:
    """Logits whose argmax is each row's next token: unchanged where greedy, else sampled by the Gumbel-max trick.

    argmax(log p + Gumbel noise) is a draw from p (Gumbel 1954; Maddison, Tarlow & Minka 2014). The noise is
    keyed by (seed, position), so a row's token does not depend on the rows beside it.
    """
    if all(row.is_greedy for row in params):
        return logits
    chosen = logits.clone()
    for i, (row, seed, position) in enumerate(zip(params, seeds, positions, strict=True)):
        if not row.is_greedy:
            chosen[i] = _sampled_row(logits[i : i + 1], row, seed, position)
    return chosen


def _sampled_row(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> torch.Tensor:
    scores = logits / params.temperature  # [1, vocab_size]
    no_tokens = torch.empty(1, 0, dtype=torch.long, device=logits.device)
    if params.top_k:
        scores = TopKLogitsWarper(top_k=params.top_k)(no_tokens, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(top_p=params.top_p)(no_tokens, scores)
    generator = torch.Generator().manual_seed(hash((seed, position)) & (_SEEDS - 1))
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    gumbel = -torch.log(-torch.log(uniform))
    return (scores + gumbel.to(device=scores.device, dtype=scores.dtype))[0]


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise RequestError(f"{field}={value!r} is not allowed: expected {allowed}", field=field)
