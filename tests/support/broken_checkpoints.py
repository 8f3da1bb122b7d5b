"""Checkpoints that are broken, each in one way, and what a loader has to say about each."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from selectn_core.errors import ConfigError, SelectNError, UnsupportedModel

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
BIN = "pytorch_model.bin"
A_TENSOR = "model.layers.2.mlp.up_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Broken:
    """`build` breaks a directory that holds a good checkpoint; `words` must all be in the message."""

    name: str
    build: Callable[[Path], None]
    words: tuple[str, ...]
    error: type[SelectNError] = ConfigError
    loads_weights: bool = False  # whether it shows only when the weights are read


CASES: list[Broken] = []


def broken(
    *words: str, error: type[SelectNError] = ConfigError, loads_weights: bool = False
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES.append(Broken(name=build.__name__, build=build, words=words, error=error, loads_weights=loads_weights))
        return build

    return register


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object; a key that is given ... is removed."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / CONFIG, **changes)


def register_all(table: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]], **settings: Any) -> None:
    for name, (build, words) in table.items():
        CASES.append(Broken(name=name, build=build, words=words, **settings))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Applies `change` to the checkpoint's tensors."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path, *, twice: str | None = None) -> None:
    """Makes two shards and an index of the one file; the tensor `twice` is in both."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        weight_map.update(dict.fromkeys(half, file))
        part = {name: tensors[name] for name in {*half, *([twice] if twice else [])}}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin(directory: Path, value: Any = None) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    torch.save(tensors if value is None else value, directory / BIN)


def both(*builds: Callable[[Path], None]) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        for each in builds:
            each(directory)

    return build


# -- missing and left over ----------------------------------------------------------------------------------------


@broken("safetensors", "missing", "model.embed_tokens.weight")
def all_tensors_renamed(directory: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    rewrite(directory, rename)


@broken("safetensors", "missing", A_TENSOR)
def one_matrix_left_out(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(A_TENSOR))


@broken("safetensors", "left over", "model.layers.2.mlp.up_proj.bias")
def a_bias_that_the_model_does_not_have(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({A_TENSOR.replace("weight", "bias"): torch.ones(48)}))


def prefixed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """The layers a second time, under another prefix and with other values."""
    return lambda tensors: tensors.update(
        {name.replace(old, new, 1): 2 * tensor for name, tensor in tensors.items() if name.startswith(old)}
    )


@broken(WEIGHTS, "twice", "model.layers.0.input_layernorm.weight and layers.0.input_layernorm.weight")
def layers_twice_without_a_prefix(directory: Path) -> None:
    rewrite(directory, prefixed("model.layers.", "layers."))


@broken("left over", "model.model.layers.0.input_layernorm.weight", "twice")
def layers_twice_with_two_prefixes(directory: Path) -> None:
    rewrite(directory, prefixed("model.layers.", "model.model.layers."))


@broken("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "twice", "layers.4.mlp.up_proj.weight")
def a_layer_twice_in_two_shards(directory: Path) -> None:
    rewrite(directory, prefixed("model.layers.4.mlp.up_proj.", "layers.4.mlp.up_proj."))
    shard(directory)


@broken("shards", "model.embed_tokens.weight", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
def a_tensor_in_two_shards(directory: Path) -> None:
    shard(directory, twice="model.embed_tokens.weight")


@broken("model-00002-of-00002.safetensors", "model.safetensors.index.json")
def a_shard_that_is_not_there(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


@broken("../elsewhere.safetensors", "model.safetensors.index.json", "outside")
def an_index_that_points_outside(directory: Path) -> None:
    shard(directory)
    index = json.loads((directory / INDEX).read_text())
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory.parent / "elsewhere.safetensors")
    index["weight_map"][A_TENSOR] = "../elsewhere.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


register_all(
    {
        "more_layers_than_on_disk": (config(num_hidden_layers=6), ("safetensors", "missing", "model.layers.5.")),
        "fewer_layers_than_on_disk": (config(num_hidden_layers=4), ("safetensors", "left over", "model.layers.4.")),
        "another_vocab_size": (config(vocab_size=140), ("safetensors", "model.embed_tokens.weight", "131", "140")),
        "another_hidden_size": (config(hidden_size=64), ("safetensors", "model.embed_tokens.weight", "32", "64")),
        "a_huge_vocab_size": (config(vocab_size=2**30), ("safetensors", "model.embed_tokens.weight", f"{2**30}")),
        "a_vocab_size_that_overflows": (config(vocab_size=2**62), ("config.json", "vocab_size")),
        "a_huge_number_of_layers": (config(num_hidden_layers=10**8), ("num_hidden_layers", "100000000")),
    }
)


def index(text: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        shard(directory)
        (directory / INDEX).write_text(text)

    return build


register_all(
    {
        "an_index_that_is_no_json": (index("{"), (INDEX, "JSON")),
        "an_index_that_is_a_list": (index("[]"), (INDEX, "object")),
        "an_index_without_a_map": (index('{"metadata": {}}'), (INDEX, "weight_map")),
        "an_index_without_metadata": (index('{"weight_map": {"a": "b.safetensors"}}'), (INDEX, "metadata")),
        "an_index_of_numbers": (index('{"metadata": {}, "weight_map": {"a": 1}}'), (INDEX, "weight_map")),
        "an_empty_index": (index('{"metadata": {}, "weight_map": {}}'), (INDEX, "weight_map")),
    }
)


# -- quantisation -------------------------------------------------------------------------------------------------


def quantized(method: Any, **values: Any) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": method, **values})


def to_float8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[A_TENSOR] = tensors[A_TENSOR].to(torch.float8_e4m3fn)


@broken("safetensors", "F8_E4M3", A_TENSOR, error=UnsupportedModel)
def float8_without_a_word(directory: Path) -> None:
    rewrite(directory, to_float8)


@broken(BIN, "float8_e4m3fn", A_TENSOR, error=UnsupportedModel)
def float8_in_a_bin_file(directory: Path) -> None:
    rewrite(directory, to_float8)
    as_bin(directory)


@broken("safetensors", "I8", A_TENSOR, error=UnsupportedModel)
def integers_for_weights(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({A_TENSOR: tensors[A_TENSOR].to(torch.int8)}))


def of_type(dtype: torch.dtype, name: str = A_TENSOR) -> Callable[[Path], None]:
    return lambda d: rewrite(d, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


register_all(
    {
        "complex_numbers_for_weights": (of_type(torch.complex64), (WEIGHTS, A_TENSOR, "C64")),
        "truths_for_weights": (of_type(torch.bool), (WEIGHTS, A_TENSOR, "BOOL")),
        "long_integers_for_weights": (of_type(torch.int64), (WEIGHTS, A_TENSOR, "I64")),
        "unsigned_integers_for_a_norm": (of_type(torch.uint64, "model.norm.weight"), (WEIGHTS, "model.norm", "U64")),
        "truths_in_a_bin_file": (both(of_type(torch.bool), as_bin), (BIN, A_TENSOR, "bool")),
    }
)


@broken("hf_quant_config.json", error=UnsupportedModel)
def a_quantisation_declared_beside_the_config(directory: Path) -> None:
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


register_all(
    {
        "modelopt": (quantized("modelopt", quant_algo="FP8"), ("config.json", "modelopt")),
        "a_quantisation_without_a_method": (config(quantization_config={"bits": 4}), ("config.json", "quant_method")),
        "a_quantisation_that_is_a_word": (config(quantization_config="int8"), ("config.json", "int8")),
        "a_quantisation_method_that_is_a_list": (quantized(["fp8"]), ("config.json", "fp8")),
        "mlx": (config(quantization={"group_size": 64, "bits": 4}), ("config.json", "quantization")),
        "gptq": (quantized("gptq", bits=4, group_size=128), ("config.json", "gptq")),
        "awq": (quantized("awq", bits=4, group_size=128), ("config.json", "awq")),
        "bitsandbytes": (quantized("bitsandbytes", load_in_8bit=True), ("config.json", "bitsandbytes")),
        "hqq": (quantized("hqq"), ("config.json", "hqq")),
        "torchao": (quantized("torchao", quant_type="int8_weight_only"), ("config.json", "torchao")),
        "compressed_tensors": (quantized("compressed-tensors"), ("config.json", "compressed-tensors")),
    },
    error=UnsupportedModel,
)


# -- adapters and directories of something else -------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8}


@broken("adapter_config.json", "LORA", "merge", error=UnsupportedModel)
def an_adapter_beside_its_base(directory: Path) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))


@broken("adapter_config.json", "LORA", "some/base", error=UnsupportedModel)
def an_adapter_alone(directory: Path) -> None:
    empty(directory)
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, directory / "adapter_model.safetensors")


@broken("config.json", "empty")
def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


@broken("config.json", "some-Q4_K_M.gguf", "model.source")
def gguf_files_alone(directory: Path) -> None:
    empty(directory)
    (directory / "some-Q4_K_M.gguf").write_bytes(b"GGUF")
    (directory / "some-Q8_0.gguf").write_bytes(b"GGUF")


@broken("config.json", "model.safetensors")
def weights_without_a_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


@broken("model.safetensors", BIN, "consolidated.00.pth")
def weights_of_another_kind(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "consolidated.00.pth")


# -- files --------------------------------------------------------------------------------------------------------


def content(name: str, data: bytes | str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return build


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def loop(name: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(name)

    return build


def folder(name: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return build


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return build


register_all(
    {
        "a_config_that_is_no_json": (content(CONFIG, "{'model_type': 'llama'}"), (CONFIG, "JSON")),
        "a_config_that_is_a_list": (content(CONFIG, "[]"), (CONFIG, "object", "list")),
        "an_empty_config": (content(CONFIG, ""), (CONFIG, "empty")),
        "a_config_that_is_not_utf8": (content(CONFIG, b'{"model_type": "ll\xe4ma"}'), (CONFIG, "UTF-8")),
        "a_config_as_git_lfs_left_it": (content(CONFIG, LFS_POINTER), (CONFIG, "git-lfs")),
        "a_config_of_many_brackets": (content(CONFIG, "[" * 100_000), (CONFIG, "JSON")),
        "a_config_that_is_a_folder": (folder(CONFIG), (CONFIG, "directory")),
        "a_config_that_links_to_itself": (loop(CONFIG), (CONFIG, "symbolic links")),
        "a_config_without_a_type": (config(model_type=...), (CONFIG, "model_type")),
        "weights_cut_off": (cut(WEIGHTS, 0.5), (WEIGHTS,)),
        "a_header_cut_off": (cut(WEIGHTS, 0.01), (WEIGHTS,)),
        "empty_weights": (content(WEIGHTS, ""), (WEIGHTS, "empty")),
        "weights_as_git_lfs_left_them": (content(WEIGHTS, LFS_POINTER), (WEIGHTS, "git-lfs", "git lfs pull")),
        "weights_that_are_noise": (content(WEIGHTS, bytes(range(256)) * 9), (WEIGHTS,)),
        "weights_that_are_a_folder": (folder(WEIGHTS), (WEIGHTS,)),
        "weights_that_link_to_themselves": (loop(WEIGHTS), (WEIGHTS,)),
    }
)


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this must never be run",)


register_all(
    {
        "a_malicious_bin": (lambda d: as_bin(d, {"a": Malicious()}), (BIN, "run code")),
        "a_malicious_old_bin": (
            both(as_bin, content(BIN, pickle.dumps(Malicious(), protocol=2))),
            (BIN, "run code"),
        ),
        "a_bin_that_is_a_list": (lambda d: as_bin(d, [torch.ones(2)]), (BIN, "list")),
        "a_bin_of_something_else": (lambda d: as_bin(d, {"epoch": 3}), (BIN, "epoch", "int")),
        "a_bin_cut_off": (both(as_bin, cut(BIN, 0.5)), (BIN, "cut off")),
        "an_empty_bin": (both(as_bin, content(BIN, "")), (BIN, "empty")),
    }
)


@broken("model.safetensors", A_TENSOR, "not finite", loads_weights=True)
def one_weight_that_is_not_a_number(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors[A_TENSOR][3].fill_(float("nan")))


@broken("model.safetensors", "model.embed_tokens.weight", "not finite", loads_weights=True)
def one_infinite_weight(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors["model.embed_tokens.weight"][3, 3].fill_(float("inf")))


# -- values in config.json ----------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

register_all(
    {
        "a_dtype_of_another_library": (config(dtype="fp16"), (CONFIG, "dtype", "fp16")),
        "an_old_dtype_of_another_library": (
            config(dtype=..., torch_dtype="half_precision"),
            (CONFIG, "torch_dtype", "half_precision"),
        ),
        "a_dtype_that_is_a_number": (config(dtype=16), (CONFIG, "dtype", "16")),
        "a_dtype_of_integers": (config(dtype="int8"), (CONFIG, "dtype", "int8")),
        "a_dtype_that_is_no_dtype": (config(dtype="nn"), (CONFIG, "dtype", "nn")),
        "null_positions": (config(max_position_embeddings=None), (CONFIG, "max_position_embeddings")),
        "negative_positions": (config(max_position_embeddings=-1), (CONFIG, "max_position_embeddings", "-1")),
        "no_layers": (config(num_hidden_layers=0), (CONFIG, "num_hidden_layers", "0")),
        "a_size_that_is_a_word": (config(hidden_size="32"), (CONFIG, "hidden_size", "32")),
        "a_size_that_is_a_fraction": (config(hidden_size=32.5), (CONFIG, "hidden_size", "32.5")),
        "a_size_that_is_true": (config(hidden_size=True), (CONFIG, "hidden_size", "True")),
        "a_negative_size": (config(intermediate_size=-48), (CONFIG, "intermediate_size", "-48")),
        "no_heads": (config(num_attention_heads=0), (CONFIG, "num_attention_heads", "0")),
        "heads_that_do_not_divide": (config(num_attention_heads=5), (CONFIG, "attention heads (5)")),
        "an_epsilon_that_is_infinite": (config(rms_norm_eps=float("inf")), (CONFIG, "rms_norm_eps")),
        "an_epsilon_that_is_too_large": (
            lambda d: content(CONFIG, (d / CONFIG).read_text().replace("1e-06", "1e999"))(d),
            (CONFIG, "rms_norm_eps"),
        ),
        "a_theta_that_is_not_a_number": (
            config(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}),
            (CONFIG, "rope_theta"),
        ),
        "a_tagged_infinity": (config(initializer_range={"__float__": "Infinity"}), (CONFIG, "initializer_range")),
        "an_unknown_rope_type": (config(rope_parameters={**YARN, "rope_type": "spiral"}), (CONFIG, "rope", "spiral")),
        "a_rope_type_that_lacks_its_factor": (
            config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
            (CONFIG, "factor"),
        ),
        "an_unknown_activation": (config(hidden_act="swishh"), (CONFIG, "hidden_act", "swishh")),
        "an_activation_that_is_a_list": (config(hidden_act=["silu"]), (CONFIG, "hidden_act")),
        "an_end_that_is_a_word": (config(eos_token_id="</s>"), (CONFIG, "eos_token_id", "</s>")),
        "an_end_that_is_a_word_in_a_list": (config(eos_token_id=[2, "</s>"]), (CONFIG, "eos_token_id", "</s>")),
        "a_type_that_is_a_number": (config(model_type=7), (CONFIG, "model_type", "7")),
        "a_text_config_that_is_a_word": (config(text_config="x", model_type="gemma3"), (CONFIG, "text_config")),
        "weights_named_outside": (config(transformers_weights="../x.safetensors"), (CONFIG, "../x.safetensors")),
    }
)


@broken(CONFIG, "no-such-model", error=UnsupportedModel)
def an_unknown_type(directory: Path) -> None:
    edit(directory / CONFIG, model_type="no-such-model")


@broken(CONFIG, "auto_map", "trust_remote_code", error=UnsupportedModel)
def code_that_is_not_trusted(directory: Path) -> None:
    edit(directory / CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.Config"})


# -- generation_config.json ---------------------------------------------------------------------------------------

GENERATION = "generation_config.json"

register_all(
    {
        "a_generation_config_that_is_no_json": (content(GENERATION, "{"), (GENERATION, "JSON")),
        "a_generation_config_that_is_a_list": (content(GENERATION, "[]"), (GENERATION, "object")),
        "a_generation_that_ends_with_a_word": (
            content(GENERATION, '{"eos_token_id": "</s>"}'),
            (GENERATION, "eos_token_id", "</s>"),
        ),
        "a_generation_that_ends_with_true": (
            content(GENERATION, '{"eos_token_id": true}'),
            (GENERATION, "eos_token_id", "True"),
        ),
        "an_infinite_temperature": (content(GENERATION, '{"temperature": NaN}'), (GENERATION, "temperature")),
        "a_generation_config_that_links_to_itself": (loop(GENERATION), (GENERATION, "symbolic links")),
    }
)


# -- tokenizer ----------------------------------------------------------------------------------------------------

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / TOKENIZER_CONFIG, **changes)


TWO_TEMPLATES = [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]

register_all(
    {
        "a_tokenizer_that_is_no_json": (content(TOKENIZER, "{"), (TOKENIZER,)),
        "an_empty_tokenizer": (content(TOKENIZER, ""), (TOKENIZER, "empty")),
        "a_tokenizer_as_git_lfs_left_it": (content(TOKENIZER, LFS_POINTER), (TOKENIZER, "git-lfs")),
        "a_tokenizer_that_is_a_list": (content(TOKENIZER, "[]"), (TOKENIZER, "object")),
        "a_tokenizer_without_a_model": (lambda d: edit(d / TOKENIZER, model=...), (TOKENIZER, "Model missing")),
        "a_tokenizer_of_an_unknown_model": (
            lambda d: edit(d / TOKENIZER, model={"type": "Magic"}),
            (TOKENIZER,),
        ),
        "a_tokenizer_that_links_to_itself": (loop(TOKENIZER), (TOKENIZER, "symbolic links")),
        "a_tokenizer_config_that_is_a_list": (content(TOKENIZER_CONFIG, "[]"), (TOKENIZER_CONFIG, "object")),
        "a_tokenizer_config_that_is_no_json": (content(TOKENIZER_CONFIG, "{"), (TOKENIZER_CONFIG, "JSON")),
        "a_tokenizer_class_that_is_a_number": (
            tokenizer_config(tokenizer_class=5),
            (TOKENIZER_CONFIG, "tokenizer_class"),
        ),
        "special_tokens_that_are_a_number": (tokenizer_config(eos_token=5), (TOKENIZER_CONFIG, "eos_token")),
        "a_tokenizer_without_its_vocabulary": (lambda d: (d / TOKENIZER).unlink(), (TOKENIZER,)),
        "two_templates_and_no_default": (
            both(remove("chat_template.jinja"), tokenizer_config(chat_template=TWO_TEMPLATES)),
            ("chat template", "default", "rag", "tool_use"),
        ),
        "a_template_that_is_a_number": (
            both(remove("chat_template.jinja"), tokenizer_config(chat_template=5)),
            ("chat template",),
        ),
        "a_template_that_does_not_parse": (content("chat_template.jinja", "{% for %}"), ("chat template",)),
        "a_template_that_is_not_utf8": (content("chat_template.jinja", b"\xff\xfe"), ("chat_template.jinja", "UTF-8")),
    }
)


@broken("chat template", "default", "rag")
def templates_in_files_and_no_default(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("a")


@broken("sacremoses", error=UnsupportedModel)
def a_tokenizer_that_needs_a_package(directory: Path) -> None:
    for name in (TOKENIZER, "chat_template.jinja"):
        (directory / name).unlink()
    (directory / "vocab.json").write_text("{}")
    (directory / "merges.txt").write_text("")
    edit(directory / TOKENIZER_CONFIG, tokenizer_class="BioGptTokenizer")
