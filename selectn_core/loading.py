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
from selectn_core.shared_store import SharedStore

logger = logging.getLogger(__name__)


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
    """Loads weights and tokenizer.

    Raises ConfigError if the source cannot be read, UnsupportedModel if transformers has no class for it.
    """
    resolved = resolve_source(config)
    return LoadedModel(
        model=load_weights(resolved),
        tokenizer=load_tokenizer(resolved),
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


def load_weights(resolved: ModelConfig) -> PreTrainedModel:
    """The model of a resolved source, its parameters in memory of this process or mapped from the checkpoint."""
    kwargs, dtype = _source_kwargs(resolved), resolved.dtype
    if resolved.gguf_file is not None:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
        dtype = "float32" if dtype == "auto" else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(resolved.source, dtype=dtype, attn_implementation="sdpa", **kwargs)
    except OSError as error:
        raise ConfigError(f"model.source={resolved.source!r} cannot be loaded: {_first_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{resolved.source}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def load_tokenizer(resolved: ModelConfig) -> Any | None:
    """The tokenizer of a resolved source, or None, logging why."""
    try:
        return AutoTokenizer.from_pretrained(resolved.source, **_source_kwargs(resolved))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no tokenizer that loads: %s", resolved.source, _first_line(error))
        return None


def _source_kwargs(resolved: ModelConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"trust_remote_code": resolved.trust_remote_code}
    if resolved.revision is not None:
        kwargs["revision"] = resolved.revision
    if resolved.gguf_file is not None:
        kwargs["gguf_file"] = resolved.gguf_file
    return kwargs


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
