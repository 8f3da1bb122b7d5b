"""Tiny seeded models of every supported family, built from configurations: no checkpoint, no network."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selectn_core.loading import LoadedModel

VOCAB_SIZE = 131
NUM_LAYERS = 5
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Far from zero, so that layers matter and greedy choices are not ties.
    "initializer_range": 0.3,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_MOE = {
    **_GATED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GATED},
    "qwen2": {"model_type": "qwen2", **_GATED},
    "qwen3": {"model_type": "qwen3", **_GATED, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_GATED, "sliding_window": 12},
    "gemma": {"model_type": "gemma", **_GATED, "head_dim": 8},
    "opt": {"model_type": "opt", **_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi3": {"model_type": "phi3", **_GATED},
    # Every other layer is dense: units of unequal size.
    "qwen2_moe": {"model_type": "qwen2_moe", **_MOE, "decoder_sparse_step": 2},
}

# Sectors of the KV cache that hold several blocks: of two kinds of attention, three layers and two; or blocks of 320
# bytes, smaller than in any real model, which may also be kept for their prefix.
SEVERAL_BLOCKS: dict[str, dict[str, Any]] = {
    "qwen2_mixed": {**FAMILIES["qwen2"], "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
    "llama_small_blocks": {**FAMILIES["llama"], "num_key_value_heads": 1, "head_dim": 2},
}


@cache
def _template(family: str, dtype: torch.dtype) -> PreTrainedModel:
    settings = dict({**FAMILIES, **SEVERAL_BLOCKS}[family])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A fresh copy of the family's model; the same weights every time."""
    return LoadedModel(model=copy.deepcopy(_template(family, dtype)), tokenizer=None, name=f"tiny-{family}")
