"""From a model's source (embedded, directory, GGUF file, hub id) to a transformers model on the CPU.

What can be told from a configuration and the heads of files is looked at first, and refused before anything is read.
Then transformers is asked what it would load, without a tensor, and last it loads.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from selectn_core.config import ModelConfig
from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.weights.architecture import check_architecture
from selectn_core.weights.checkpoint_config import (
    check_config,
    check_experts,
    check_generation_config,
    check_sizes,
    declared_quantiser,
    refuse_implied_quantisation,
)
from selectn_core.weights.checkpoint_files import (
    CONFIG,
    GENERATION_CONFIG,
    CheckpointFiles,
    StoredAs,
    read_headers,
    read_object,
    refuse_adapter,
    weight_files,
)
from selectn_core.weights.checkpoint_names import refuse_experts_of_other_numbers, refuse_what_is_not_taken
from selectn_core.weights.embedded_model import SERVED_NAME, embedded_model_directory
from selectn_core.weights.gguf_files import complete_config, is_gguf, open_gguf, refuse_left_over
from selectn_core.weights.load_errors import blaming, listed
from selectn_core.weights.shared_store import SharedStore
from selectn_core.weights.tokenizer import tokenizer_in, tokenizer_of

# What models compute from their configuration, and once kept among their weights: masks and tables.
_COMPUTED = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids|attn\.bias|attention\.bias)$")
# Whose sum is taken at once: as many as torch sums on one core. Waking others for more costs ten times the sum.
_CHUNK_NUMBERS = 1 << 15


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model with its parameters in host memory, its tokenizer if it has one, and the name it is served under.

    `store` is the shared store that its tensors are views of; without one they are this process's own.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    name: str
    store: SharedStore | None = None


def load_model(config: ModelConfig) -> LoadedModel:
    """Loads tokenizer and weights.

    Raises ConfigError for a source that cannot be read or is damaged, and UnsupportedModel for one that transformers
    has no class for, or would not load whole. Each is one line that names the file and what is wrong with it.
    """
    resolved = resolve_source(config)
    tokenizer = load_tokenizer(resolved)
    model = load_weights(resolved)
    refuse_not_finite(resolved, model.named_parameters())
    return LoadedModel(model=model, tokenizer=tokenizer, name=resolved.served_name or resolved.source)


def resolve_source(config: ModelConfig) -> ModelConfig:
    """The configuration with `source` a directory or hub id, and `served_name` set. Raises ConfigError."""
    with blaming(f"model.source={config.source!r}"):
        if config.source == "embedded":
            directory = embedded_model_directory()
            return replace(config, source=str(directory), served_name=config.served_name or SERVED_NAME)
        path = Path(config.source).expanduser()
        if path.is_file() and is_gguf(path):
            return replace(
                config,
                source=str(path.parent),
                gguf_file=path.name,
                served_name=config.served_name or path.stem,
            )
        if path.is_dir():
            return replace(config, source=str(path), served_name=config.served_name or path.resolve().name)
        if path.is_file():
            raise ConfigError(f"model.source={config.source!r}: is neither a directory nor a .gguf file")
        if os.path.lexists(path):
            path.stat()  # says what is wrong with a link
        if config.source.startswith(("/", ".", "~")):
            raise ConfigError(f"model.source={config.source!r}: no such directory, and not a .gguf file")
        return replace(config, served_name=config.served_name or config.source)


def load_weights(resolved: ModelConfig) -> PreTrainedModel:
    """The model of a resolved source, its parameters in memory of this process or mapped from the checkpoint."""
    model = _load_gguf(resolved) if resolved.gguf_file is not None else _load_checkpoint(resolved)
    return model.eval().requires_grad_(False)


def load_tokenizer(resolved: ModelConfig) -> Any | None:
    """The tokenizer of a resolved source, or None, logging so, where it has none."""
    kwargs = _source_kwargs(resolved)
    if resolved.gguf_file is not None:
        return tokenizer_in(open_gguf(CheckpointFiles(resolved).get(resolved.gguf_file)), kwargs)
    checkpoint = _read_checkpoint(resolved)
    return tokenizer_of(resolved, checkpoint.files, {"config": checkpoint.config, **kwargs})


def refuse_not_finite(resolved: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises ConfigError, naming tensor and file, where a weight is infinite or not a number."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not all(map(_is_finite, tensor.detach().reshape(-1).split(_CHUNK_NUMBERS))):
            overflows = ", or too large for float16: set model.dtype to 'bfloat16' or 'float32'"
            raise ConfigError(
                f"{_file_of(resolved, name)}: {name} has values that are not finite: it is damaged"
                + (overflows if tensor.dtype == torch.float16 else "")
            )


def _is_finite(numbers: torch.Tensor) -> bool:
    # One pass and no temporary: a sum is finite only if all are. Unless they overflow: then each is looked at.
    return math.isfinite(numbers.sum(dtype=torch.float32)) or bool(numbers.isfinite().all())


# -- checkpoints of transformers ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Checkpoint:
    """What is known before weights are looked at; `values` is what is in config.json, `path`, as it is there."""

    files: CheckpointFiles
    path: Path
    values: dict[str, Any]
    config: PreTrainedConfig
    quantiser: str | None


def _read_checkpoint(resolved: ModelConfig) -> _Checkpoint:
    files = CheckpointFiles(resolved)
    refuse_adapter(files)
    path = files.get(CONFIG)
    values = read_object(path)
    check_config(path, values)
    if (generation := files.find(GENERATION_CONFIG)) is not None:
        check_generation_config(generation)
    quantiser = declared_quantiser(files, path, values)
    _check_type(resolved, path, values)
    with blaming(path, values=values):
        config = AutoConfig.from_pretrained(resolved.source, **_source_kwargs(resolved))
    check_architecture(config)
    check_experts(path, config)
    return _Checkpoint(files=files, path=path, values=values, config=config, quantiser=quantiser)


def _check_type(resolved: ModelConfig, path: Path, values: Mapping[str, Any]) -> None:
    if values["model_type"] in CONFIG_MAPPING:
        return
    unknown = f"{path}: model_type={values['model_type']!r} is not known to transformers"
    if not isinstance(values.get("auto_map"), dict):
        raise UnsupportedModel(unknown)
    if not resolved.trust_remote_code:
        raise UnsupportedModel(f"{unknown}, and code in auto_map runs only where model.trust_remote_code is true")


def _load_checkpoint(resolved: ModelConfig) -> PreTrainedModel:
    checkpoint = _read_checkpoint(resolved)
    path, values, config = checkpoint.path, checkpoint.values, checkpoint.config
    shards = weight_files(checkpoint.files, values)
    stored = read_headers(shards)
    _refuse_more_layers_than_tensors(path, config, stored)
    _refuse_other_tasks(path, config)
    is_quantised = checkpoint.quantiser is not None
    if not is_quantised:
        refuse_implied_quantisation(stored)
        refuse_experts_of_other_numbers(path, config, stored)
    where = shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
    kwargs = {"config": config, "dtype": resolved.dtype, "is_quantised": is_quantised, **_source_kwargs(resolved)}

    with blaming(f"{path}: quantization_config: {checkpoint.quantiser}" if is_quantised else path, values=values):
        if not is_quantised and _is_transformers_own(config):
            # Asked without a tensor first: what is missing would be made up at random, which takes memory and minutes.
            _from_pretrained(resolved, where, stored, device_map="meta", **kwargs)
        return _from_pretrained(resolved, where, stored, **kwargs)


def _from_pretrained(
    resolved: ModelConfig, where: object, stored: Mapping[str, StoredAs], *, is_quantised: bool, **kwargs: Any
) -> PreTrainedModel:
    """As transformers loads it. Raises ConfigError unless every tensor of the model is there, once, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        resolved.source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # it says which; otherwise it only logs them
        **kwargs,
    )
    refuse_what_is_not_taken(model, stored, is_quantised=is_quantised)
    parts = [
        listed("missing", info["missing_keys"]),
        listed("left over", [name for name in info["unexpected_keys"] if not _COMPUTED.search(name)]),
        listed("of another shape", [_shapes(*each) for each in info["mismatched_keys"]]),
        listed("not loaded", info["error_msgs"]),
    ]
    if any(parts):
        raise ConfigError(
            f"{where}: does not hold the model that its configuration describes: {'; '.join(filter(None, parts))}"
        )
    return model


def _shapes(name: str, stored: Any, wanted: Any) -> str:
    return f"{name} is {list(stored)} and should be {list(wanted)}"


def _refuse_more_layers_than_tensors(path: Path, config: PreTrainedConfig, stored: Mapping[str, StoredAs]) -> None:
    """Before as many layers are built."""
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > len(stored):
        raise ConfigError(
            f"{path}: num_hidden_layers={num_layers}, and the checkpoint has {len(stored)} tensors in all"
        )


def _refuse_other_tasks(path: Path, config: PreTrainedConfig) -> None:
    if _is_transformers_own(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{path}: {config.model_type} is no causal language model, which is all that is served")


def _is_transformers_own(config: PreTrainedConfig) -> bool:
    """Rather than a checkpoint's own code, which may not bear to be built without memory for its tensors."""
    return type(config).__module__.startswith("transformers.")


# -- GGUF ---------------------------------------------------------------------------------------------------------


def _load_gguf(resolved: ModelConfig) -> PreTrainedModel:
    assert resolved.gguf_file is not None
    file = open_gguf(CheckpointFiles(resolved).get(resolved.gguf_file))
    kwargs = _source_kwargs(resolved)
    with blaming(file.path, raises=UnsupportedModel):
        config = AutoConfig.from_pretrained(resolved.source, **kwargs)
    check_architecture(config)
    check_sizes(file.path, config.to_dict())
    with blaming(file.path):
        complete_config(file, config)
    check_sizes(file.path, config.to_dict())  # with what is in it now
    if config.get_text_config().num_hidden_layers > len(file.tensor_names):
        raise ConfigError(f"{file.path}: has {len(file.tensor_names)} tensors, too few for its block_count")
    refuse_left_over(file, config)
    dtype = "float32" if resolved.dtype == "auto" else resolved.dtype
    with blaming(file.path):
        return _from_pretrained(
            resolved,
            file.path,
            {},
            is_quantised=True,
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            **kwargs,
        )


# -- both ---------------------------------------------------------------------------------------------------------


def _source_kwargs(resolved: ModelConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"trust_remote_code": resolved.trust_remote_code}
    if resolved.revision is not None:
        kwargs["revision"] = resolved.revision
    if resolved.gguf_file is not None:
        kwargs["gguf_file"] = resolved.gguf_file
    if Path(resolved.source).is_dir() and not resolved.trust_remote_code:
        kwargs["local_files_only"] = True  # code may be in another repository than the weights
    return kwargs


def _file_of(resolved: ModelConfig, name: str) -> object:
    """The file that has the tensor, or the source if it has another name there."""
    if resolved.gguf_file is not None:
        return Path(resolved.source) / resolved.gguf_file
    files = CheckpointFiles(resolved)
    stored = read_headers(weight_files(files, read_object(files.get(CONFIG))))
    return stored[name].file if name in stored else resolved.source
