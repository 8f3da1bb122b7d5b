"""What drawing tokens adds to a step, per row: measured apart from the model, whose time does not depend on it."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    cases = [(rows, params) for rows in sorted({1, max(1, max_rows // 4), max_rows}) for params in (_PLAIN, _TRUNCATED)]
    times_s = [_timed_s(lambda: _sample(logits[:rows], params), device) for rows, params in cases]  # noqa: B023
    features = np.array([[1.0, rows, rows * params.is_truncated] for rows, params in cases])
    # Relative errors count, as in the fit of the model's own times.
    weights = 1 / np.maximum(times_s, 1e-9)
    call_s, row_s, truncated_row_s = nnls(features * weights[:, None], np.ones(len(cases)))[0].tolist()
    return SamplingTimes(call_s=call_s, row_s=row_s, truncated_row_s=truncated_row_s)


def _sample(logits: torch.Tensor, params: SamplingParams) -> None:
    num_rows = len(logits)
    perturb_for_argmax(logits, [params] * num_rows, range(num_rows), [0] * num_rows)


def _timed_s(function: Callable[[], None], device: Device) -> float:
    samples = []
    for _ in range(_SAMPLES + 1):  # the first is a warm-up
        device.synchronize()
        began_s = time.perf_counter()
        function()
        device.synchronize()
        samples.append(time.perf_counter() - began_s)
    return median(samples[1:])
