"""How a token is chosen: greedy, or sampled with noise that depends on the request and position alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from selectn_core.errors import RequestError
from selectn_core.requests.row_sampling import RowSampler
from selectn_core.requests.sampling_ranges import RANGES

# Below it the most likely token is taken: scores that differ by less than this are rounding.
MIN_TEMPERATURE = 1e-5
# Of a row's tokens, so many are looked at before all are sorted, which takes ten times as long on a CPU.
_NUM_CANDIDATES = 1024
# Of smaller vocabularies a CPU's cache holds several rows, and an operation costs more than what it does.
_LEAST_IN_TURN = 8192
_MOST = torch.finfo(torch.float32).max
# A 32-bit finaliser with next to no bias (Chris Wellons, "Prospecting for Hash Functions", 2018).
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_SHIFTS = (16, 15, 16)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request may choose. Raises RequestError, with the field, for a value out of range.

    `temperature` 0 is greedy, and so is all below 1e-5; `top_k` 0 keeps all tokens, and so does one as large as the
    vocabulary. A `seed` is any 64-bit integer; without one it is drawn. The same seed, prompt and parameters give the
    same tokens whatever else is in the batch.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field, number in RANGES.items():
            value = getattr(self, field)
            if not number.allows(value):
                raise RequestError(f"{field}={value!r} is not allowed: expected {number.allowed}", field=field)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def is_truncated(self) -> bool:
        """Whether it samples from the most likely tokens only."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


def perturb_for_argmax(
    logits: torch.Tensor,  # [num_rows, vocab_size], float32; rows that are drawn from may be overwritten
    params: Sequence[SamplingParams],  # of the first rows
    seeds: Sequence[int],
    positions: Sequence[int],
) -> torch.Tensor:
    """Logits whose argmax is each row's next token: unchanged where greedy, else sampled by the Gumbel-max trick.

    argmax(log p + Gumbel noise) is a draw from p (Gumbel 1954; Maddison, Tarlow & Minka 2014). The noise is
    a hash of seed, position and token: a row's token does not depend on the rows beside it. All rows are computed at
    once, where the logits are; or, in a CPU's memory and with a large vocabulary, in turn and by one hash of seed and
    position each (`row_sampling`). A row with logits that are not finite has a chosen value that is not finite either.
    """
    sampled = [i for i, row in enumerate(params) if not row.is_greedy]
    if not sampled:
        return logits
    if logits.device.type == "cpu" and logits.shape[-1] >= _LEAST_IN_TURN:
        _draw_in_turn(logits, {i: params[i] for i in sampled}, seeds, positions)
        return logits
    rows = torch.tensor(sampled, device=logits.device)
    chosen = [params[i] for i in sampled]
    scores = _tempered(logits[rows], [row.temperature for row in chosen])
    _truncate(scores, chosen)
    scores += _gumbel_noise([_key(seeds[i], positions[i]) for i in sampled], scores)
    return scores if len(sampled) == len(logits) else logits.index_copy(0, rows, scores)


def _draw_in_turn(
    logits: torch.Tensor, params: Mapping[int, SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> None:
    """Raises the drawn token's logit above all others of its row."""
    sampler, rows, array = RowSampler(logits.shape[-1]), logits.unbind(), logits.numpy()
    for i, row in params.items():
        uniform = _uniform(seeds[i], positions[i])
        token = sampler.draw(rows[i], temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, uniform=uniform)
        if token is not None:
            above = 2 * abs(sampler.largest) + 1
            if above > _MOST:
                array[i] = -math.inf
                above = 0.0
            array[i, token] = above


def _tempered(logits: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """Logits over their temperatures, 0 at each row's largest: nothing overflows upwards. Works in place."""
    logits -= logits.amax(-1, keepdim=True)
    logits /= _column(temperatures, logits)
    return logits


def _truncate(scores: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Rules out, in place, what top_k and then top_p leave out; tokens as likely as the last one kept are kept."""
    vocab_size = scores.shape[-1]
    cut = [i for i, row in enumerate(params) if 0 < row.top_k < vocab_size or row.top_p < 1]
    if not cut:
        return
    rows = torch.tensor(cut, device=scores.device)
    cut_scores = scores[rows]
    top_k = _column([min(params[i].top_k or vocab_size, vocab_size) for i in cut], scores)
    top_p = _column([params[i].top_p if params[i].top_p < 1 else math.inf for i in cut], scores)
    least = _least_kept(cut_scores, top_k, top_p)
    scores.index_copy_(0, rows, cut_scores.masked_fill_(cut_scores < least, -math.inf))


def _least_kept(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:  # [num_rows, 1]
    """The score of the last token that is kept. Most rows need a few candidates only; each decides for itself."""
    least, is_enough = _least_among(scores, min(_NUM_CANDIDATES, scores.shape[-1]), top_k, top_p)
    others = (~is_enough).nonzero()[:, 0]
    if len(others):
        least[others] = _least_among(scores[others], scores.shape[-1], top_k[others], top_p[others])[0]
    return least


def _least_among(
    scores: torch.Tensor,  # [num_rows, vocab_size], 0 at each row's largest
    num_candidates: int,
    top_k: torch.Tensor,  # [num_rows, 1]
    top_p: torch.Tensor,  # [num_rows, 1]
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows, 1], [num_rows]
    """Of the likeliest candidates, the score of the last one that is kept; and whether there were enough of them."""
    candidates = scores.topk(num_candidates, dim=-1).values  # descending
    weights = candidates.exp()
    ranks = torch.arange(num_candidates, device=scores.device)
    weights.masked_fill_(ranks >= top_k, 0.0)
    total = torch.where(top_k <= num_candidates, weights.sum(-1, keepdim=True), scores.exp().sum(-1, keepdim=True))
    before = weights.cumsum(-1) - weights
    kept = ((before < top_p * total) & (ranks < top_k)).sum(-1, keepdim=True).clamp_min(1)  # [num_rows, 1]
    ends_here = (kept < num_candidates) & (top_k >= scores.shape[-1])
    return candidates.gather(-1, kept - 1), ((top_k <= num_candidates) | ends_here)[:, 0]


def _gumbel_noise(keys: Sequence[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """Noise [num_rows, vocab_size]: of every token a hash of its number and its row's key, in 31 bits.

    The hash is taken for v of -log(-log(1 - v)): its fine end is where noise is large, and noise that is large wins.
    """
    factors, offsets = (
        torch.tensor(column, dtype=torch.int32, device=like.device)[:, None] for column in zip(*keys, strict=True)
    )
    bits = torch.arange(like.shape[-1], dtype=torch.int32, device=like.device) * factors
    bits += offsets
    for i, shift in enumerate(_SHIFTS):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)  # a shift of an unsigned number
        if i < len(_FACTORS):
            bits *= _FACTORS[i]
    uniform = (bits & 0x7FFFFFFF).to(torch.float32)
    uniform += 0.5
    uniform *= 2.0**-31
    uniform.clamp_max_(1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _key(seed: int, position: int) -> tuple[int, int]:
    """An odd factor and an offset, 32 bits each and signed. Seeds are told apart to their last bit."""
    digest = _digest(seed, position)
    factor, offset = (int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:]))
    return factor | 1, offset


def _uniform(seed: int, position: int) -> float:
    """A number of (0, 1), with 48 bits."""
    return (int.from_bytes(_digest(seed, position)[:6], "little") + 0.5) * 2.0**-48


def _digest(seed: int, position: int) -> bytes:
    both = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
    return hashlib.blake2b(both, digest_size=8).digest()


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:  # [len(values), 1]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
