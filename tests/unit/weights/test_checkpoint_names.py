"""Experts in a checkpoint are numbered as the model's are, or refused: transformers would stack whatever is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectn_core.config import ModelConfig
from selectn_core.errors import ConfigError
from selectn_core.weights.checkpoint import load_model
from tests.support.tiny_models import tiny_model

WEIGHTS = "model.safetensors"
# Of each family: the experts of its second layer, and one matrix of an expert.
FAMILIES = {
    "qwen3_moe": ("model.layers.1.mlp.experts", "down_proj.weight"),
    "mixtral": ("model.layers.1.block_sparse_moe.experts", "w2.weight"),
}
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[Path, str, str]:
    path = tmp_path_factory.mktemp("models") / request.param
    tiny_model(request.param).model.save_pretrained(path)
    return path, *FAMILIES[request.param]


def changed(source: Path, to: Path, change: Change = dict, **config: object) -> Path:
    shutil.copytree(source, to)
    tensors = change(load_file(source / WEIGHTS))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, to / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**values, **config}))
    return to


def refusal(source: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(ModelConfig(source=str(source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def test_experts_that_are_numbered_otherwise_are_named(family, tmp_path) -> None:
    source, _, matrix = family
    said = refusal(changed(source, tmp_path / "m", renamed("experts.0.", "experts.9.")))
    assert f"experts.0.{matrix}" in said.split("left over")[0].split("missing")[1]
    assert f"experts.9.{matrix}" in said.split("left over")[1]


def test_one_matrix_that_is_numbered_otherwise_is_named(family, tmp_path) -> None:
    source, experts, matrix = family
    name, other = f"{experts}.0.{matrix}", f"{experts}.9.{matrix}"
    said = refusal(changed(source, tmp_path / "m", renamed(name, other)))
    assert f"missing: {name}; left over: {other}" in said
    assert WEIGHTS in said


def test_a_missing_matrix_and_a_missing_expert_are_named(family, tmp_path) -> None:
    source, experts, matrix = family
    name = f"{experts}.2.{matrix}"
    without = changed(source, tmp_path / "a", lambda tensors: {k: v for k, v in tensors.items() if k != name})
    assert f"missing: {name}" in refusal(without)
    last = changed(source, tmp_path / "b", lambda tensors: {k: v for k, v in tensors.items() if "experts.3." not in k})
    assert f"experts.3.{matrix}" in refusal(last)


def test_an_expert_too_many_is_named_with_the_field_that_says_how_many(family, tmp_path) -> None:
    source, experts, matrix = family

    def more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        extra = {k.replace("experts.3.", "experts.4."): v for k, v in tensors.items() if f"{experts}.3." in k}
        return {**tensors, **extra}

    said = refusal(changed(source, tmp_path / "m", more))
    assert "experts=4" in said
    assert f"{experts}.4.{matrix}" in said


def test_experts_under_two_prefixes_are_refused(family, tmp_path) -> None:
    source, experts, matrix = family
    half = [f"{experts}.2.", f"{experts}.3."]
    said = refusal(
        changed(
            source,
            tmp_path / "m",
            lambda tensors: {
                (k.removeprefix("model.") if k.startswith(tuple(half)) else k): v for k, v in tensors.items()
            },
        )
    )
    assert f"{experts.removeprefix('model.')}.0.{matrix}" in said.split("left over")[0].split("missing")[1]
    twice = refusal(
        changed(source, tmp_path / "n", lambda tensors: {**tensors, **renamed("model.layers", "layers")(tensors)})
    )
    assert "twice" in twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 5}, ("num_experts_per_tok=5", "experts=4")),
        ({"decoder_sparse_step": 0}, ("decoder_sparse_step=0",)),
    ],
    ids=["more_than_there_are", "no_step"],
)
def test_numbers_of_experts_that_cannot_be_name_the_field(family, tmp_path, changes, words) -> None:
    source, _, _ = family
    said = refusal(changed(source, tmp_path / "m", **changes))
    assert not [word for word in ("config.json", *words) if word not in said], said


def test_whole_ones_load(family) -> None:
    source, _, _ = family
    load_model(ModelConfig(source=str(source)))
