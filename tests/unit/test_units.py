"""Units are found by structure; what cannot work is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from selectn_core.errors import UnsupportedModel
from selectn_core.units import TENSOR_ALIGNMENT_BYTES, find_units
from tests.tiny_models import FAMILIES, NUM_LAYERS, tiny_model

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


def from_config(model_type: str, auto=AutoModelForCausalLM, **settings) -> nn.Module:
    return auto.from_config(AutoConfig.for_model(model_type, vocab_size=50, **settings))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: from_config("t5", AutoModelForSeq2SeqLM, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=8),
            "encoder-decoder",
        ),
        (
            lambda: from_config("mamba", hidden_size=32, num_hidden_layers=2, state_size=4),
            "linear_attention layers",
        ),
        (
            lambda: from_config("gemma2", **TINY, intermediate_size=48, head_dim=8),
            "caps its attention logits",
        ),
        (
            lambda: from_config(
                "gpt_oss", **TINY, intermediate_size=48, head_dim=8, num_local_experts=2, num_experts_per_tok=1
            ),
            "attention sinks",
        ),
    ],
)
def test_models_that_cannot_work_are_refused_with_the_reason(build, reason) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        find_units(build())


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
