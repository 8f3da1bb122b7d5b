"""Rows on a CPU, drawn from in turn: what is kept, how often a token is drawn, and that rows are independent."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from selectn_core.requests.row_sampling import RowSampler
from selectn_core.requests.sampling import SamplingParams, perturb_for_argmax

# Not a multiple of a block, and as large as what is drawn from in turn.
VOCAB_SIZE = 9001
CUTS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_p": 1e-300},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 64},
    {"top_k": 5000},
    {"top_k": 10**12},
    {"top_k": 50, "top_p": 0.5},
    {"top_k": 64, "top_p": 0.999},
    {"top_k": 5000, "top_p": 0.5},
    {},
]


def some_logits(num_rows: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * spread


def drawn(logits: torch.Tensor, params: list[SamplingParams], position: int = 0) -> list[int]:
    chosen_from = perturb_for_argmax(logits.clone(), params, range(len(params)), [position] * len(params))
    return chosen_from.argmax(-1).tolist()


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_tokens_that_are_kept_are_those_that_transformers_keeps(cut: dict[str, Any], spread: float) -> None:
    logits = some_logits(1, spread)
    kept = RowSampler(VOCAB_SIZE).kept_tokens(logits[0] - logits.max(), cut.get("top_k", 0), cut.get("top_p", 1.0))
    scores, no_tokens = logits.double(), torch.empty(1, 0, dtype=torch.long)
    if cut.get("top_k", 0) > 0:
        scores = TopKLogitsWarper(top_k=cut["top_k"])(no_tokens, scores)
    if cut.get("top_p", 1) < 1 and spread:
        scores = TopPLogitsWarper(top_p=cut["top_p"])(no_tokens, scores)
    assert kept.tolist() == (scores[0] > -math.inf).nonzero()[:, 0].tolist()  # of equal ones all


@pytest.mark.parametrize("cut", [{}, {"top_k": 40}, {"top_p": 0.8}, {"top_k": 5000}], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_softmax(cut: dict[str, Any], temperature: float) -> None:
    logits, num_draws = some_logits(1, spread=2.0), 3000
    sampler = RowSampler(VOCAB_SIZE)
    kept = torch.from_numpy(
        sampler.kept_tokens((logits[0] - logits.max()) / temperature, cut.get("top_k", 0), cut.get("top_p", 1.0))
    )
    expected = torch.zeros(VOCAB_SIZE).index_copy(0, kept, (logits[0, kept] / temperature).softmax(-1))
    params = [SamplingParams(temperature=temperature, **cut)] * num_draws
    tokens: list[int] = []
    for first in range(0, num_draws, 100):
        rows = logits.expand(100, -1).clone()
        chosen_from = perturb_for_argmax(rows, params[:100], range(first, first + 100), [5] * 100)
        tokens += chosen_from.argmax(-1).tolist()
    bins = torch.arange(VOCAB_SIZE) % 12
    found = Counter(bins[tokens].tolist())
    wanted = torch.zeros(12).index_add(0, bins, expected) * num_draws
    chi_square = sum((found[i] - float(e)) ** 2 / float(e) for i, e in enumerate(wanted) if e > 0)
    assert set(found) <= set(wanted.nonzero()[:, 0].tolist())
    # 11 degrees of freedom: above 40 in fewer than 1 of 20,000 runs, and the seeds are fixed.
    assert chi_square < 40
    assert set(tokens) <= set(kept.tolist())


def test_a_seed_gives_the_same_token_whatever_is_beside_it() -> None:
    logits = some_logits(len(CUTS) + 1)
    params = [SamplingParams(temperature=1.1, **cut) for cut in CUTS] + [SamplingParams()]
    together = drawn(logits, params)
    for i, row in enumerate(params):
        alone = perturb_for_argmax(logits[i : i + 1].clone(), [row], [i], [0])
        assert int(alone.argmax()) == together[i]
    assert together[-1] == int(logits[-1].argmax()), "a greedy row beside others"
    assert drawn(logits, params, position=1)[:-1] != together[:-1]


def test_what_is_ruled_out_is_never_drawn() -> None:
    sampler, logits = RowSampler(VOCAB_SIZE), torch.full((VOCAB_SIZE,), -math.inf)
    logits[300], logits[8999] = 1.0, 1.0
    for top_k, top_p in ((0, 1.0), (700, 1.0), (0, 0.999999)):
        for uniform in (2.0**-49, 0.25, 0.5 - 2.0**-49):
            assert sampler.draw(logits, temperature=0.5, top_k=top_k, top_p=top_p, uniform=uniform) == 300
        for uniform in (0.5, 0.75, 1 - 2.0**-49):
            assert sampler.draw(logits, temperature=0.5, top_k=top_k, top_p=top_p, uniform=uniform) == 8999


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_own_row_and_in_no_other(value: float) -> None:
    logits, params = some_logits(3), [SamplingParams(temperature=1.0)] * 3
    sound = drawn(logits, params)
    logits[1, 5] = value
    chosen_from = perturb_for_argmax(logits.clone(), params, range(3), [0] * 3)
    assert [int(chosen_from[i].argmax()) for i in (0, 2)] == [sound[0], sound[2]]
    assert not math.isfinite(float(chosen_from[1, chosen_from[1].argmax()]))


@pytest.mark.parametrize("scale", [1.0, 1e37, 7e37])
def test_next_to_no_temperature_takes_the_most_likely_token(scale: float) -> None:
    logits = some_logits(3) * scale
    params = [SamplingParams(temperature=2e-5, **cut) for cut in ({}, {"top_p": 0.5}, {"top_k": 2})]
    assert drawn(logits, params) == logits.argmax(-1).tolist()
