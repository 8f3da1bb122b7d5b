"""GGUF files: what their metadata says that transformers passes over is put into the configuration, or refused."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, GgufHeader, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.weights.checkpoint_config import check_experts, num_experts
from selectn_core.weights.checkpoint_files import refuse_placeholder
from selectn_core.weights.load_errors import blaming

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_FREQUENCIES = "rope_freqs.weight"
_NOT_WEIGHTS = frozenset({_FREQUENCIES, "rope_freqs"})
_NO_LONGER_READ = "attn_rot_embd.weight"  # by llama.cpp, which has written it
# Of llama.cpp's YaRN, with the values that it has in transformers too.
_YARN_SAME = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
_YARN_FIELDS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Metadata that changes what is computed, and the field of a configuration that says the same.
_SAME_IN_CONFIG = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A whole model in one file: its metadata by key, and the names of its tensors."""

    path: Path
    metadata: dict[str, Any]
    tensor_names: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """The metadata of this architecture under `key`, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def is_gguf(path: Path) -> bool:
    """By its name, or by how it begins."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: Path) -> GgufFile:
    """Reads the head of the file. Raises ConfigError for one that is damaged or a part of several."""
    refuse_placeholder(path)
    if part := _PART.search(path.name):
        _refuse_part(path, int(part[1]), int(part[2]))
    with blaming(f"{path}: cannot be read as GGUF, it is cut off or damaged"):
        metadata, names = read_gguf_metadata(str(path))
    file = GgufFile(path=path, metadata=metadata, tensor_names=names)
    if (count := _whole_number(file, "split.count", 1)) > 1:
        _refuse_part(path, _whole_number(file, "split.no", 0) + 1, count)
    _refuse_other_kinds(file)
    alignment = _whole_number(file, "general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ConfigError(f"{path}: general.alignment={alignment} is not allowed: expected a power of two")
    with blaming(f"{path}: cannot be read as GGUF, it is cut off or damaged"):
        _refuse_cut_off(path)
    return file


def complete_config(file: GgufFile, config: PreTrainedConfig) -> None:
    """Puts what transformers leaves out of `config` into it. Raises UnsupportedModel where it has no place there."""
    check_experts(file.path, config)
    _refuse_other_attention(file, config)
    if file.architecture in GGUF_CONFIG_ARCHS:  # read by a newer part of transformers, which leaves out nothing
        return
    _complete_window(file, config)
    _positive(file, "rope.freq_base", or_none=False)
    scaling = _rope_scaling(file, config)
    if scaling is None:
        return
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise UnsupportedModel(f"{file.path}: rope scaling {scaling} has no place in transformers' {config.model_type}")
    nested = rope.get("full_attention")
    if nested is not None and not config.model_type.startswith("gemma3"):
        raise UnsupportedModel(f"{file.path}: which layers rope scaling {scaling} is for is not known here")
    (rope if nested is None else nested).update(scaling)


def refuse_left_over(file: GgufFile, config: PreTrainedConfig) -> None:
    """Raises ConfigError for tensors that transformers would pass over without a word."""
    if file.architecture in GGUF_CONFIG_ARCHS:
        return
    with blaming(file.path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
        known = get_gguf_hf_weights_map(model, processor)
    left_over = [name for name in file.tensor_names if name not in known and not _is_no_weight(name)]
    if left_over:
        more = f" and {len(left_over) - 3} more" if len(left_over) > 3 else ""
        raise ConfigError(
            f"{file.path}: left over, with no place in the model that its metadata describes: "
            f"{', '.join(left_over[:3])}{more}"
        )


def _is_no_weight(name: str) -> bool:
    return name in _NOT_WEIGHTS or name.endswith(_NO_LONGER_READ)


def _whole_number(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{file.path}: {key}={value!r} is not allowed: expected a whole number")
    return value


def _refuse_other_kinds(file: GgufFile) -> None:
    """Raises UnsupportedModel for what is no language model, in a file of the same format."""
    kind = file.metadata.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in file.metadata:
        raise UnsupportedModel(
            f"{file.path}: is a {file.metadata.get('adapter.type', 'lora')} adapter, not a model: merge it into its "
            "base model and serve that"
        )
    if kind != "model":
        raise UnsupportedModel(f"{file.path}: general.type={kind!r}: is no model, but a part of one or data about one")


def _refuse_other_attention(file: GgufFile, config: PreTrainedConfig) -> None:
    """Raises UnsupportedModel for metadata by which llama.cpp computes something else than transformers will."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    lengths = (head_dim, getattr(text, "global_head_dim", None))  # Gemma 4's, of its full attention
    divisor = getattr(text, "query_pre_attn_scalar", None) or head_dim
    scale = getattr(text, "attention_multiplier", None) or divisor**-0.5
    is_latent = getattr(text, "kv_lora_rank", None) is not None  # its keys are wider than what is kept of them
    experts = num_experts(config)
    checks: dict[str, Callable[[Any], bool]] = {
        "attention.causal": lambda value: value is True,
        "pooling_type": lambda value: value == 0,
        "attention.scale": lambda value: value == 0 or math.isclose(value, scale, rel_tol=1e-5),
        "attention.key_length": lambda value: is_latent or value in lengths,
        "attention.value_length": lambda value: is_latent or value in lengths,
        "expert_count": lambda value: value == (experts[1] if experts else 0),
    }
    for key, is_same in checks.items():
        value = file.of_architecture(key)
        if value is not None and not (isinstance(value, int | float) and is_same(value)):
            raise UnsupportedModel(f"{file.path}: {file.architecture}.{key} is {value}, which transformers would drop")


def _refuse_cut_off(path: Path) -> None:
    try:
        header = GgufHeader.from_file(str(path))
    except ValueError:  # a type of tensor that only the older reader knows; it finds out for itself
        return
    end = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if end > (size := path.stat().st_size):
        raise ConfigError(f"{path}: is cut off: it has {size:,} bytes, and its tensors end at {end:,}")


def _refuse_part(path: Path, number: int, count: int) -> None:
    if count > 1:
        raise ConfigError(
            f"{path}: is part {number} of {count} of a split file: merge them (llama.cpp: llama-gguf-split --merge) "
            "and set model.source to the whole one"
        )


def _complete_window(file: GgufFile, config: PreTrainedConfig) -> None:
    for key, field in _SAME_IN_CONFIG.items():
        value = file.of_architecture(key)
        if not value or value == getattr(config, field, None):
            continue
        if file.architecture == "phi3" and field == "sliding_window":
            config.sliding_window = value
            continue
        raise UnsupportedModel(f"{file.path}: {file.architecture}.{key} is {value}, which transformers would drop")
    rotated, rope = file.of_architecture("rope.dimension_count"), getattr(config, "rope_parameters", None)
    if not rotated or not isinstance(rope, dict) or "full_attention" in rope:
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rotated != int(head_dim * rope.get("partial_rotary_factor", 1.0)):
        raise UnsupportedModel(
            f"{file.path}: rotates {rotated} of {head_dim} dimensions of a head, which transformers would drop"
        )


def _rope_scaling(file: GgufFile, config: PreTrainedConfig) -> dict[str, Any] | None:
    if factors := [name for name in file.tensor_names if name.startswith("rope_factors_")]:
        raise UnsupportedModel(f"{file.path}: {', '.join(factors)}: rope factors that transformers would drop")
    if _FREQUENCIES in file.tensor_names:
        return _as_llama3(file, config)
    kind, factor = file.of_architecture("rope.scaling.type"), _positive(file, "rope.scaling.factor", or_none=True)
    if kind is None and (factor := factor or _positive(file, "rope.scale_linear", or_none=True)) is not None:
        kind = "linear"  # as files said it before there were several kinds
    for key, same in _YARN_SAME.items():  # whatever the kind: some scale attention where positions are not scaled
        value = file.of_architecture(f"rope.scaling.{key}")
        if value is not None and value != same:
            raise UnsupportedModel(
                f"{file.path}: rope.scaling.{key}={value} has no place in transformers' rope scaling"
            )
    if kind in (None, "none") or factor in (None, 0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _as_yarn(file, config, factor)
    raise UnsupportedModel(f"{file.path}: rope.scaling.type={kind!r} is not known here, and would be dropped")


def _positive(file: GgufFile, key: str, *, or_none: bool) -> float | None:
    """The number under `key`; 0 counts as none where a file may say so. Raises ConfigError for any other."""
    value = file.of_architecture(key)
    if value is None or (or_none and value == 0):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"{file.path}: {file.architecture}.{key}={value!r} is not allowed: expected a finite number above 0"
        )
    return value


def _as_yarn(file: GgufFile, config: PreTrainedConfig, factor: float) -> dict[str, Any]:
    original = file.of_architecture("rope.scaling.original_context_length") or config.max_position_embeddings
    values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, field in _YARN_FIELDS.items():
        if (value := file.of_architecture(f"rope.scaling.{key}")) is not None:
            values[field] = value
    return values


def _as_llama3(file: GgufFile, config: PreTrainedConfig) -> dict[str, Any] | None:
    """The scaling whose factors, one for each frequency, llama.cpp has worked out and put into a tensor."""
    from gguf import GGUFReader  # slow to import

    with blaming(file.path):
        data = next(each.data for each in GGUFReader(file.path).tensors if each.name == _FREQUENCIES)
        factors = torch.tensor(data.tolist())  # [rotated dimensions / 2]
    if factors.numel() == 0:
        raise ConfigError(f"{file.path}: {_FREQUENCIES} is empty")
    if bool((factors == 1).all()):
        return None
    scaling = {**_LLAMA3, "factor": float(factors.max())}
    scaled = copy.deepcopy(config)
    with blaming(file.path):
        scaled.rope_parameters.update(scaling)
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        unscaled = scaled.rope_parameters["rope_theta"] ** -(torch.arange(len(frequencies)) / len(frequencies))
    if factors.shape != frequencies.shape or not torch.allclose(unscaled / frequencies, factors, rtol=1e-3):
        raise UnsupportedModel(f"{file.path}: {_FREQUENCIES} is not Llama 3's rope scaling, and would be dropped")
    return scaling
