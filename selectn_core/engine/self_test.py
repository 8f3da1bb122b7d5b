"""A self-test at load: continuous batching must compute what the model itself computes, whatever the model is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from selectn_core.batching import ContinuousBatching
from selectn_core.batching.attention import ATTENTION_NAME
from selectn_core.config import BatchConfig
from selectn_core.errors import SelectNError, UnsupportedModel
from selectn_core.offload.executor import Executor
from selectn_core.weights.units import Unit, running_in_order

logger = logging.getLogger(__name__)

NUM_PROMPT_TOKENS = 14  # with the new ones more than a usual page of the KV cache
NUM_NEW_TOKENS = 4  # one from the prompt, three from decode steps: over a slow link every step takes its time
# Measured: 1e-6 to 1e-5 in float32 (TF32: up to 1e-3), 0.003 to 0.04 in 16 bits; another computation gives 0.08 to 1.5.
TOLERANCE_FLOAT32 = 0.01
TOLERANCE_16_BITS = 0.2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine under test can take: requests, tokens of one, tokens of all; and what ends a generation."""

    batch: BatchConfig
    max_model_len: int
    kv_capacity_tokens: int
    eos_ids: frozenset[int]


def check_model(
    model: PreTrainedModel, units: Sequence[Unit], batching: ContinuousBatching, executor: Executor, limits: Limits
) -> None:
    """Generates a few tokens by continuous batching and compares their logits with those of a plain forward.

    Both run on the engine's weights where they are, offloaded ones included. Nothing is left behind but what the
    link has carried. Raises UnsupportedModel, naming the model type, where the two differ or either fails, and where
    the units do not run in their order, once in a step each.
    """
    device, stats = executor.device, replace(executor.stats)
    prompts, num_tokens = _requests(limits, model.config.get_text_config().vocab_size)
    with refusing(model, "continuous batching cannot run it"), running_in_order(model, units):
        batched = batching.generate_now(prompts, num_tokens)  # one [num_tokens, vocab_size] for each prompt
    sequences = [[*prompt, *logits.argmax(-1).tolist()[:-1]] for prompt, logits in zip(prompts, batched, strict=True)]
    with refusing(model, "a plain forward fails"):
        plain = _plain_logits(model, batching.plain_attention, sequences, device.torch_device)[
            :, -num_tokens:
        ]  # [num_prompts, num_tokens, vocab_size]
        device.synchronize()
    executor.end_step()
    executor.stats = stats
    _compare(model, batched, plain)


@contextmanager
def refusing(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Makes every error that is about the model an UnsupportedModel; one of ours, or of memory, stays what it is."""
    try:
        yield
    except (SelectNError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(f"{model.config.model_type}: {what}: {type(error).__name__}: {error}") from error


def _requests(limits: Limits, vocab_size: int) -> tuple[list[list[int]], int]:
    """Prompts of equal length that differ in every token, and the tokens to generate from each."""
    batch, room = limits.batch, limits.kv_capacity_tokens
    limit = min(limits.max_model_len, room)
    num_new = max(1, min(NUM_NEW_TOKENS, limit // 2))
    # Two where they fit, so that one request's tokens in another's attention would show.
    both_fit = room // 4 >= NUM_PROMPT_TOKENS + NUM_NEW_TOKENS
    num_prompts = 2 if both_fit and batch.max_requests > 1 else 1
    length = max(1, min(NUM_PROMPT_TOKENS, limit - num_new, 2 * batch.max_batch_tokens))  # in a few chunks at most
    ids = _token_ids(vocab_size, limits.eos_ids, num_prompts * length)
    return [ids[i * length : (i + 1) * length] for i in range(num_prompts)], num_new


def _token_ids(size: int, eos_ids: frozenset[int], count: int) -> list[int]:
    """Ordinary tokens: the rare ones are late in a vocabulary, the special ones at either end."""
    pool = [token for token in range(size // 8, max(size // 2, 1)) if token not in eos_ids] or [0]
    return [pool[i * 7919 % len(pool)] for i in range(count)]


def _plain_logits(
    model: PreTrainedModel, attention: str, sequences: Sequence[Sequence[int]], device: torch.device
) -> torch.Tensor:
    """Logits of every token, [num_sequences, length, vocab_size], by transformers' own attention."""
    input_ids = torch.tensor(sequences, device=device)
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
            return logits
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _compare(model: PreTrainedModel, batched: Sequence[torch.Tensor], plain: torch.Tensor) -> None:
    model_type, dtype = model.config.model_type, model.dtype
    if _overflows(plain):
        raise UnsupportedModel(
            f"{model_type} computes values that are not finite in {dtype}, without continuous batching too: "
            f"set model.dtype to {'bfloat16 or float32' if dtype == torch.float16 else 'float32'}, "
            f"or look for damaged weights"
        )
    if any(_overflows(logits) for logits in batched):
        raise UnsupportedModel(f"{model_type}: continuous batching computes values that are not finite in {dtype}")
    lowest = torch.finfo(plain.dtype).min / 2  # at or near it: tokens that the model rules out, always
    distances = torch.stack(
        [_distances(ours, own, (own > lowest).all(0)) for ours, own in zip(batched, plain, strict=True)]
    )  # [num_prompts, num_tokens]
    if dtype == torch.float32:
        distance, tolerance = float(distances.max()), TOLERANCE_FLOAT32
    else:  # rounding may choose another expert where it is a matter of a hair: a token may differ, not most of them
        distance, tolerance = float(distances.median(dim=1).values.max()), TOLERANCE_16_BITS
    logger.info("self-test of %s: logits differ by %.2g, %g is allowed", model_type, distance, tolerance)
    if distance > tolerance:
        raise UnsupportedModel(
            f"{model_type}: continuous batching does not compute what the model computes: logits differ by "
            f"{distance:.2g} of their spread, {tolerance} is allowed for rounding in {dtype}"
        )


def _overflows(logits: torch.Tensor) -> bool:
    return bool((logits.isnan() | logits.isposinf()).any())


def _distances(
    ours: torch.Tensor,  # [num_tokens, vocab_size]
    own: torch.Tensor,  # [num_tokens, vocab_size]
    seen: torch.Tensor,  # [vocab_size], bool
) -> torch.Tensor:  # [num_tokens]
    """Of each token's logits, the norm of the difference over the norm of their spread: 0 equal, 1 unrelated."""
    ours, own = ours[:, seen].double(), own[:, seen].double()
    spread = own - own.mean(dim=-1, keepdim=True)
    return (ours - own).norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-30)
