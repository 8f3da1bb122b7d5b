"""The self-test at load: every supported family passes, what computes something else is refused, nothing is left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selectn_core.batching.attention import ATTENTION_NAME, Attended, varlen_attention
from selectn_core.errors import LinkError, UnsupportedModel
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.weights.checkpoint import LoadedModel
from selectn_core.weights.units import Unit
from tests.support.engines import CheckedEngine, engine_config, generate, greedy, make_prompts
from tests.support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

PROMPTS = make_prompts()
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "initializer_range": 0.3,
}


class WatchedEngine(CheckedEngine):
    """Remembers what it was before and after the self-test."""

    def _self_test(self) -> None:
        self.before = traces(self)
        super()._self_test()
        self.after = traces(self)


def traces(engine: CheckedEngine) -> dict[str, Any]:
    cache, scheduler = engine.batching._processor.cache, engine.batching._processor.scheduler
    snapshot = engine.snapshot()
    del snapshot["link_bytes"], snapshot["link_busy_s"]  # what the link has carried, it has carried
    return {
        **snapshot,
        **asdict(engine.executor.stats),
        "records": len(engine.steps.records),
        "free_sectors": set(cache.pool.free_sectors),
        "free_blocks": [cache.pool.count_free_blocks(allocator.index) for allocator in cache.cache_allocators.values()],
        "requests": (len(scheduler.active_requests), len(scheduler.waiting_requests)),
        "attention": engine.model.config._attn_implementation,
        "hooks": (len(engine.model._forward_hooks), len(engine.model._forward_pre_hooks)),
        "threads": set(threading.enumerate()),
    }


def build(model_type: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def engine_on(model: PreTrainedModel, num_offloaded: int = 1, **settings: Any) -> CheckedEngine:
    loaded = LoadedModel(model=model, tokenizer=None, name="model")
    return CheckedEngine(loaded, engine_config(num_offloaded, 1), **settings)


# -- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_by_far(family: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "selectn_core.engine.self_test")
    CheckedEngine(tiny_model(family, dtype), engine_config(2, 1)).close()
    (record,) = (record for record in caplog.records if record.name == "selectn_core.engine.self_test")
    model_type, distance, tolerance = record.args  # type: ignore[misc]
    assert model_type == family
    assert 0 <= distance < tolerance / 5  # type: ignore[operator]


@pytest.mark.parametrize(("num_offloaded", "num_slots"), [(0, 1), (2, 2), (3, 1), (5, 4), (5, 1)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2_moe"])
def test_nothing_is_left_of_it(family: str, num_offloaded: int, num_slots: int) -> None:
    engine = WatchedEngine(tiny_model(family), engine_config(num_offloaded, num_slots, page_size=4))
    assert engine.before == engine.after
    engine.check_integrity()
    handles = [engine.submit(prompt, greedy()) for prompt in PROMPTS]
    with engine:
        assert [handle.result() for handle in handles] == plain_tokens(family)
    assert engine.steps.records[0].iteration == 0
    assert engine.executor.stats.num_steps == len(engine.steps.records)


def plain_tokens(family: str) -> list[list[int]]:
    """By transformers' generate, without any of ours."""
    model = tiny_model(family).model
    model.generation_config.eos_token_id = None
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    "batch",
    [
        {"kv_tokens": 4, "page_size": 4, "max_batch_tokens": 1, "max_requests": 1},
        {"kv_tokens": 16, "page_size": 16, "max_batch_tokens": 2, "max_requests": 2},
        {"kv_tokens": 80, "page_size": 4, "max_batch_tokens": 3, "max_requests": 2, "prefix_sharing": False},
        {"kv_tokens": 512, "page_size": 256, "max_batch_tokens": 512},
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_it_fits_small_engines(family: str, batch: dict[str, Any]) -> None:
    engine = WatchedEngine(tiny_model(family), engine_config(2, 1, **batch))
    assert engine.before == engine.after
    engine.close()


@pytest.mark.parametrize("limit", [2, 3, 8, 17])
def test_it_fits_short_contexts(limit: int) -> None:
    engine = engine_on(build("gpt2", vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=limit))
    assert engine.max_model_len == limit
    engine.close()


# -- what is refused --------------------------------------------------------------------------------------------


def test_a_model_that_would_compute_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="^diffllama: .*does not compute what the model computes"):
        engine_on(build("diffllama", **TINY))


class FailingExecutor(OverlappedExecutor):
    """In place of a model whose attention cannot be computed by continuous batching."""

    def _before_unit(self, unit: Unit) -> None:
        raise RuntimeError("no such shape")


def test_a_model_that_would_fail_every_request_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="^llama: continuous batching cannot run it: ") as refused:
        engine_on(tiny_model().model, executor_class=FailingExecutor)
    assert isinstance(refused.value.__cause__, RuntimeError)


def test_weights_too_large_for_the_dtype_are_refused_with_a_hint() -> None:
    for dtype in (torch.float32, torch.float16):
        loaded = tiny_model(dtype=dtype)
        loaded.model.model.layers[1].mlp.down_proj.weight.fill_(3e4)
        if dtype == torch.float32:
            CheckedEngine(loaded, engine_config(2, 1)).close()
            continue
        with pytest.raises(UnsupportedModel, match=r"not finite in torch\.float16.*model\.dtype to bfloat16"):
            CheckedEngine(loaded, engine_config(2, 1))


def uncausal(step: Attended) -> Attended:
    return replace(step, segments=[replace(it, is_causal=False, mask=None) for it in step.segments])


def without_the_oldest_key(step: Attended) -> Attended:
    """In decode steps alone."""
    return replace(
        step,
        decodes=[replace(it, rows=it.rows[:, 1:], num_keys=[n - 1 for n in it.num_keys]) for it in step.decodes],
    )


def with_the_keys_of_others(step: Attended) -> Attended:
    return replace(step, decodes=[replace(it, rows=it.rows.roll(1, 0)) for it in step.decodes])


@contextmanager
def attention_with(change: Callable[[Attended], Attended]) -> Iterator[None]:
    def changed(*args: Any, attended: Any, **kwargs: Any) -> Any:
        kwargs["attended"] = [change(mine) for mine in attended]
        return varlen_attention(*args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, changed)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, varlen_attention)


@pytest.mark.parametrize("change", [uncausal, without_the_oldest_key, with_the_keys_of_others])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_finds_an_error_in_our_attention(family: str, change: Callable[[Attended], Attended]) -> None:
    with attention_with(change), pytest.raises(UnsupportedModel, match="does not compute"):
        CheckedEngine(tiny_model(family), engine_config(2, 1)).close()
    CheckedEngine(tiny_model(family), engine_config(2, 1)).close()


class MixedUpExecutor(OverlappedExecutor):
    """Computes with another layer's weights now and then."""

    num_units = 0

    def _before_unit(self, unit: Unit) -> None:
        super()._before_unit(unit)
        self.num_units += 1
        if self.num_units % 3 == 0:
            unit.bind(unit.views(self.store.buffer(self.units[0])))


def test_it_finds_an_executor_that_mixes_weights_up() -> None:
    with pytest.raises(UnsupportedModel, match="does not compute"):
        CheckedEngine(tiny_model(), engine_config(4, 2), executor_class=MixedUpExecutor)


# -- failing ----------------------------------------------------------------------------------------------------


def test_a_refused_model_is_left_as_transformers_built_it() -> None:
    before = set(threading.enumerate())
    loaded = tiny_model()
    with attention_with(uncausal), pytest.raises(UnsupportedModel):
        CheckedEngine(loaded, engine_config(3, 1))
    assert set(threading.enumerate()) <= before
    expected = tiny_model().model(torch.tensor([PROMPTS[0]])).logits
    assert torch.equal(loaded.model(torch.tensor([PROMPTS[0]])).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    with CheckedEngine(loaded, engine_config(3, 1)) as engine:
        assert [engine.submit(PROMPTS[0], greedy()).result()] == generate(
            "llama", engine_config(0), prompts=PROMPTS[:1]
        )


class BrokenLinkExecutor(OverlappedExecutor):
    def _before_unit(self, unit: Unit) -> None:
        raise LinkError("the link is down")


def test_a_link_that_fails_is_not_the_models_fault() -> None:
    before = set(threading.enumerate())
    with pytest.raises(LinkError, match="down"):
        CheckedEngine(tiny_model(), engine_config(2, 1), executor_class=BrokenLinkExecutor)
    assert set(threading.enumerate()) <= before
