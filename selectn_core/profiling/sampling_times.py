"""What drawing tokens adds to a step, per row: measured apart from the model, whose time does not depend on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
from scipy.optimize import nnls

from selectn_core.device import Device
from selectn_core.latency.step_times import SamplingTimes
from selectn_core.requests.sampling import SamplingParams, perturb_for_argmax

_SAMPLES = 5
_PLAIN = SamplingParams(temperature=1.0)
_TRUNCATED = SamplingParams(temperature=1.0, top_p=0.9)
# Logits as far apart as a model's: the likeliest few hundred tokens have nearly all of the probability.
_SPREAD = 4.0


def measure_sampling(device: Device, vocab_size: int, max_rows: int) -> SamplingTimes:
    """Samples a few numbers of rows of logits of this size on the device, some with top_p."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(max_rows, vocab_size, generator=generator) * _SPREAD).to(device.torch_device)
    numbers = sorted({1, max(1, max_rows // 4), max_rows})

    def timed_s(num_rows: int, params: SamplingParams) -> float:
        drawn_from = torch.empty_like(logits[:num_rows])  # sampling may overwrite it

        def fill() -> None:
            drawn_from.copy_(logits[:num_rows])

        return _timed_s(fill, lambda: _sample(drawn_from, params), device)

    return fit_sampling(
        numbers, [timed_s(number, _PLAIN) for number in numbers], [timed_s(number, _TRUNCATED) for number in numbers]
    )


def fit_sampling(num_rows: Sequence[int], plain_s: Sequence[float], truncated_s: Sequence[float]) -> SamplingTimes:
    """Of times for so many rows, without and with top_p, what a call and a row take; relative errors count.

    Rows with top_p take at least as long as others here, though a CPU may be done with them sooner.
    """
    truncated_s = [max(pair) for pair in zip(plain_s, truncated_s, strict=True)]
    features = np.array([[1.0, rows, rows * is_truncated] for is_truncated in (0, 1) for rows in num_rows])
    weights = 1 / np.maximum([*plain_s, *truncated_s], 1e-9)
    call_s, row_s, truncated_row_s = nnls(features * weights[:, None], np.ones(len(features)))[0].tolist()
    return SamplingTimes(call_s=call_s, row_s=row_s, truncated_row_s=truncated_row_s)


def _sample(logits: torch.Tensor, params: SamplingParams) -> None:
    num_rows = len(logits)
    perturb_for_argmax(logits, [params] * num_rows, range(num_rows), [0] * num_rows)


def _timed_s(prepare: Callable[[], None], function: Callable[[], None], device: Device) -> float:
    samples = []
    for _ in range(_SAMPLES + 1):  # the first is a warm-up
        prepare()
        device.synchronize()
        began_s = time.perf_counter()
        function()
        device.synchronize()
        samples.append(time.perf_counter() - began_s)
    return median(samples[1:])
