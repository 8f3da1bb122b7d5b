"""What a model's configuration says about whether it can be served here, and how far: before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from selectn_core.errors import UnsupportedModel

ATTENTION_TYPES = ("full_attention", "sliding_attention")
_KEPT = f"the KV cache here holds keys and values of {' and '.join(ATTENTION_TYPES)} layers alone"
_STATE = "keep a recurrent state (linear attention or a state space)"
# Of the other types of layer that transformers has, what is kept or done in them.
_OTHER_TYPES = {
    "linear_attention": _STATE,
    "mamba": _STATE,
    "hybrid": f"{_STATE} beside attention",
    "hybrid_sliding": f"{_STATE} beside attention",
    "conv": "keep the state of a convolution",
    "chunked_attention": "attend within chunks of the context",
    "indexed_attention": "attend to keys that an indexer selects",
    "compressed_sparse_attention": "attend to compressed keys",
    "heavily_compressed_attention": "attend to compressed keys",
}


@dataclass(frozen=True, kw_only=True)
class ContextLimit:
    """The most tokens, prompt and output, that a request to this model may have, and what says so.

    `is_narrowed` where that is less than the model could do with what it was trained for.
    """

    num_tokens: int
    reason: str
    is_narrowed: bool = False


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModel, saying what the model has that cannot be served here, for what its configuration shows.

    What only shows when the model runs is left to the probe of its attention and to the self-test. Code that is not
    transformers' own is not judged here.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder model; only decoders are served")
    model_class = _model_class(config)
    text = _text_config(config)
    layer_types = set(getattr(text, "layer_types", None) or ())
    if other := sorted(layer_types - set(ATTENTION_TYPES)):
        what = "; ".join(f"{each} layers{_what_of(each)}" for each in other)
        raise UnsupportedModel(f"{name} has {what}: {_KEPT}")
    if model_class is None:
        return
    if getattr(model_class, "_is_stateful", False) and not layer_types:
        raise UnsupportedModel(f"{name} has layers that {_STATE}: {_KEPT}")
    if not model_class._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{name} computes attention in code of its own, not through transformers' AttentionInterface, "
            f"so it cannot read its keys and values from a paged KV cache"
        )
    context_limit(config)


def context_limit(config: PreTrainedConfig) -> ContextLimit | None:
    """The model's own limit; None where it has none.

    Rotary embeddings of some types have other factors for long contexts than for short ones, and transformers chooses
    them once for all requests of a step. So requests are kept where there is one choice. Raises UnsupportedModel where
    the configuration does not say how far that is.
    """
    text = _text_config(config)
    limits = []
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        limits.append(ContextLimit(num_tokens=longest, reason="max_position_embeddings in its configuration"))
    for rope in _rope_parameters(text):
        rope_type = str(rope.get("rope_type"))
        has_two_sets = rope_type == "longrope" or "long_mscale" in rope
        if not has_two_sets and "dynamic" not in rope_type:
            continue
        field = "original_max_position_embeddings" if has_two_sets else "max_position_embeddings"
        unchanged = rope.get(field) if has_two_sets else longest
        if not isinstance(unchanged, int) or unchanged < 1:
            raise UnsupportedModel(
                f"{config.model_type}: rope_type {rope_type} has other factors for long contexts than for short ones, "
                f"and {field} is {unchanged!r}: it must say how long short ones are"
            )
        reason = f"rope_type {rope_type}: longer contexts need other factors, which a batch cannot mix"
        limits.append(ContextLimit(num_tokens=unchanged, reason=reason, is_narrowed=True))
    # Of two that are equal the later one says more.
    return min(reversed(limits), key=lambda limit: limit.num_tokens, default=None)


def _what_of(layer_type: str) -> str:
    return f", which {_OTHER_TYPES[layer_type]}" if layer_type in _OTHER_TYPES else ""


def _rope_parameters(text: PreTrainedConfig) -> list[dict[str, object]]:
    """The parameters of every rotary embedding: one, or one for each type of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, dict)]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Transformers' class for it; None where the code comes with the model. Raises UnsupportedModel without either."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        return model_class
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    raise UnsupportedModel(f"{config.model_type} has no class in transformers that generates text from tokens alone")


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        return config.get_text_config()
    except ValueError as error:
        raise UnsupportedModel(f"{config.model_type} has several parts that read or write tokens: {error}") from error
