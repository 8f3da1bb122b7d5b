"""Sampling: greedy is untouched, seeds do not depend on the batch, and draws follow the distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from selectn_core.errors import RequestError
from selectn_core.sampling import SamplingParams, perturb_for_argmax

GREEDY = SamplingParams()
VOCAB_SIZE = 12


def some_logits(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: torch.Tensor, params: SamplingParams, seed: int, position: int = 0) -> int:
    return int(perturb_for_argmax(logits, [params], [seed], [position]).argmax())


def test_an_all_greedy_batch_is_not_touched() -> None:
    logits = some_logits(3)
    assert perturb_for_argmax(logits, [GREEDY] * 3, [1, 2, 3], [0, 0, 0]) is logits


def test_greedy_rows_beside_sampled_ones_are_not_touched() -> None:
    logits = some_logits(3)
    before = logits.clone()
    sampled = SamplingParams(temperature=1.0)
    chosen = perturb_for_argmax(logits, [GREEDY, sampled, GREEDY], [1, 2, 3], [0, 0, 0])
    assert torch.equal(chosen[[0, 2]], before[[0, 2]])
    assert not torch.equal(chosen[1], before[1])
    assert torch.equal(logits, before)


def test_a_seed_gives_the_same_token_whatever_is_beside_it() -> None:
    logits, params = some_logits(4), SamplingParams(temperature=1.3, top_p=0.9)
    together = perturb_for_argmax(logits, [params] * 4, [11, 22, 33, 44], [5, 6, 7, 8]).argmax(-1).tolist()
    alone = [
        draw(logits[i : i + 1], params, seed, position)
        for i, (seed, position) in enumerate(zip([11, 22, 33, 44], [5, 6, 7, 8], strict=True))
    ]
    assert together == alone


def test_seed_and_position_both_change_the_noise() -> None:
    logits, params = torch.zeros(1, VOCAB_SIZE), SamplingParams(temperature=1.0)
    assert len({draw(logits, params, seed) for seed in range(40)}) > 6
    assert len({draw(logits, params, 1, position) for position in range(40)}) > 6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature) -> None:
    logits, num_draws = some_logits(), 4000
    counts = Counter(draw(logits, SamplingParams(temperature=temperature), seed) for seed in range(num_draws))
    expected = (logits[0] / temperature).softmax(-1) * num_draws
    chi_square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    # 11 degrees of freedom: above 40 in fewer than 1 of 20,000 runs, and the seeds are fixed.
    assert chi_square < 40


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    logits = some_logits()
    ranked = logits[0].argsort(descending=True).tolist()
    top_k = {draw(logits, SamplingParams(temperature=2.0, top_k=3), seed) for seed in range(300)}
    assert top_k == set(ranked[:3])
    cumulative = logits[0].softmax(-1)[ranked].cumsum(0)
    num_kept = int((cumulative < 0.7).sum()) + 1
    top_p = {draw(logits, SamplingParams(temperature=1.0, top_p=0.7), seed) for seed in range(500)}
    assert top_p == set(ranked[:num_kept])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", 1 << 63),
    ],
)
def test_values_out_of_range_name_the_field(field, value) -> None:
    with pytest.raises(RequestError, match=f"{field}=") as error:
        SamplingParams(**{field: value})
    assert error.value.field == field
