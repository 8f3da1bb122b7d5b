"""From a model's source (embedded, directory, GGUF file, hub id) to a transformers model on the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from selectn_core.config import ModelConfig
from selectn_core.embedded import SERVED_NAME, embedded_model_directory
from selectn_core.errors import ConfigError, UnsupportedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model with its parameters in host memory, its tokenizer if it has one, and the name it is served under."""

    model: PreTrainedModel
    tokenizer: Any | None
    name: str


def load_model(config: ModelConfig) -> LoadedModel:
    """Loads weights and tokenizer.

    Raises ConfigError if the source cannot be read, UnsupportedModel if transformers has no class for it.
    """
    resolved = resolve_source(config)
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        kwargs["revision"] = config.revision
    if resolved.gguf_file is not None:
        kwargs["gguf_file"] = resolved.gguf_file
    return LoadedModel(
        model=_load_weights(resolved, kwargs),
        tokenizer=_load_tokenizer(resolved, kwargs),
        name=resolved.served_name or resolved.source,
    )


def resolve_source(config: ModelConfig) -> ModelConfig:
    """The configuration with `source` a directory or hub id, and `served_name` set. Raises ConfigError."""
    if config.source == "embedded":
        return replace(config, source=str(embedded_model_directory()), served_name=config.served_name or SERVED_NAME)
    path = Path(config.source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return replace(
            config,
            source=str(path.parent),
            gguf_file=path.name,
            served_name=config.served_name or path.stem,
        )
    if path.is_dir():
        return replace(config, source=str(path), served_name=config.served_name or path.resolve().name)
    if config.source.startswith(("/", ".", "~")):
        raise ConfigError(f"model.source={config.source!r}: no such directory, and not a .gguf file")
    return replace(config, served_name=config.served_name or config.source)


def _load_weights(config: ModelConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    dtype = config.dtype
    if config.gguf_file is not None:
        kwargs = {**kwargs, "quantization_config": GgufConfig(dequantize=True)}
        dtype = "float32" if dtype == "auto" else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(config.source, dtype=dtype, attn_implementation="sdpa", **kwargs)
    except OSError as error:
        raise ConfigError(f"model.source={config.source!r} cannot be loaded: {_first_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{config.source}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _load_tokenizer(config: ModelConfig, kwargs: dict[str, Any]) -> Any | None:
    try:
        return AutoTokenizer.from_pretrained(config.source, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no tokenizer that loads: %s", config.source, _first_line(error))
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
