"""Every family's greedy tokens are transformers' own, however the model is offloaded; what is refused says why."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from selectn_core.batching import KvShape, kv_shapes
from selectn_core.config import HostConfig, ModelConfig
from selectn_core.engine.engine import Engine
from selectn_core.errors import RequestError, UnsupportedModel
from selectn_core.weights.architecture import check_architecture, context_limit
from selectn_core.weights.checkpoint import load_model
from selectn_core.weights.shared_model import load_on_host
from selectn_core.weights.units import find_units, last_of_a_new_kind
from tests.support.engines import NUM_TOKENS, engine_config, generate, greedy, make_prompts, random_plans
from tests.support.tiny_models import NUM_LAYERS, OTHER_FAMILIES, VOCAB_SIZE, tiny_model

# Of the prompts, two are longer than the sliding windows, and one becomes so: together they take three steps.
PROMPTS = make_prompts()
WITHOUT_BLOCKS = {"jetmoe", "granitemoehybrid"}  # their blocks run in another order than they are registered in


@cache
def stock_tokens(family: str) -> list[list[int]]:
    """Transformers' own generate, the prompts in one batch that is padded on the left."""
    model, longest = tiny_model(family).model, max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    model.generation_config.eos_token_id = None
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0)
    tokens: list[list[int]] = output[:, longest:].tolist()
    assert len({token for row in tokens for token in row}) > 10, "a model this dull would hide any error"
    return tokens


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_tokens_are_those_of_transformers_generate(family: str) -> None:
    expected = stock_tokens(family)
    for num_offloaded, num_slots in ((0, 1), (2, 1), (5, 3)):
        assert generate(family, engine_config(num_offloaded, num_slots), prompts=PROMPTS) == expected
    tokens = generate(family, engine_config(2, 1), prompts=PROMPTS, before_step=random_plans(7, NUM_LAYERS))
    assert tokens == expected


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_tokens_are_the_same_with_blocks_as_units(family: str) -> None:
    if family in WITHOUT_BLOCKS:
        with pytest.raises(UnsupportedModel, match="granularity 'layer' works"):
            generate(family, engine_config(3, 1, unit="block"), prompts=PROMPTS)
        return
    num_units = len(find_units(tiny_model(family).model, "block"))
    plans = random_plans(7, num_units)
    tokens = generate(family, engine_config(num_units // 2, 1, unit="block"), prompts=PROMPTS, before_step=plans)
    assert tokens == stock_tokens(family)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt_oss", torch.float16),  # in bfloat16 its tiny router chooses another expert by rounding
        *(
            (family, dtype)
            for family in ("gemma2", "gemma4", "deepseek_v3")
            for dtype in (torch.bfloat16, torch.float16)
        ),
    ],
)
def test_tokens_in_sixteen_bits_are_those_without_offloading(family: str, dtype: torch.dtype) -> None:
    """Of those whose attention or cache is computed apart from the others'."""
    tokens = [generate(family, engine_config(k, 1), prompts=PROMPTS, dtype=dtype) for k in (0, 3)]
    assert tokens[0] == tokens[1]


# -- contexts for which a batch cannot have one set of factors ----------------------------------------------------


@pytest.mark.parametrize(("family", "reason"), [("phi3_longrope", "rope_type longrope"), ("llama_dynamic", "dynamic")])
def test_contexts_end_where_rotary_factors_change(family: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers chooses them by the longest request of a step, for all of them."""
    with Engine(tiny_model(family), engine_config(2, 1)) as engine:
        assert engine.max_model_len == 40
        snapshot = engine.snapshot()
        assert (snapshot["max_model_len"], reason in snapshot["max_model_len_reason"]) == (40, True)
        (prompt,) = make_prompts([36])
        with pytest.raises(RequestError, match=f"more than the 40 tokens that a request may have here .*{reason}"):
            engine.submit(prompt, greedy(5))
        engine.submit(prompt, greedy(4)).result()
    assert any("40 tokens" in record.message and reason in record.message for record in caplog.records)


def test_a_context_limit_is_the_least_of_all_rotary_embeddings() -> None:
    types = ["sliding_attention", "full_attention"]
    limits = {}
    for length in (16, 64):
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": length,
            },
        }
        config = AutoConfig.for_model(
            "gemma3_text", head_dim=8, num_hidden_layers=2, layer_types=types, rope_parameters=rope
        )
        config.max_position_embeddings = 32
        limit = context_limit(config)
        assert limit is not None
        limits[length] = limit
    assert {length: limit.num_tokens for length, limit in limits.items()} == {16: 16, 64: 32}
    assert [limit.is_narrowed for limit in limits.values()] == [True, False]


def test_a_rotary_embedding_that_does_not_say_where_its_factors_change_is_refused() -> None:
    config = tiny_model("phi3_longrope").model.config
    config.rope_parameters = {**config.rope_parameters, "original_max_position_embeddings": None}
    with pytest.raises(UnsupportedModel, match="phi3: rope_type longrope .*original_max_position_embeddings is None"):
        check_architecture(config)


def test_a_model_without_such_factors_has_the_context_that_it_says() -> None:
    for settings in ({}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}):
        limit = context_limit(AutoConfig.for_model("llama", max_position_embeddings=512, **settings))
        assert limit is not None
        assert (limit.num_tokens, limit.is_narrowed) == (512, False)


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("an encoder-decoder model", {}),
    "bart": ("an encoder-decoder model", {}),
    "mamba": ("linear_attention layers, which keep a recurrent state .*state space", {}),
    "falcon_mamba": ("linear_attention layers, which keep a recurrent state .*state space", {}),
    "rwkv": ("layers that keep a recurrent state", {}),
    "jamba": ("linear_attention layers, which keep a recurrent state", {}),
    "qwen3_next": ("linear_attention layers, which keep a recurrent state", {}),
    "recurrent_gemma": ("linear_attention layers, which keep a recurrent state", {}),
    "granitemoehybrid": ("linear_attention layers, which keep a recurrent state", {}),
    "falcon_h1": ("hybrid layers, which keep a recurrent state .*beside attention", {}),
    "lfm2": ("conv layers, which keep the state of a convolution", {"layer_types": ["conv", "full_attention"]}),
    "llama4_text": ("chunked_attention layers, which attend within chunks", {}),
    "deepseek_v32": ("indexed_attention layers, which attend to keys that an indexer selects", {}),
    "deepseek_v4": ("compressed_sparse_attention layers, which attend to compressed keys", {}),
    "falcon": ("computes attention in code of its own", {}),
    "bloom": ("computes attention in code of its own", {}),
    "gptj": ("computes attention in code of its own", {}),
    "clip": ("no class in transformers that generates text", {}),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_a_configuration_rules_out_is_refused_by_it_alone(model_type: str) -> None:
    reason, settings = REFUSED[model_type]
    settings = {**settings, **({"num_hidden_layers": 2} if settings else {})}
    with pytest.raises(UnsupportedModel, match=f"^{model_type} .*{reason}"):
        check_architecture(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", ["bart", "falcon_mamba", "falcon"])
def test_such_a_model_is_refused_before_its_weights_are_looked_at(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=REFUSED[model_type][0]):
        load_model(ModelConfig(source=str(tmp_path)))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "deepseek_v3", "granitemoehybrid"])
def test_a_checkpoint_of_what_is_served_loads(family: str, tmp_path: Path) -> None:
    """Two have no attention by scaled_dot_product_attention in transformers, which is its default.

    The second load is by way of the shared store, which makes the model again from its configuration.
    """
    model = tiny_model(family).model
    model.save_pretrained(tmp_path / family)
    source = ModelConfig(source=str(tmp_path / family))
    host = HostConfig(weights="shared_memory", directory=str(tmp_path))
    stored = load_on_host(source, host)
    prompts, own = PROMPTS[:2], [load_model(source), stored]
    try:
        for loaded in own:
            with Engine(loaded, engine_config(2, 1)) as engine:
                handles = [engine.submit(prompt, greedy()) for prompt in prompts]
                assert [handle.result() for handle in handles] == stock_tokens(family)[:2]
    finally:
        if stored.store is not None:
            stored.store.close()


TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
SEEN_AS_IT_RUNS = {
    "bert": "is no decoder: in layer 0 tokens attend to those after them",
    "doge": "wants a mask of its own of its attention",
    "nemotron": "is not given what continuous batching gives to its model",
}


@pytest.mark.parametrize("model_type", SEEN_AS_IT_RUNS)
def test_what_attention_is_asked_for_and_cannot_do_is_refused(model_type: str) -> None:
    """Of these a short text, as in the self-test, may come out right."""
    with pytest.raises(UnsupportedModel, match=SEEN_AS_IT_RUNS[model_type]):
        shapes_of(AutoConfig.for_model(model_type, **TINY))


def test_a_window_that_the_cache_does_not_keep_is_refused() -> None:
    config = AutoConfig.for_model("mistral", **TINY, sliding_window=12)
    config.layer_types = ["full_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match=r"layer 0 attends to the last 12 keys.*full_attention.*keeps all keys"):
        shapes_of(config)


def test_a_window_that_the_attention_does_not_have_is_refused() -> None:
    """The cache would keep no more than the window, and longer texts would come out wrong."""
    config = AutoConfig.for_model("llama", **TINY, sliding_window=250)
    with pytest.raises(UnsupportedModel, match=r"layer 0 attends to all keys.*the last 250 keys.*sliding_window"):
        shapes_of(config)


def test_an_attention_may_know_its_window_by_itself() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
    config = AutoConfig.for_model("qwen2_moe", **TINY, **sliding, num_experts=4, moe_intermediate_size=24)
    assert set(shapes_of(config)) == {"sliding_attention", "full_attention"}


def test_rows_of_the_cache_are_as_wide_as_what_is_kept() -> None:
    def shape(num_heads: int, head_dim: int) -> KvShape:
        return KvShape(num_heads=num_heads, head_dim=head_dim)

    shapes = {family: shapes_of(tiny_model(family).model.config) for family in ("gemma4", "deepseek_v3", "jetmoe")}
    assert shapes == {
        "gemma4": {"sliding_attention": shape(2, 8), "full_attention": shape(1, 16)},
        "deepseek_v3": {"full_attention": shape(4, 20)},
        "jetmoe": {"full_attention": shape(4, 8)},
    }


def shapes_of(config: PreTrainedConfig) -> dict[str, KvShape]:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    before = model.config._attn_implementation
    try:
        return kv_shapes(model, last_of_a_new_kind(find_units(model)).module)
    finally:
        assert model.config._attn_implementation == before
        assert not any(module._forward_hooks for module in model.modules())
