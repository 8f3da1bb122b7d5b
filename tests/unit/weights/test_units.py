"""Units are found by structure; what cannot work is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from selectn_core.device import align_up
from selectn_core.errors import UnsupportedModel
from selectn_core.weights.units import TENSOR_ALIGNMENT_BYTES, find_units
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, tiny_model

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_with_all_its_parameters(family) -> None:
    model = tiny_model(family).model
    units = find_units(model)
    assert [unit.index for unit in units] == list(range(NUM_LAYERS))
    for unit in units:
        assert {spec.name for spec in unit.tensors} == {name for name, _ in unit.module.named_parameters()}
        for spec, parameter in zip(unit.tensors, unit.parameters, strict=True):
            assert (spec.shape, spec.dtype, spec.num_bytes) == (
                tuple(parameter.shape),
                parameter.dtype,
                parameter.nbytes,
            )
            assert spec.offset % TENSOR_ALIGNMENT_BYTES == 0
    ends = [spec.offset + spec.num_bytes for spec in units[0].tensors]
    assert all(end <= spec.offset for end, spec in zip(ends, units[0].tensors[1:], strict=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_pieces_of_their_layers_in_the_order_of_the_step(family) -> None:
    model = tiny_model(family).model
    layers, blocks = find_units(model), find_units(model, "block")
    assert [unit.index for unit in blocks] == list(range(len(blocks)))
    assert [unit.layer for unit in blocks] == sorted(unit.layer for unit in blocks)
    for layer in layers:
        mine = [unit for unit in blocks if unit.layer == layer.index]
        children = ["self_attn", "fc1", "fc2"] if family == "opt" else ["self_attn", "mlp"]
        assert [unit.name for unit in mine] == [f"{layer.name}.{child}" for child in children]
        in_layer = {spec.name: spec for spec in layer.tensors}
        for unit, child in zip(mine, children, strict=True):
            assert {spec.name for spec in unit.tensors} == {name for name, _ in unit.module.named_parameters()}
            start = in_layer[f"{child}.{unit.tensors[0].name}"].offset
            for spec in unit.tensors:
                theirs = in_layer[f"{child}.{spec.name}"]
                assert (spec.offset + start, spec.num_bytes, spec.shape, spec.dtype) == (
                    theirs.offset,
                    theirs.num_bytes,
                    theirs.shape,
                    theirs.dtype,
                )
        left = layer.num_bytes - sum(unit.num_bytes for unit in mine)
        norms = [spec for spec in layer.tensors if spec.name.partition(".")[0] not in children]
        assert left == sum(align_up(spec.num_bytes, TENSOR_ALIGNMENT_BYTES) for spec in norms)
        assert left < layer.num_bytes / 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_units_of_a_kind_are_alike(family, granularity) -> None:
    units = find_units(tiny_model(family).model, granularity)
    shapes: dict[str, set] = {}
    for unit in units:
        shapes.setdefault(unit.kind, set()).add(tuple((spec.name, spec.shape) for spec in unit.tensors))
    assert all(len(each) == 1 for each in shapes.values())
    per_layer = {"opt": 3}.get(family, 2) if granularity == "block" else 1
    assert len(shapes) == per_layer + (family == "qwen2_moe"), "dense and sparse layers differ"


def test_attention_types_are_kinds_of_their_own() -> None:
    types = ["sliding_attention", "full_attention"]
    model = from_config("qwen2", **TINY, intermediate_size=48, layer_types=types, sliding_window=8)
    assert [unit.kind for unit in find_units(model)] == [f"Qwen2DecoderLayer/{each}" for each in types]
    assert [unit.kind for unit in find_units(model, "block")] == [
        "Qwen2Attention/sliding_attention",
        "Qwen2MLP",
        "Qwen2Attention/full_attention",
        "Qwen2MLP",
    ]


class _OneBlock(nn.Module):
    """A layer that computes in one child."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.everything = layer.input_layernorm, layer


class _ListOfExperts(nn.Module):
    """A layer whose experts are a list: nothing calls that as a whole."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.experts = layer.self_attn, nn.ModuleList([layer.get_submodule("mlp")])


@pytest.mark.parametrize("layer_class", [_OneBlock, _ListOfExperts])
def test_layers_without_blocks_can_move_as_a_whole_only(layer_class) -> None:
    model = tiny_model().model
    model.model.layers = nn.ModuleList(layer_class(layer) for layer in model.model.layers)
    assert len(find_units(model)) == NUM_LAYERS
    with pytest.raises(UnsupportedModel, match=r"layers\.0 \(_.*\) has no blocks .* granularity 'layer' works"):
        find_units(model, "block")


def test_blocks_that_share_a_parameter_can_move_as_a_layer_only() -> None:
    model = tiny_model().model
    model.model.layers[2].mlp.shared = model.model.layers[2].self_attn.k_proj.weight
    assert len(find_units(model)) == NUM_LAYERS
    with pytest.raises(
        UnsupportedModel, match=r"2\.self_attn and .*2\.mlp share parameters.*granularity 'layer' works"
    ):
        find_units(model, "block")


def test_layers_of_a_mixture_of_experts_differ_in_size() -> None:
    sizes = {unit.num_bytes for unit in find_units(tiny_model("qwen2_moe").model)}
    assert len(sizes) == 2


def test_views_round_trip() -> None:
    unit = find_units(tiny_model().model)[1]
    buffer = torch.zeros(unit.num_bytes, dtype=torch.uint8)
    before = [parameter.clone() for parameter in unit.parameters]
    views = unit.views(buffer)
    for view, parameter in zip(views, unit.parameters, strict=True):
        view.copy_(parameter)
    unit.bind(views)
    for parameter, old in zip(unit.parameters, before, strict=True):
        assert torch.equal(parameter, old)
        assert buffer.data_ptr() <= parameter.data_ptr() < buffer.data_ptr() + unit.num_bytes


def from_config(model_type: str, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=50, **settings))


def test_layers_that_share_a_parameter_are_refused() -> None:
    model = tiny_model().model
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.0 and .*layers\.2 share parameters"):
        find_units(model)


def test_a_layer_that_shares_a_parameter_with_the_rest_is_refused() -> None:
    """The rest would read whatever unit is in the slot at that moment."""
    model = tiny_model().model
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.1 and model\.norm\.weight share parameters"):
        find_units(model)


def test_layers_that_are_not_where_they_should_be_are_refused() -> None:
    model = tiny_model().model
    model.config.num_hidden_layers = NUM_LAYERS - 1
    with pytest.raises(UnsupportedModel, match=f"expected one list of {NUM_LAYERS - 1} decoder layers"):
        find_units(model)
