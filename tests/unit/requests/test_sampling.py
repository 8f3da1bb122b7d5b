"""Sampling: greedy is untouched, seeds do not depend on the batch, and draws follow the distribution."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, TypedDict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TopKLogitsWarper, TopPLogitsWarper

from selectn_core.errors import RequestError
from selectn_core.requests.sampling import SamplingParams, perturb_for_argmax

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


@pytest.mark.parametrize(
    ("one", "other"),
    [(-1, -2), (7, 7 + (1 << 61) - 1), (0, 1 << 61), (-(1 << 63), (1 << 63) - 1), (1, 1 << 32), (-5, 5)],
)
def test_seeds_that_differ_anywhere_give_other_tokens(one: int, other: int) -> None:
    logits, params = torch.zeros(1, VOCAB_SIZE), SamplingParams(temperature=1.0)
    of_one, of_other = ([draw(logits, params, seed, position) for position in range(20)] for seed in (one, other))
    assert of_one != of_other


def test_noise_is_gumbel_noise_and_rows_have_nothing_in_common() -> None:
    params, num_rows, num_tokens = SamplingParams(temperature=1.0), 20, 8000
    noise = perturb_for_argmax(torch.zeros(num_rows, num_tokens), [params] * num_rows, range(num_rows), [3] * num_rows)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    correlations = noise.corrcoef() - torch.eye(num_rows)
    assert float(correlations.abs().max()) < 5 / math.sqrt(num_tokens)
    shifted = torch.stack([noise[0, 1:], noise[0, :-1]]).corrcoef()[0, 1]
    assert abs(float(shifted)) < 5 / math.sqrt(num_tokens)


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 1.2e-38, 1e-6, 1e-5, 0.0, -0.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e37])
def test_next_to_no_temperature_takes_the_most_likely_token(temperature: float, scale: float) -> None:
    logits = some_logits(5) * scale
    for cut in ({}, {"top_p": 0.5}, {"top_k": 2}):
        params = [SamplingParams(temperature=temperature, **cut)] * 5
        chosen = perturb_for_argmax(logits, params, [5] * 5, [0] * 5)
        assert chosen.argmax(-1).tolist() == logits.argmax(-1).tolist()


def test_the_largest_logits_do_not_overflow() -> None:
    logits = torch.full((1, VOCAB_SIZE), torch.finfo(torch.float32).min)
    logits[0, 3], logits[0, 4] = torch.finfo(torch.float32).max, -math.inf
    chosen = perturb_for_argmax(logits, [SamplingParams(temperature=0.01)], [1], [0])
    assert int(chosen.argmax()) == 3
    assert math.isfinite(float(chosen.max()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.5}, {"top_k": 3}])
def test_what_is_not_finite_shows_in_its_own_row_and_in_no_other(value: float, cut: dict[str, Any]) -> None:
    logits, params = some_logits(3), SamplingParams(temperature=1.0, **cut)
    sound = perturb_for_argmax(logits, [params] * 3, [1, 2, 3], [0, 0, 0])
    logits[1, 5] = value
    chosen = perturb_for_argmax(logits, [params] * 3, [1, 2, 3], [0, 0, 0])
    assert torch.equal(chosen[[0, 2]], sound[[0, 2]])
    assert not math.isfinite(float(chosen[1, chosen[1].argmax()]))


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


class Cut(TypedDict, total=False):
    top_p: float
    top_k: int


# Of a vocabulary that is larger than the number of candidates that are looked at first; flat and peaked rows.
CUTS: list[Cut] = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_p": 1e-300},
    {"top_p": 1 - 1e-12},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 2000},
    {"top_k": 10**12},
    {"top_k": 50, "top_p": 0.5},
    {"top_k": 2000, "top_p": 0.5},
    {},
]


def test_tokens_that_are_kept_are_those_that_transformers_keeps() -> None:
    logits = torch.randn(len(CUTS) * 2, 3000, generator=torch.Generator().manual_seed(1))
    logits[len(CUTS) :] *= 6  # peaked: a few tokens have nearly all
    params = [SamplingParams(temperature=1.0, **cut) for cut in CUTS * 2]
    kept = perturb_for_argmax(logits, params, range(len(params)), [0] * len(params)) > -math.inf
    for row, cut in enumerate(CUTS * 2):
        scores = logits[row : row + 1].double()
        no_tokens = torch.empty(1, 0, dtype=torch.long)
        if cut.get("top_k", 0) > 0:
            scores = TopKLogitsWarper(top_k=cut["top_k"])(no_tokens, scores)
        if cut.get("top_p", 1) < 1:
            scores = TopPLogitsWarper(top_p=cut["top_p"])(no_tokens, scores)
        differs = kept[row] != (scores[0] > -math.inf)
        # Next to 1 the last ones add up to less than float32 can tell.
        assert float(logits[row].double().softmax(-1)[differs].sum()) < 1e-6, cut
        assert not differs.any() or cut.get("top_p", 0) > 0.9999


def test_cut_rows_do_not_depend_on_the_rows_beside_them() -> None:
    logits = torch.randn(len(CUTS), 3000, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=1.1, **cut) for cut in CUTS]
    together = perturb_for_argmax(logits, params, range(len(CUTS)), [9] * len(CUTS))
    for i in range(len(CUTS)):
        assert torch.equal(together[i : i + 1], perturb_for_argmax(logits[i : i + 1], [params[i]], [i], [9]))


def test_as_few_operations_for_many_rows_as_for_one() -> None:
    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.num_operations = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num_operations += 1
            return function(*args, **(kwargs or {}))

    def num_operations(num_rows: int) -> int:
        params = [SamplingParams(temperature=1.0, top_p=0.9)] * num_rows
        with Counted() as counted:
            perturb_for_argmax(some_logits(num_rows), params, range(num_rows), [0] * num_rows)
        return counted.num_operations

    assert num_operations(16) == num_operations(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", math.nan),
        ("top_k", 2.5),
        ("seed", -(1 << 63) - 1),
        ("seed", 1.0),
        ("seed", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1 << 63),
        ("max_tokens", 1 << 31),
        ("seed", 1 << 63),
    ],
)
def test_values_out_of_range_name_the_field(field, value) -> None:
    with pytest.raises(RequestError, match=f"{field}=") as error:
        SamplingParams(**{field: value})
    assert error.value.field == field
