"""A model whose weights are in a shared store: a node's first process writes it, every process binds a model to it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import cached_file

from selectn_core.config import HostConfig, ModelConfig
from selectn_core.errors import UnsupportedModel
from selectn_core.weights.checkpoint import (
    LoadedModel,
    load_model,
    load_tokenizer,
    refuse_not_finite,
    resolve_source,
)
from selectn_core.weights.load_errors import blaming
from selectn_core.weights.shared_store import SharedStore, find_or_build
from selectn_core.weights.store_binding import bound_model, named_tensors
from selectn_core.weights.store_building import NotShareable, build_store
from selectn_core.weights.store_places import ReserveHost, reserve_nothing, usable_places
from selectn_core.weights.units import TENSOR_ALIGNMENT_BYTES

logger = logging.getLogger(__name__)

_CHECKPOINT_SUFFIXES = {".json", ".safetensors", ".bin"}
_LOADER = 2  # changes with what checkpoint.py makes of the same files, or refuses


def load_on_host(config: ModelConfig, host: HostConfig, reserve_host: ReserveHost = reserve_nothing) -> LoadedModel:
    """Loads a model with its weights where `host` wants them.

    What a file on a disk backs is not reserved. Private weights are when their size is known, which is when they are
    loaded: refused, they are dropped again.

    Raises, besides what `load_model` does, HostMemoryExceeded where they do not fit, StoreRefused for a file in the
    way, and UnsupportedModel where sharing was asked for and this model cannot be shared.
    """
    if host.weights == "private":
        return _reserved(load_model(config), reserve_host)
    resolved = resolve_source(config)
    name, tokenizer = resolved.served_name or resolved.source, load_tokenizer(resolved)
    try:
        model, store = open_shared(resolved, host, reserve_host)
    except NotShareable as error:
        if host.weights != "auto":
            raise UnsupportedModel(f"{name}: {error}: set host.weights to 'private'") from None
        logger.warning("%s: %s; its weights are private to this process", name, error)
        refuse_not_finite(resolved, error.model.named_parameters())
        return _reserved(LoadedModel(model=error.model, tokenizer=tokenizer, name=name), reserve_host)
    logger.info("the weights of %s are in %s (%s bytes)", name, store.path, f"{store.num_bytes:,}")
    return LoadedModel(model=model, tokenizer=tokenizer, name=name, store=store)


def _reserved(loaded: LoadedModel, reserve_host: ReserveHost) -> LoadedModel:
    tensors = {id(tensor): tensor.nbytes for _, tensor in named_tensors(loaded.model)}
    reserve_host(sum(tensors.values()), None)
    return loaded


def open_shared(
    resolved: ModelConfig, host: HostConfig, reserve_host: ReserveHost = reserve_nothing
) -> tuple[PreTrainedModel, SharedStore]:
    """A model bound to this node's store of its weights, which is built if it is not there. Raises NotShareable."""
    places, fingerprint = usable_places(host), store_fingerprint(resolved)
    store = find_or_build(
        [place.directory for place in places],
        fingerprint,
        lambda: build_store(resolved, fingerprint, places, reserve_host),
    )
    try:
        if any(place.in_memory and place.directory == store.path.parent for place in places):
            reserve_host(store.num_bytes, fingerprint)
        return bound_model(store), store
    except BaseException:
        store.close()
        raise


# -- identity -----------------------------------------------------------------------------------------------------


def store_fingerprint(resolved: ModelConfig) -> str:
    """Equal for equal weights made by equal code, as far as names, sizes, times and versions tell."""
    identity = {
        "source": _source_identity(resolved),
        "gguf_file": resolved.gguf_file,
        "dtype": resolved.dtype,
        "trust_remote_code": resolved.trust_remote_code,
        "alignment_bytes": TENSOR_ALIGNMENT_BYTES,
        "loader": _LOADER,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _source_identity(resolved: ModelConfig) -> list[Any]:
    directory = Path(resolved.source)
    if directory.is_dir():
        files = [path for path in sorted(directory.iterdir()) if _is_of_checkpoint(path, resolved)]
        stats = [(path.name, path.stat()) for path in files]
        return [str(directory.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    with blaming(f"model.source={resolved.source!r} cannot be loaded"):
        file = cached_file(resolved.source, resolved.gguf_file or "config.json", revision=resolved.revision)
    # The hub's cache keeps every commit in a directory of that name.
    return [resolved.source, Path(str(file)).parent.name]


def _is_of_checkpoint(path: Path, resolved: ModelConfig) -> bool:
    if resolved.gguf_file is not None:
        return path.name == resolved.gguf_file
    return path.suffix in _CHECKPOINT_SUFFIXES and path.is_file()
