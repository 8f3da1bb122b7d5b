"""Tiny seeded models of every supported family, built from configurations: no checkpoint, no network."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selectn_core.weights.checkpoint import LoadedModel

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

_MIXED = {
    "sliding_window": 12,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ],
}
_UNTIED = {"tie_word_embeddings": False}  # of these the embedding of the last token would choose the next
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_GATED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 5.0, 8.0],
    "factor": 6.4,
}

# What these have that those above have not: other norms, scales, rotary embeddings of some layers alone or of long
# contexts, windows in some layers, keys shared by layers, or not as wide as values, experts of other kinds.
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {"model_type": "olmo2", **_GATED},
    "olmo3": {"model_type": "olmo3", **_GATED, **_MIXED},
    "granite": {
        "model_type": "granite",
        **_GATED,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON, "intermediate_size": 48},
    "smollm3": {"model_type": "smollm3", **_GATED, "no_rope_layers": [1, 1, 0, 1, 0]},
    "cohere2": {"model_type": "cohere2", **_GATED, **_MIXED},
    "starcoder2": {"model_type": "starcoder2", **_GATED, **_UNTIED, "sliding_window": 12},
    "gemma2": {"model_type": "gemma2", **_GATED, **_MIXED, **_UNTIED, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "gemma3": {"model_type": "gemma3_text", **_GATED, **_MIXED, **_UNTIED, "head_dim": 8},
    "gemma4": {
        "model_type": "gemma4_text",
        **_GATED,
        **_MIXED,
        **_UNTIED,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "mixtral": {"model_type": "mixtral", **_GATED, **_EXPERTS},
    "qwen3_moe": {"model_type": "qwen3_moe", **_MOE, "head_dim": 8, "decoder_sparse_step": 1},
    "glm4": {"model_type": "glm4", **_GATED, "head_dim": 8},
    "exaone4": {"model_type": "exaone4", **_GATED, **_MIXED},
    "ministral3": {
        "model_type": "ministral3",
        **_GATED,
        "head_dim": 8,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8},
    },
    "modernbert-decoder": {
        "model_type": "modernbert-decoder",
        **_COMMON,
        **_MIXED,
        "intermediate_size": 48,
        "local_attention": 24,
        "cls_token_id": 3,
        "sep_token_id": 4,
    },
    "gpt2": {
        "model_type": "gpt2",
        **_UNTIED,
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_oss": {"model_type": "gpt_oss", **_GATED, **_MIXED, **_EXPERTS, "head_dim": 8, "rope_parameters": _YARN},
    "mimo_v2_flash": {
        "model_type": "mimo_v2_flash",
        **_GATED,
        **_MIXED,
        "head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "deepseek_v2": {"model_type": "deepseek_v2", **_LATENT},
    "deepseek_v3": {"model_type": "deepseek_v3", **_LATENT},
    "jetmoe": {"model_type": "jetmoe", **_GATED, **_EXPERTS, "kv_channels": 8},
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **_GATED,
        **_EXPERTS,
        "layer_types": ["attention"] * NUM_LAYERS,
        "shared_intermediate_size": 24,
        "mamba_n_heads": 8,
    },
    "phi3_longrope": {
        "model_type": "phi3",
        **_GATED,
        "rope_parameters": {**_LONG_ROPE, "original_max_position_embeddings": 40},
        "original_max_position_embeddings": 40,
    },
    "llama_dynamic": {
        "model_type": "llama",
        **_GATED,
        "max_position_embeddings": 40,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
}

# Sectors of the KV cache that hold several blocks: of two kinds of attention, three layers and two; or blocks of 320
# bytes, smaller than in any real model, which may also be kept for their prefix.
SEVERAL_BLOCKS: dict[str, dict[str, Any]] = {
    "qwen2_mixed": {**FAMILIES["qwen2"], "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
    "llama_small_blocks": {**FAMILIES["llama"], "num_key_value_heads": 1, "head_dim": 2},
}


@cache
def _template(family: str, dtype: torch.dtype) -> PreTrainedModel:
    settings = dict({**FAMILIES, **OTHER_FAMILIES, **SEVERAL_BLOCKS}[family])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A fresh copy of the family's model; the same weights every time."""
    return LoadedModel(model=copy.deepcopy(_template(family, dtype)), tokenizer=None, name=f"tiny-{family}")
