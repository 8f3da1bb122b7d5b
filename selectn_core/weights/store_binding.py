"""A model around tensors that are there: made from its description alone, and bound to a store's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from selectn_core.weights.checkpoint_config import without_tags
from selectn_core.weights.shared_store import SharedStore


def bound_model(store: SharedStore) -> PreTrainedModel:
    """A model whose parameters and buffers are the store's tensors: nobody may write to them."""
    model = empty_model(store.model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for spec, tensor in store.tensors():
        is_parameter = spec.names[0] in parameters
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for name in spec.names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, value)
    return model.eval().requires_grad_(False)


def empty_model(description: dict[str, Any]) -> PreTrainedModel:
    """The model without memory for its tensors."""
    values = without_tags(description["config"])
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, description["dtype"]))
    if description["generation_config"] is not None:
        model.generation_config = GenerationConfig.from_dict(description["generation_config"])
    return model


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
