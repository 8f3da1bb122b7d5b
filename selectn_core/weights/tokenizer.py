"""A checkpoint's tokenizer: loaded, absent, or refused with the file that is in the way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from selectn_core.config import ModelConfig
from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.weights.checkpoint_files import CheckpointFiles, read_object, refuse_placeholder
from selectn_core.weights.gguf_files import GgufFile
from selectn_core.weights.load_errors import blaming

logger = logging.getLogger(__name__)

_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_of(resolved: ModelConfig, files: CheckpointFiles, kwargs: dict[str, Any]) -> Any | None:
    """The tokenizer, or None where the checkpoint has none, logging so. Raises ConfigError and UnsupportedModel."""
    found = [path for name in (*_OBJECTS, *_TEXTS, *_MODELS) if (path := files.find(name)) is not None]
    if not found and files.is_local:
        logger.warning("%s has no tokenizer", resolved.source)
        return None
    for path in found:
        _check_file(path)
    names = [path.name for path in found if path.name in (*_OBJECTS, *_MODELS)]
    named = ", ".join(names) if "tokenizer.json" in names else f"{', '.join(names)} (no tokenizer.json)"
    with blaming(f"{resolved.source}: {named}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(resolved.source, **kwargs)
    check_templates(resolved.source, tokenizer)
    return tokenizer


def tokenizer_in(file: GgufFile, kwargs: dict[str, Any]) -> Any | None:
    """The tokenizer in a GGUF file, or None."""
    if "tokenizer.ggml.model" not in file.metadata:
        logger.warning("%s has no tokenizer", file.path)
        return None
    with blaming(f"{file.path}: its tokenizer cannot be loaded", raises=UnsupportedModel):
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, **kwargs)
    check_templates(str(file.path), tokenizer)
    return tokenizer


def check_templates(where: str, tokenizer: Any) -> None:
    """Raises ConfigError for chat templates that no request could be rendered with."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise ConfigError(f"{where}: has chat templates ({names}), and none of them is called 'default'")
    template = templates["default"] if isinstance(templates, dict) else templates
    if template is None:
        return
    if not isinstance(template, str):
        raise ConfigError(f"{where}: its chat template is {template!r}: expected a text")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: its chat template has a mistake in line {error.lineno}: {error.message}") from None
    except Exception as error:
        # What it makes of other messages is for the requests to see.
        logger.debug("the chat template of %s refuses a single user turn", where, exc_info=error)


def _check_file(path: Path) -> None:
    if path.name in _OBJECTS:
        values = read_object(path)
        if path.name == "tokenizer_config.json":
            _check_tokenizer_config(path, values)
    elif path.name in _TEXTS:
        with blaming(path):
            data = path.read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    else:
        refuse_placeholder(path)


def _check_tokenizer_config(path: Path, values: dict[str, Any]) -> None:
    kind = values.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"{path}: tokenizer_class={kind!r} is not allowed: expected the name of a class")
    for name in _SPECIAL_TOKENS:
        token = values.get(name)
        if token is not None and not isinstance(token, str | dict):
            raise ConfigError(f"{path}: {name}={token!r} is not allowed: expected a text")
