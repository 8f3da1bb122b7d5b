"""What can be offloaded: a model's decoder layers or the blocks in them, found by structure, with their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from selectn_core.device import align_up
from selectn_core.errors import UnsupportedModel
from selectn_core.weights.architecture import check_architecture

# Vectorised kernels may round differently on data aligned differently; a copy must compute what its source did.
TENSOR_ALIGNMENT_BYTES = 256
_LAYERS_WORK = "granularity 'layer' works: set offload.unit to it"


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
    """A module whose parameters move as one contiguous buffer of `num_bytes` bytes.

    `index` is its place in the step, `layer` the decoder layer that it is or belongs to. Units of one `kind` have equal
    parameters and compute alike: their class, and their attention's type where the model has several.
    """

    index: int
    layer: int
    kind: str
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


def find_units(model: PreTrainedModel, granularity: str = "layer") -> list[Unit]:
    """What of a transformers causal language model can be offloaded, in the order of the step.

    At granularity "layer" that is its decoder layers; at "block" it is, of each layer, those children that have
    matrices: attention, MLP or experts. Their parameters are a part of the layer's manifest, in the same order;
    norms and the like belong to no unit then.

    Raises UnsupportedModel, saying why, for a model that cannot be served with offloading at this granularity.
    """
    check_architecture(model.config)
    name, layers = _decoder_layers(model)
    units = _make_units(model, [(i, f"{name}.{i}", layer) for i, layer in enumerate(layers)])
    _refuse_shared_parameters(model, units)
    if granularity == "layer":
        return units
    units = _make_units(
        model, [(i, *block) for i, layer in enumerate(layers) for block in _blocks(f"{name}.{i}", layer)]
    )
    try:
        _refuse_shared_parameters(model, units)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; {_LAYERS_WORK}") from None
    return units


def last_of_a_new_kind(units: Sequence[Unit]) -> Unit:
    """The unit after which each kind has been seen."""
    first: dict[str, Unit] = {}
    for unit in units:
        first.setdefault(unit.kind, unit)
    return max(first.values(), key=lambda unit: unit.index)


@contextmanager
def running_in_order(model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
    """Meanwhile every forward of `model` runs every unit once, in their order; UnsupportedModel where one does not.

    The order is that in which modules are registered, and what calls a part of a unit passes the unit's hooks by:
    structure shows neither. Enter it after whatever else hooks the units.
    """
    expected = 0

    def begin(*_: object) -> None:
        nonlocal expected
        expected = 0

    def run(unit: Unit) -> None:
        nonlocal expected
        if unit.index != expected:
            _refuse_order(units, expected, f"{unit.name} runs")
        expected += 1

    def end(*_: object) -> None:
        if expected != len(units):
            _refuse_order(units, expected, "the step ends")

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    handles += [unit.module.register_forward_pre_hook(lambda *_, unit=unit: run(unit), prepend=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_order(units: Sequence[Unit], expected: int, what: str) -> None:
    due = units[expected].name if expected < len(units) else "the end of the step"
    are_blocks = len({unit.layer for unit in units}) < len(units)
    raise UnsupportedModel(
        f"{what} where {due} should: units must run once in a step, in the order in which they are registered"
        + (f"; {_LAYERS_WORK}" if are_blocks else "")
    )


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


def _blocks(layer_name: str, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layer's children with matrices, with their names in the model, as they are registered."""
    blocks = [
        (f"{layer_name}.{name}", child)
        for name, child in layer.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters())
    ]
    if len(blocks) < 2 or any(isinstance(block, nn.ModuleList | nn.ModuleDict) for _, block in blocks):
        found = ", ".join(name for name, _ in blocks) or "none"
        raise UnsupportedModel(
            f"{layer_name} ({type(layer).__name__}) has no blocks that could be offloaded apart: expected two children "
            f"or more that compute with weights of their own, found {found}; {_LAYERS_WORK}"
        )
    return blocks


def _make_units(model: PreTrainedModel, modules: Sequence[tuple[int, str, nn.Module]]) -> list[Unit]:
    """A unit for each (layer, name, module)."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    units: list[Unit] = []
    alike: dict[str, list[tuple[tuple[str, tuple[int, ...]], ...]]] = {}  # kind -> the manifests seen
    for layer, name, module in modules:
        specs, num_bytes = _manifest(module)
        kind = type(module).__name__
        if len(set(layer_types)) > 1 and _attends_as(module, layer):
            kind = f"{kind}/{layer_types[layer]}"
        shapes = tuple((spec.name, spec.shape) for spec in specs)
        seen = alike.setdefault(kind, [])
        if shapes not in seen:  # as in a model whose class of layer is dense in one and has experts in another
            seen.append(shapes)
        number = seen.index(shapes) + 1
        units.append(
            Unit(
                index=len(units),
                layer=layer,
                kind=kind if number == 1 else f"{kind}#{number}",
                name=name,
                module=module,
                tensors=specs,
                parameters=tuple(module.parameters()),
                num_bytes=num_bytes,
            )
        )
    return units


def _manifest(module: nn.Module) -> tuple[tuple[TensorSpec, ...], int]:
    """The module's parameters one after the other, each aligned; and the bytes that they take."""
    specs, offset = [], 0
    for name, parameter in module.named_parameters():
        specs.append(
            TensorSpec(
                name=name,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                offset=offset,
                num_bytes=parameter.nbytes,
            )
        )
        offset = align_up(offset + parameter.nbytes, TENSOR_ALIGNMENT_BYTES)
    return tuple(specs), offset


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
