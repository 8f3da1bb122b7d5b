"""What can be offloaded: a model's decoder layers, found by structure, each with a manifest of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from selectn_core.device import align_up
from selectn_core.errors import UnsupportedModel

# Vectorised kernels may round differently on data aligned differently; a copy must compute what its source did.
TENSOR_ALIGNMENT_BYTES = 256
ATTENTION_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One parameter in a unit's buffer; `offset` and `num_bytes` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """A module whose parameters move as one contiguous buffer of `num_bytes` bytes."""

    index: int
    name: str
    module: nn.Module
    tensors: tuple[TensorSpec, ...]
    parameters: tuple[nn.Parameter, ...]
    num_bytes: int

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The unit's tensors as views of `buffer` (uint8 [num_bytes]), in the manifest's order."""
        return [
            buffer[spec.offset : spec.offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for spec in self.tensors
        ]

    def bind(self, views: Sequence[torch.Tensor]) -> None:
        """Makes the module's parameters be `views`."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


def find_units(model: PreTrainedModel) -> list[Unit]:
    """The decoder layers of a transformers causal language model, in the order of the step.

    Raises UnsupportedModel, saying why, for a model that cannot be served with offloading.
    """
    _refuse_unsupported(model)
    name, layers = _decoder_layers(model)
    units = [_make_unit(i, f"{name}.{i}", layer) for i, layer in enumerate(layers)]
    _refuse_shared_parameters(model, units)
    return units


def _refuse_unsupported(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder model; only decoders are served")
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    if other := sorted(layer_types - set(ATTENTION_TYPES)):
        raise UnsupportedModel(
            f"{config.model_type} has {', '.join(other)} layers; continuous batching keeps a cache for "
            f"{' and '.join(ATTENTION_TYPES)} only"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModel(f"{config.model_type} caps its attention logits, which the attention here does not do")
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()):
        raise UnsupportedModel(f"{config.model_type} has attention sinks, which the attention here does not do")


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one ModuleList with num_hidden_layers entries of which entry i attends as layer i."""
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(_attends_as(layer, i) for i, layer in enumerate(module))
    ]
    if len(found) != 1:
        what = ", ".join(name for name, _ in found) or "none"
        raise UnsupportedModel(
            f"{model.config.model_type}: expected one list of {num_layers} decoder layers, each with attention "
            f"that knows its layer_idx; found {what}"
        )
    return found[0]


def _attends_as(layer: nn.Module, index: int) -> bool:
    return any(getattr(module, "layer_idx", None) == index for module in layer.modules())


def _make_unit(index: int, name: str, module: nn.Module) -> Unit:
    specs, parameters, offset = [], [], 0
    for parameter_name, parameter in module.named_parameters():
        specs.append(
            TensorSpec(
                name=parameter_name,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                offset=offset,
                num_bytes=parameter.nbytes,
            )
        )
        parameters.append(parameter)
        offset = align_up(offset + parameter.nbytes, TENSOR_ALIGNMENT_BYTES)
    return Unit(
        index=index,
        name=name,
        module=module,
        tensors=tuple(specs),
        parameters=tuple(parameters),
        num_bytes=offset,
    )


def _refuse_shared_parameters(model: PreTrainedModel, units: list[Unit]) -> None:
    owner: dict[int, Unit] = {}
    for unit in units:
        for parameter in unit.parameters:
            other = owner.setdefault(id(parameter), unit)
            if other is not unit:
                raise UnsupportedModel(f"{other.name} and {unit.name} share parameters; neither can move alone")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder = owner.get(id(parameter))
        if holder is not None and not name.startswith(f"{holder.name}."):
            raise UnsupportedModel(f"{holder.name} and {name} share parameters; a unit's weights must be its own")
