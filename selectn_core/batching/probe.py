"""What a model's attention asks for, seen in a forward of one token: the shape of its keys and values, and its windows.

Configurations have many names for these, and some say something else than what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from selectn_core.errors import UnsupportedModel

PROBE_NAME = "selectn_probe"
_OBSERVER = "selectn_observer"
# What transformers' layers hand to an attention function beside queries, keys and values, and `varlen_attention` does
# or has no use for. Anything else would change what is computed.
_UNDERSTOOD = {
    "scaling",
    "dropout",
    "softcap",
    "s_aux",
    "sliding_window",
    "is_causal",
    "position_ids",
    "position_embeddings",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cache_position",
    "attention_mask",
    "layer_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    _OBSERVER,
}


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """A token's row in the cache of one layer, twice: for its keys and for its values, of which the wider counts.

    `is_plain`: the layers that were seen have neither soft caps on their scores nor sinks.
    """

    num_heads: int
    head_dim: int
    is_plain: bool = True


def kv_shapes(model: PreTrainedModel, last: nn.Module) -> dict[str, KvShape]:
    """The shapes of every attention type's keys and values, by a forward of one token up to the end of `last`.

    The model must be able to run where it is. What it computes means nothing. Raises UnsupportedModel for layers that
    do not attend through transformers' AttentionInterface, or want of it what `varlen_attention` does not do.
    """
    config = model.config.get_text_config()
    type_of = {layer: name for name, layers in group_layers_by_attn_type(config).items() for layer in layers}
    shapes: dict[str, KvShape] = {}
    name = model.config.model_type

    def observe(module: nn.Module, key: torch.Tensor, value: torch.Tensor, wanted: dict[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        if layer not in type_of:
            raise UnsupportedModel(f"{name}: {type(module).__name__} attends, and is no decoder layer's attention")
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"{name} is no decoder: in layer {layer} tokens attend to those after them, too")
        other = sorted(key for key, value in wanted.items() if value is not None and key not in _UNDERSTOOD)
        if other:
            raise UnsupportedModel(f"{name} wants {', '.join(other)} of its attention, which is not done here")
        window = getattr(config, "sliding_window", None) if type_of[layer] == "sliding_attention" else None
        # An attention that is handed no window has none, whatever its configuration says. Some know theirs themselves.
        if (own := wanted.get("sliding_window", getattr(module, "sliding_window", None))) != window:
            raise UnsupportedModel(
                f"{name}: layer {layer} attends to {_keys(own)}, and as a layer of {type_of[layer]} the cache keeps "
                f"{_keys(window)} for it: sliding_window and layer_types in its configuration say something else"
            )
        is_plain = wanted.get("softcap") is None and wanted.get("s_aux") is None
        shape = KvShape(num_heads=key.shape[1], head_dim=max(key.shape[-1], value.shape[-1]), is_plain=is_plain)
        before = shapes.setdefault(type_of[layer], shape)
        shapes[type_of[layer]] = replace(before, is_plain=before.is_plain and is_plain)
        if replace(before, is_plain=is_plain) != shape or value.shape[1] != key.shape[1]:
            raise UnsupportedModel(
                f"{name}: layers of {type_of[layer]} differ in the shape of their keys and values "
                f"({shape} in layer {layer}, {shapes[type_of[layer]]} before)"
            )

    with _attending_by(model, PROBE_NAME), suppress(Enough), stopping_after(last), torch.no_grad():
        input_ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=input_ids, use_cache=False, **{_OBSERVER: observe})
    if missing := sorted(set(type_of.values()) - set(shapes)):
        raise UnsupportedModel(
            f"{name}: layers of {' and '.join(missing)} do not attend through transformers' AttentionInterface"
        )
    return shapes


def _keys(window: int | None) -> str:
    return "all keys" if window is None else f"the last {window} keys"


def _observed(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention that computes nothing and tells the observer that every layer has been given."""
    if _OBSERVER not in kwargs:
        raise UnsupportedModel(
            f"{type(module).__name__} is not given what continuous batching gives to its model: "
            f"its layers do not pass keyword arguments on"
        )
    kwargs[_OBSERVER](module, key, value, {**kwargs, "a mask of its own": attention_mask})
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@contextmanager
def _attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class Enough(Exception):
    """What matters of a forward has run."""


@contextmanager
def stopping_after(module: nn.Module) -> Iterator[None]:
    """A forward within the block ends with Enough when it has come through `module`."""

    def stop(*_: object) -> None:
        raise Enough

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


AttentionInterface.register(PROBE_NAME, _observed)
