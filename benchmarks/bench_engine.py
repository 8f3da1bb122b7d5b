"""Tokens per second of the engine at k = 0, of stock continuous batching, and of `generate`, in one run.

Stock is transformers' continuous batching as it comes on this device, with the same cache, batch and page sizes;
`generate` runs the whole batch with its own cache. All three use the same number of compute threads and greedy
decoding, and take turns. The time of a side is from its first prompt to its last token, prefill included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.common import Check, finish, parse_arguments, random_prompts, table
from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, ModelConfig, OffloadConfig
from selectn_core.device import resolve_kind
from selectn_core.engine.engine import Engine
from selectn_core.requests.sampling import SamplingParams
from selectn_core.weights.checkpoint import load_model

CONTEXT_TOKENS = 256
PAGE_SIZE = 16
BATCH_TOKENS = 256
NO_EOS = -1


@dataclass(frozen=True, kw_only=True)
class Load:
    """One setting: requests at once, tokens to generate, rounds of all sides."""

    num_requests: int
    num_new_tokens: int
    num_rounds: int


QUICK = (
    Load(num_requests=1, num_new_tokens=24, num_rounds=5),
    Load(num_requests=16, num_new_tokens=8, num_rounds=1),
)
FULL = (
    Load(num_requests=1, num_new_tokens=48, num_rounds=15),
    Load(num_requests=16, num_new_tokens=32, num_rounds=5),
)

Side = Callable[[list[list[int]], int], list[list[int]]]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    samples: list[dict[str, Any]] = []
    for load in QUICK if arguments.quick else FULL:
        samples += _measure(arguments.model, load)
    _print(samples)
    provenance = "measured on the GPU" if torch.cuda.is_available() else "measured on the CPU"
    return finish(arguments, provenance, samples, _checks(samples))


def _measure(source: str, load: Load) -> list[dict[str, Any]]:
    prompts = random_prompts(load.num_requests, CONTEXT_TOKENS, vocab_size=40_000)
    samples = []
    with _engine(source, load) as engine:
        device = engine.device.torch_device
        sides: dict[str, Side] = {
            "engine": lambda p, n: _run_engine(engine, p, n),
            "stock": _Stock(source, load, device),
            "generate": _Generate(source, device),
        }
        for side in sides.values():  # first calls allocate
            side(prompts[:1], 2)
        for round_number in tqdm(range(load.num_rounds), desc=f"{load.num_requests} requests"):
            tokens: dict[str, list[list[int]]] = {}
            for name, side in sides.items():
                started_s = time.perf_counter()
                tokens[name] = side(prompts, load.num_new_tokens)
                samples.append(
                    {
                        "requests": load.num_requests,
                        "new_tokens": load.num_new_tokens,
                        "round": round_number,
                        "side": name,
                        "seconds": time.perf_counter() - started_s,
                        "tokens_equal_engine": tokens[name] == tokens["engine"],
                    }
                )
        sides["stock"].close()  # type: ignore[attr-defined]
    return samples


def _engine(source: str, load: Load) -> Engine:
    return Engine(
        load_model(ModelConfig(source=source)),
        EngineConfig(
            device=DeviceConfig(kind=resolve_kind(DeviceConfig())),
            batch=BatchConfig(
                max_batch_tokens=BATCH_TOKENS,
                max_requests=load.num_requests,
                page_size=PAGE_SIZE,
                kv_tokens=_num_blocks(load) * PAGE_SIZE,
                prefix_sharing=False,
            ),
            offload=OffloadConfig(num_offloaded=0),
        ),
    )


def _num_blocks(load: Load) -> int:
    # A quarter more than is needed: the scheduler keeps 15 % free before it admits another prompt.
    per_request = (CONTEXT_TOKENS + load.num_new_tokens) // PAGE_SIZE + 2
    return load.num_requests * per_request * 5 // 4


def _run_engine(engine: Engine, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=num_new_tokens, ignore_eos=True)
    return [handle.result() for handle in [engine.submit(prompt, params) for prompt in prompts]]


def _stock_model(source: str, device: torch.device) -> PreTrainedModel:
    return load_model(ModelConfig(source=source)).model.to(device)


class _Stock:
    """Transformers' continuous batching, as it comes."""

    def __init__(self, source: str, load: Load, device: torch.device) -> None:
        self._manager = _stock_model(source, device).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=_num_blocks(load),
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=load.num_requests,
                allow_block_sharing=False,
            ),
        )
        self._manager.warmup()
        self._manager.start()

    def __call__(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        ids = [self._manager.add_request(prompt, max_new_tokens=num_new_tokens) for prompt in prompts]
        results: dict[str, list[int]] = {}
        while len(results) < len(ids):
            output = self._manager.get_result(timeout=60)
            if output is None or output.error:
                raise RuntimeError(f"stock continuous batching failed: {output and output.error}")
            results[output.request_id] = output.generated_tokens
        return [results[request_id] for request_id in ids]

    def close(self) -> None:
        self._manager.stop(block=True)


class _Generate:
    """`generate` on the whole batch at once."""

    def __init__(self, source: str, device: torch.device) -> None:
        self._model, self._device = _stock_model(source, device), device
        self._model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts, device=self._device)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return output[:, input_ids.shape[1] :].tolist()


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    return [
        Check(
            name="engine over stock, tokens/s, 16 requests x 256 tokens of context (median of rounds)",
            value=_speedup(samples, 16, "stock"),
            target=">= 1.3",
        ),
        Check(
            name="engine over stock, tokens/s, 1 request (median of rounds)",
            value=_speedup(samples, 1, "stock"),
            target=">= 1.0",
        ),
    ]


def _speedup(samples: list[dict[str, Any]], num_requests: int, side: str) -> float:
    """Median over the rounds of (the side's seconds / the engine's)."""
    seconds = {(s["round"], s["side"]): s["seconds"] for s in samples if s["requests"] == num_requests}
    rounds = {round_number for round_number, _ in seconds}
    return median(seconds[r, side] / seconds[r, "engine"] for r in rounds)


def _print(samples: list[dict[str, Any]]) -> None:
    rows = []
    for num_requests in sorted({sample["requests"] for sample in samples}):
        for side in ("engine", "stock", "generate"):
            mine = [s for s in samples if (s["requests"], s["side"]) == (num_requests, side)]
            seconds = [sample["seconds"] for sample in mine]
            rows.append(
                (
                    num_requests,
                    side,
                    f"{num_requests * mine[0]['new_tokens'] / median(seconds):.1f}",
                    f"{min(seconds):.2f}..{max(seconds):.2f}",
                    f"{_speedup(samples, num_requests, side):.3f}",
                    "yes" if all(sample["tokens_equal_engine"] for sample in mine) else "no",
                )
            )
    print(table(("requests", "side", "tokens/s", "seconds", "engine is x faster", "same tokens"), rows))


if __name__ == "__main__":
    sys.exit(main())
