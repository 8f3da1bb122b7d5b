"""Engines that attend for all requests in one call: tokens are those of a call for each, and offloading changes none.

On the CPU, with a reference in the place of torch's `varlen_attn`: `tests/gpu/test_packed_attention.py` has that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tests.support.reference_varlen as reference
from selectn_core.engine.engine import Engine
from selectn_core.latency.steps import StepShape
from tests.support.engines import CheckedEngine, engine_config, generate, greedy, make_prompts, random_plans
from tests.support.reference_varlen import packing
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, OTHER_FAMILIES, tiny_model

BY_REQUEST = {"gpt_oss", "gemma2", "deepseek_v2", "deepseek_v3", "mimo_v2_flash"}  # sinks, soft caps, odd head sizes


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_tokens_are_those_of_a_call_for_each_request(family: str) -> None:
    """Prompts longer than windows, chunks behind other keys, prefill and decodes in one step."""
    prompts = make_prompts()
    expected = generate(family, engine_config(0), prompts=prompts)
    with packing():
        assert generate(family, engine_config(2, 1), prompts=prompts) == expected
        with Engine(tiny_model(family), engine_config()) as engine:
            paths = {path["name"] for path in engine.snapshot()["attention"].values()}
            assert paths == {"by_request" if family in BY_REQUEST else "packed"}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_tokens_with_plans_that_change(family: str) -> None:
    expected = generate(family, engine_config(0))
    with packing():
        assert generate(family, engine_config(2, 1), before_step=random_plans(7, NUM_LAYERS)) == expected


def test_tokens_with_shared_prefixes() -> None:
    """Requests that come later find the pages of those before them. (Pages of windows are never shared.)"""
    (start,) = make_prompts([33], seed=3)
    ends = make_prompts([4, 1, 9, 2])
    prompts = [[*start[:length], *end] for length, end in zip((33, 32, 16, 20), ends, strict=True)]
    config = engine_config(2, 1, page_size=4, max_requests=2)
    expected = generate("llama", config, prompts=prompts)
    with packing():
        engine = CheckedEngine(tiny_model(), config)
        shapes: list[StepShape] = []
        engine.on_step_planned = shapes.append
        handles = [engine.submit(prompt, greedy()) for prompt in prompts]
        with engine:
            assert [handle.result() for handle in handles] == expected
    num_computed = sum(num_tokens for shape in shapes for num_tokens, _ in shape.prefills)
    assert num_computed < sum(map(len, prompts)) - 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen2_moe"])
def test_tokens_in_sixteen_bits_are_those_without_offloading(family: str, dtype: torch.dtype) -> None:
    with packing():
        tokens = [generate(family, engine_config(k, 1), dtype=dtype) for k in (0, 3)]
    assert tokens[0] == tokens[1]


def test_a_layer_attends_once_in_a_step() -> None:
    """However many requests there are."""
    calls: list[int] = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[3]) - 1)
        return reference.varlen_attn(*args, **kwargs)

    with packing(attend):
        engine = Engine(tiny_model(), engine_config(max_batch_tokens=64))
        calls.clear()
        engine.batching.run_step([(1, 5), (7, 3), (1, 0), (4, 0), (1, 20)])
        engine.close()
    assert calls == [5] * NUM_LAYERS


def test_what_is_measured_of_one_way_is_not_valid_for_the_other() -> None:
    engines = [Engine(tiny_model(), engine_config())]
    with packing():
        engines.append(Engine(tiny_model(), engine_config()))
    one, other = (engine.fingerprint for engine in engines)
    assert one.differences(other) == [
        "attention: the record has 'selectn_varlen', running is 'selectn_varlen, packed: full_attention'"
    ]
    for engine in engines:
        engine.close()


def test_a_snapshot_says_why_requests_are_attended_for_one_by_one() -> None:
    with Engine(tiny_model("mistral"), engine_config()) as engine:
        attention = engine.snapshot()["attention"]
    assert attention == {"sliding_attention": {"name": "by_request", "reason": "varlen_attn is for CUDA"}}
