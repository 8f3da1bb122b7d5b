"""Where continuous batching chooses tokens: every request by its own parameters, all rows of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from selectn_core.requests.sampling import SamplingParams, perturb_for_argmax

NOT_FINITE = (
    "the model computed logits that are not finite (NaN or infinity) for this request: its weights are damaged, or "
    "its values do not fit the dtype (model.dtype)"
)


def sampling_of(request: FutureRequestState) -> tuple[SamplingParams, int]:
    """What `submit` was told, and the seed."""
    sampling: tuple[SamplingParams, int] = request.state.logit_processor_kwargs["sampling"]
    return sampling


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """Per-request sampling in one pass, so that greedy and sampled requests share a batch."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.observe: Callable[[int, torch.Tensor], None] | None = None  # seed, logits [vocab_size]
        self._rows: list[tuple[SamplingParams, int, int]] = []
        self._chosen_from: torch.Tensor | None = None  # [num_rows, vocab_size], of the step that is under way

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        if set(kwargs) != {"sampling"}:
            raise ValueError(f"expected the one keyword 'sampling', got {sorted(kwargs)}")

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        self._rows = []
        for request in requests_in_batch:
            if request.has_new_token:
                state = request.state
                params, seed = sampling_of(request)
                # A preempted request comes back with its tokens in the prompt: the sum is its position still.
                self._rows.append((params, seed, len(state.initial_tokens) + len(state.generated_tokens)))
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        if not self._rows:  # a chunk of prefill alone: nobody gets a token in this step
            return scores
        params, seeds, positions = zip(*self._rows, strict=True)
        if self.observe is not None:
            for seed, row in zip(seeds, scores, strict=False):  # those that get a token come first
                self.observe(seed, row)
        self._chosen_from = perturb_for_argmax(scores, params, seeds, positions)
        return self._chosen_from

    def drop_step(self) -> None:
        """Forgets the step that was under way."""
        self._chosen_from = None

    def rows_not_finite(self, tokens: Sequence[int]) -> list[int]:
        """Of the rows of the last step, those whose chosen value is not finite: argmax finds a NaN or an infinity."""
        chosen_from, self._chosen_from = self._chosen_from, None
        if chosen_from is None or self.observe is not None:  # whoever observes judges for himself
            return []
        num_rows = len(self._rows)
        index = torch.tensor(tokens[:num_rows], device=chosen_from.device)[:, None]
        is_finite = chosen_from[:num_rows].gather(1, index).isfinite()
        return [] if is_finite.all() else (~is_finite[:, 0]).nonzero()[:, 0].tolist()
