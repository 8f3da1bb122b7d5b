"""What in a checkpoint's configuration would go wrong later, or without a word: refused before anything loads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.quantizers import AutoHfQuantizer

from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.weights.checkpoint_files import CheckpointFiles, StoredAs, read_object

DTYPES = ("float64", "float32", "bfloat16", "float16")
_SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("d_model", "ffn_dim", "num_layers", "num_heads", "n_embd", "n_layer", "n_head", "n_positions"),
        "decoder_sparse_step",
    }
)
_LARGEST_SIZE = 2**31 - 1
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
_MAY_BE_INFINITE = frozenset({"time_step_limit"})  # of Mamba's layers, which have no upper limit by default
_TAG = "__float__"  # transformers writes an infinity as {"__float__": "Infinity"}, as JSON has none
# Files in which quantisers have said what they did, before config.json had a place for it.
_QUANTISERS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
PLAIN_DTYPES = frozenset({*DTYPES, "F64", "F32", "BF16", "F16"})
_FEW_BITS = ("F8", "F6", "F4", "float8", "float4")
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "int8", "uint8", "int16", "uint16", "int32", "uint32"})
_MASKS = frozenset({"bias", "masked_bias", "position_ids"})  # integers in old checkpoints, and no weights


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for values in config.json that no model has."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{path}: model_type={model_type!r} is not allowed: expected the name of a kind of model")
    check_sizes(path, config)
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES):
            raise ConfigError(f"{path}: {name}={value!r} is not allowed: expected one of {', '.join(DTYPES)}")
    _check_end(path, config)


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a size that is none, or a number that is not finite."""
    for name, value in _values(config):
        last = name.rsplit(".", 1)[-1]
        if isinstance(value, float) and not math.isfinite(value) and last.rstrip("[]") not in _MAY_BE_INFINITE:
            raise ConfigError(f"{path}: {name}={value} is not allowed: expected a finite number")
        if last in _SIZES and isinstance(value, int) and not 1 <= value <= _LARGEST_SIZE:
            raise ConfigError(f"{path}: {name}={value} is not allowed: expected 1 to {_LARGEST_SIZE}")


def num_experts(config: PreTrainedConfig) -> tuple[str, int] | None:
    """How many experts a layer chooses from, with the field that says so; None where that is not one number."""
    values = vars(config.get_text_config())  # under the names in the file, of which there are aliases
    found = [(name, value) for name in _NUM_EXPERTS if type(value := values.get(name)) is int and value > 0]
    return found[0] if len({value for _, value in found}) == 1 else None


def check_experts(path: Path, config: PreTrainedConfig) -> None:
    """Raises ConfigError where a token is for more experts than there are."""
    if (experts := num_experts(config)) is None:
        return
    for name in _CHOSEN_EXPERTS:
        value = vars(config.get_text_config()).get(name)
        if type(value) is int and not 0 <= value <= experts[1]:
            raise ConfigError(f"{path}: {name}={value} is not allowed: expected at most {experts[0]}={experts[1]}")


def check_generation_config(path: Path) -> None:
    """Raises ConfigError for a generation_config.json that would be passed over, or could not be used."""
    values = read_object(path)
    check_sizes(path, values)
    _check_end(path, values)


def declared_quantiser(files: CheckpointFiles, path: Path, config: Mapping[str, Any]) -> str | None:
    """How the weights are said to be quantised. Raises UnsupportedModel where transformers would drop their scales."""
    declared = [
        (f"{prefix}quantization_config", values["quantization_config"])
        for prefix, values in (("", config), ("text_config.", config.get("text_config")))
        if isinstance(values, dict) and values.get("quantization_config") is not None
    ]
    if declared:
        return next(_checked_quantiser(path, field, values) for field, values in declared)
    for field in ("quantization", "compression_config"):
        if config.get(field) is not None:
            raise UnsupportedModel(f"{path}: has a {field!r}, which transformers does not apply")
    for name in _QUANTISERS_FILES:
        if (other := files.find(name)) is not None:
            raise UnsupportedModel(
                f"{other}: says that the weights are quantised, and {path.name} has no quantization_config, without "
                "which transformers would drop their scales"
            )
    return None


def refuse_implied_quantisation(stored: Mapping[str, StoredAs]) -> None:
    """Raises UnsupportedModel for a tensor in a type that only quantised weights have."""
    for name, tensor in stored.items():
        if tensor.dtype in PLAIN_DTYPES:
            continue
        few_bits = tensor.dtype.startswith(_FEW_BITS)
        if few_bits or (tensor.dtype in _INTEGERS and name.rsplit(".", 1)[-1] not in _MASKS):
            raise UnsupportedModel(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, so it is quantised, and config.json has no "
                "quantization_config, without which its scales would be dropped"
            )


def without_tags(value: Any) -> Any:
    """The value with the infinities that transformers has written as objects."""
    if isinstance(value, dict):
        if set(value) == {_TAG} and isinstance(value[_TAG], str):
            return float(value[_TAG])
        return {name: without_tags(each) for name, each in value.items()}
    return [without_tags(each) for each in value] if isinstance(value, list) else value


def _values(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its name; what is in a list has the list's name and []."""
    for name, value in config.items():
        each = without_tags(value)
        if isinstance(each, dict):
            yield from _values(each, f"{prefix}{name}.")
        elif isinstance(each, list):
            for one in each:
                yield from _values({f"{name}[]": one}, prefix)
        else:
            yield f"{prefix}{name}", each


def _check_end(path: Path, config: Mapping[str, Any]) -> None:
    for name, values in (("", config), ("text_config.", config.get("text_config"))):
        end = values.get("eos_token_id") if isinstance(values, Mapping) else None
        for token in end if isinstance(end, list) else [end]:
            if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
                raise ConfigError(
                    f"{path}: {name}eos_token_id={end!r} is not allowed: expected a token's number, or a list of them"
                )


def _checked_quantiser(path: Path, field: str, values: Any) -> str:
    method = values.get("quant_method") if isinstance(values, dict) else None
    if method is None and isinstance(values, dict) and (values.get("load_in_8bit") or values.get("load_in_4bit")):
        method = "bitsandbytes"  # as it said so first
    if not isinstance(method, str):
        shown = f"{field}.quant_method={method!r}" if isinstance(values, dict) else f"{field}={values!r}"
        raise UnsupportedModel(f"{path}: {shown} does not say how the weights are quantised")
    if not AutoHfQuantizer.supports_quant_method(values):
        raise UnsupportedModel(
            f"{path}: {field}.quant_method={method!r} is not known to transformers {transformers_version}, which would "
            "drop the scales of the weights"
        )
    return method
