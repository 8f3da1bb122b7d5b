"""GGUF files: what transformers would pass over without a word is applied, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from selectn_core.config import HostConfig, ModelConfig
from selectn_core.errors import ConfigError, SelectNError, UnsupportedModel
from selectn_core.weights.checkpoint import LoadedModel, load_model
from selectn_core.weights.gguf_files import GgufFile, complete_config
from selectn_core.weights.shared_model import load_on_host
from tests.support.broken_checkpoints import LFS_POINTER
from tests.support.store_users import store_of
from tests.unit.weights.test_checkpoint import write_tiny_gguf

HEAD_DIM = 8


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def load(path: Path) -> LoadedModel:
    return load_model(ModelConfig(source=str(path)))


def refusal(path: Path, *words: str, error: type[SelectNError] = ConfigError, source: Path | None = None) -> None:
    """Loading `path` is refused in both ways, in one line with its name and all the words."""
    stores = path.parent / "stores"
    stores.mkdir()
    config = ModelConfig(source=str(source or path))
    host = HostConfig(weights="shared_memory", directory=str(stores))
    for attempt in (lambda: load_model(config), lambda: load_on_host(config, host)):
        with pytest.raises(SelectNError) as caught:
            attempt()
        said = str(caught.value)
        assert type(caught.value) is error, said
        assert not [word for word in (path.name, *words) if word not in said], said
        assert "\n" not in said
        assert caught.value.__cause__ is None
    assert not list(stores.iterdir())


def keys(**values: Any) -> Callable[[GGUFWriter], None]:
    def add(writer: GGUFWriter) -> None:
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        for key, value in values.items():
            adders[type(value)](key, value)

    return add


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TINY.GGUF", "tiny.Gguf", "sha256-4d7a2146"])
def test_a_gguf_file_is_known_by_any_name(good, tmp_path, name) -> None:
    shutil.copy(good, tmp_path / name)
    loaded = load(tmp_path / name)
    assert torch.equal(loaded.model.lm_head.weight, load(good).model.lm_head.weight)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda data: data[:200], ("cut off",)),
        (lambda data: data[: len(data) // 2], ("cut off",)),
        (lambda data: data[:-100], ("cut off",)),
        (lambda data: b"", ("empty",)),
        (lambda data: LFS_POINTER.encode(), ("git-lfs",)),
        (lambda data: b"FUGG" + data[4:], ("GGUF",)),
        (lambda data: data[:4] + b"\x09" + data[5:], ("v9",)),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], ("cut off",)),
        (lambda data: data[:16] + b"\xff" * 7 + b"\x00" + data[24:], ("cut off",)),
        (lambda data: data.replace(b"general.architecture", b"general.architectur_"), ("general.architecture",)),
    ],
    ids=[
        *("cut_in_metadata", "cut_in_tensors", "cut_at_end", "empty", "pointer"),
        *("magic", "version", "number_of_tensors", "number_of_keys", "architecture"),
    ],
)
def test_a_damaged_file_is_refused(good, tmp_path, data: Callable[[bytes], bytes], words) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data(good.read_bytes()))
    refusal(path, *words)


def test_a_directory_of_that_name_is_a_directory(good, tmp_path) -> None:
    (tmp_path / "tiny.gguf").mkdir()
    shutil.copy(good, tmp_path / "tiny.gguf" / "inner.gguf")
    refusal(tmp_path / "tiny.gguf", "config.json", "inner.gguf", "model.source")


def test_a_part_of_a_split_file_is_refused_by_name(good, tmp_path) -> None:
    path = tmp_path / "tiny-00001-of-00002.gguf"
    shutil.copy(good, path)
    refusal(path, "part 1 of 2", "merge")


def test_a_part_of_a_split_file_is_refused_by_metadata(tmp_path) -> None:
    def split(writer: GGUFWriter) -> None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 3)

    refusal(write_tiny_gguf(tmp_path / "first.gguf", more=split), "part 1 of 3")


def test_the_whole_of_one_part_is_no_part(good, tmp_path) -> None:
    shutil.copy(good, tmp_path / "tiny-00001-of-00001.gguf")
    load(tmp_path / "tiny-00001-of-00001.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("split.count", "3"), ("general.alignment", 0), ("general.alignment", 3), ("general.alignment", "x")],
)
def test_metadata_that_no_reader_can_use_is_named(tmp_path, key, value) -> None:
    refusal(write_tiny_gguf(tmp_path / "bad.gguf", more=keys(**{key: value})), key, repr(value))


@pytest.mark.parametrize("kind", ["mmproj", "imatrix"])
def test_what_is_no_model_is_refused(tmp_path, kind) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", more=keys(**{"general.type": kind}))
    refusal(path, "general.type", kind, error=UnsupportedModel)


def test_an_adapter_is_refused(tmp_path) -> None:
    def adapter(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")

    refusal(write_tiny_gguf(tmp_path / "lora.gguf", more=adapter), "lora adapter", error=UnsupportedModel)


def test_an_architecture_that_transformers_does_not_read_is_refused(good, tmp_path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(good.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mango", 1))
    refusal(path, "mango", error=UnsupportedModel)


# -- tensors ------------------------------------------------------------------------------------------------------


def test_a_tensor_that_is_missing_is_named(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "missing.gguf", leave_out="blk.1.ffn_up.weight")
    refusal(path, "missing", "model.layers.1.mlp.up_proj.weight")


def test_layers_that_are_missing_are_named(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "missing.gguf", block_count=3)
    refusal(path, "missing", "model.layers.2.")


def test_layers_that_are_left_over_are_named(tmp_path) -> None:
    refusal(write_tiny_gguf(tmp_path / "more.gguf", block_count=1), "left over", "blk.1.")


def test_a_bias_that_has_no_place_is_named(tmp_path) -> None:
    def bias(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))

    refusal(write_tiny_gguf(tmp_path / "bias.gguf", more=bias), "left over", "blk.0.attn_q.bias")


def test_more_blocks_than_tensors_are_not_built(tmp_path) -> None:
    refusal(write_tiny_gguf(tmp_path / "many.gguf", block_count=10**8), "block_count")


# -- rope ---------------------------------------------------------------------------------------------------------


def with_metadata(**values: Any) -> Callable[[GGUFWriter], None]:
    return keys(**{f"llama.rope.{name.replace('__', '.')}": value for name, value in values.items()})


def frequencies(rope_type: str, theta: float = 10000.0, **parameters: Any) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))[0]


YARN = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 16}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"scaling__type": "linear", "scaling__factor": 4.0}, ("linear", {"factor": 4.0})),
        ({"scale_linear": 4.0}, ("linear", {"factor": 4.0})),
        (YARN, ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16})),
        (
            {**YARN, "scaling__yarn_beta_fast": 16.0, "scaling__attn_factor": 1.0},
            ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}),
        ),
        (
            {"scaling__type": "yarn", "scaling__factor": 4.0},
            ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}),
        ),
    ],
    ids=["linear", "old_linear", "yarn", "yarn_beta", "yarn_no_length"],
)
def test_rope_scaling_is_applied(tmp_path, metadata, expected) -> None:
    path = write_tiny_gguf(tmp_path / "scaled.gguf", more=with_metadata(**metadata))
    rotary = load(path).model.model.rotary_emb
    rope_type, parameters = expected
    assert torch.equal(rotary.inv_freq, frequencies(rope_type, **parameters))
    assert rotary.attention_scaling == (pytest.approx(0.1 * np.log(4) + 1) if rope_type == "yarn" else 1)


def test_a_second_process_has_the_scaling_too(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "scaled.gguf", more=with_metadata(**YARN))
    (tmp_path / "stores").mkdir()
    host = HostConfig(weights="shared_memory", directory=str(tmp_path / "stores"))
    first, second = (load_on_host(ModelConfig(source=str(path)), host) for _ in range(2))
    expected = frequencies("yarn", factor=4.0, original_max_position_embeddings=16)
    for loaded in (first, second):
        rotary = loaded.model.model.rotary_emb
        assert torch.equal(rotary.inv_freq, expected)
        assert rotary.attention_scaling == pytest.approx(0.1 * np.log(4) + 1)
        store_of(loaded).close()


@pytest.mark.parametrize("metadata", [{"scaling__type": "none"}, {"scaling__type": "linear", "scaling__factor": 1.0}])
def test_no_scaling_stays_none(good, tmp_path, metadata) -> None:
    path = write_tiny_gguf(tmp_path / "same.gguf", more=with_metadata(**metadata))
    assert torch.equal(load(path).model.model.rotary_emb.inv_freq, load(good).model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"scaling__type": "spiral", "scaling__factor": 2.0}, ("rope.scaling.type", "spiral")),
        ({"scaling__type": "longrope", "scaling__factor": 2.0}, ("rope.scaling.type", "longrope")),
        ({**YARN, "scaling__attn_factor": 0.5}, ("rope.scaling.attn_factor", "0.5")),
        ({**YARN, "scaling__factor": 1.0, "scaling__attn_factor": 0.5}, ("rope.scaling.attn_factor", "0.5")),
        ({**YARN, "scaling__yarn_ext_factor": 0.0}, ("rope.scaling.yarn_ext_factor", "0.0")),
    ],
)
def test_scaling_that_has_no_place_is_refused(tmp_path, metadata, words) -> None:
    path = write_tiny_gguf(tmp_path / "scaled.gguf", more=with_metadata(**metadata))
    refusal(path, *words, error=UnsupportedModel)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -4.0, "4"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_factor_that_is_none_is_refused(tmp_path, kind, factor) -> None:
    more = with_metadata(scaling__type=kind, scaling__factor=factor)
    refusal(write_tiny_gguf(tmp_path / "scaled.gguf", more=more), "rope.scaling.factor", repr(factor))


@pytest.mark.parametrize("base", [0.0, -5.0, float("nan")])
def test_a_base_of_frequencies_that_is_none_is_refused(tmp_path, base) -> None:
    refusal(write_tiny_gguf(tmp_path / "base.gguf", more=with_metadata(freq_base=base)), "not allowed")


def with_frequencies(name: str, factors: Any) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.asarray(factors, np.float32))


def test_llama_3s_frequencies_are_applied(tmp_path) -> None:
    """llama.cpp writes them as what each frequency is divided by."""
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = frequencies("llama3", theta=5e5, **llama3)
    unscaled = 5e5 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert not torch.allclose(scaled, unscaled)

    def add(writer: GGUFWriter) -> None:
        writer.add_rope_freq_base(5e5)
        writer.add_tensor("rope_freqs.weight", (unscaled / scaled).numpy())

    path = write_tiny_gguf(tmp_path / "llama3.gguf", more=add)
    assert torch.allclose(load(path).model.model.rotary_emb.inv_freq, scaled, rtol=1e-5)


def test_other_frequencies_are_refused(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", more=with_frequencies("rope_freqs.weight", [1, 2, 3, 4]))
    refusal(path, "rope_freqs.weight", error=UnsupportedModel)


@pytest.mark.parametrize(
    ("name", "factors"),
    [("blk.0.rope_freqs.weight", [7, 7, 7, 7]), ("rope_freqs.weight", [])],
    ids=["of_one_layer", "none"],
)
def test_frequencies_that_nothing_reads_are_refused(tmp_path, name, factors) -> None:
    refusal(write_tiny_gguf(tmp_path / "f.gguf", more=with_frequencies(name, factors)), name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("pooling_type", 1),
        ("attention.scale", 0.0625),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("expert_count", 4),
    ],
)
def test_other_attention_and_experts_are_refused(tmp_path, key, value) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", more=keys(**{f"llama.{key}": value}))
    refusal(path, key, str(value), error=UnsupportedModel)


def test_the_same_attention_said_again_loads(tmp_path) -> None:
    said = {"attention.causal": True, "pooling_type": 0, "attention.scale": HEAD_DIM**-0.5, "expert_count": 0}
    lengths = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    more = keys(**{f"llama.{key}": value for key, value in {**said, **lengths}.items()})
    load(write_tiny_gguf(tmp_path / "same.gguf", more=more))


def test_frequencies_of_one_change_nothing(good, tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "one.gguf", more=with_frequencies("rope_freqs.weight", [1, 1, 1, 1]))
    assert torch.equal(load(path).model.model.rotary_emb.inv_freq, load(good).model.model.rotary_emb.inv_freq)


def test_factors_of_long_rope_are_refused(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "long.gguf", more=with_frequencies("rope_factors_long.weight", [1, 2, 3, 4]))
    refusal(path, "rope_factors_long.weight", error=UnsupportedModel)


def test_a_window_that_would_be_dropped_is_refused(tmp_path) -> None:
    path = write_tiny_gguf(tmp_path / "window.gguf", more=lambda writer: writer.add_sliding_window(16))
    refusal(path, "sliding_window", "16", error=UnsupportedModel)


def metadata_of(architecture: str, **values: Any) -> GgufFile:
    keys = {f"{architecture}.{name.replace('__', '.')}": value for name, value in values.items()}
    return GgufFile(path=Path("x.gguf"), metadata={"general.architecture": architecture, **keys}, tensor_names=())


def test_phi_3s_window_is_applied() -> None:
    config = Phi3Config()
    complete_config(metadata_of("phi3", attention__sliding_window=16), config)
    assert config.sliding_window == 16


def test_gemma_3s_scaling_is_that_of_its_full_attention() -> None:
    config = Gemma3TextConfig()
    sliding = dict(config.rope_parameters["sliding_attention"])
    complete_config(metadata_of("gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0), config)
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"] == sliding


def test_more_experts_for_a_token_than_there_are_are_refused() -> None:
    config = Qwen2MoeConfig(num_experts=4, num_experts_per_tok=5)
    with pytest.raises(ConfigError, match="x.gguf: num_experts_per_tok=5 .*num_experts=4"):
        complete_config(metadata_of("qwen2moe", expert_count=4), config)


def test_a_part_of_the_head_that_is_not_rotated_is_refused() -> None:
    config = Phi3Config(hidden_size=64, num_attention_heads=4)
    complete_config(metadata_of("phi3", rope__dimension_count=16), config)
    with pytest.raises(UnsupportedModel, match="x.gguf: rotates 12 of 16 dimensions"):
        complete_config(metadata_of("phi3", rope__dimension_count=12), config)


# -- tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_an_unknown_kind_is_refused(good, tmp_path) -> None:
    path = tmp_path / "tokens.gguf"
    path.write_bytes(good.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0what", 1))
    refusal(path, "tokenizer", error=UnsupportedModel)
