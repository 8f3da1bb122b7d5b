"""What sampling takes is measured where tokens are drawn, per row, and rows with top_p are never counted as cheaper."""

from __future__ import annotations

import pytest
import torch

from selectn_core.device.emulated import EmulatedDevice
from selectn_core.latency.step_times import SamplingTimes
from selectn_core.profiling import sampling_times
from selectn_core.profiling.sampling_times import fit_sampling, measure_sampling

ROWS = (1, 8, 32)


def test_what_a_call_and_a_row_take_is_found_in_the_times() -> None:
    times = fit_sampling(ROWS, [2e-3 + 1e-3 * n for n in ROWS], [2e-3 + 1.5e-3 * n for n in ROWS])
    assert (times.call_s, times.row_s, times.truncated_row_s) == pytest.approx((2e-3, 1e-3, 5e-4))


def test_a_row_with_top_p_takes_no_less_than_one_without() -> None:
    times = fit_sampling(ROWS, [1e-3 * n for n in ROWS], [4e-4 * n for n in ROWS])
    assert (times.call_s, times.row_s, times.truncated_row_s) == pytest.approx((0, 1e-3, 0), abs=1e-9)


@pytest.mark.parametrize("vocab_size", [100, 10_000], ids=["together", "in turn"])
def test_every_sample_is_drawn_from_the_same_logits(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing may overwrite them, and a row that is minus infinity but for one token is no model's."""
    seen: list[torch.Tensor] = []
    sample = sampling_times._sample

    def watched(logits: torch.Tensor, params: object) -> None:
        seen.append(logits.clone())
        sample(logits, params)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling_times, "_sample", watched)
    with EmulatedDevice(1 << 20, bytes_per_s=50e9) as device:
        times = measure_sampling(device, vocab_size, 4)
    assert all(torch.equal(logits, seen[-1][: len(logits)]) for logits in seen)
    assert isinstance(times, SamplingTimes)
    assert times.call_s + times.row_s > 0
