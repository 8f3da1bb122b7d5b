"""A model whose weights are in a shared store: a node's first process writes it, every process binds a model to it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from selectn_core.config import HostConfig, ModelConfig
from selectn_core.device import align_up
from selectn_core.device.host_memory import SHARED_MEMORY, available_host_memory, free_bytes, is_in_memory
from selectn_core.errors import ConfigError, HostMemoryExceeded, UnsupportedModel
from selectn_core.weights.checkpoint import (
    LoadedModel,
    load_model,
    load_tokenizer,
    load_weights,
    refuse_not_finite,
    resolve_source,
)
from selectn_core.weights.checkpoint_config import without_tags
from selectn_core.weights.load_errors import blaming
from selectn_core.weights.resident import resident_tensors
from selectn_core.weights.shared_store import (
    Chunks,
    Section,
    SharedStore,
    StoredTensor,
    find_or_build,
    stored_bytes,
    write_store,
)
from selectn_core.weights.store_files import FILES, distinct_directories
from selectn_core.weights.units import TENSOR_ALIGNMENT_BYTES, find_units

logger = logging.getLogger(__name__)

_REST = "rest"  # the section of what belongs to no unit: embeddings, norms, head, and all buffers
_CHECKPOINT_SUFFIXES = {".json", ".safetensors", ".bin"}
_CHUNK_BYTES = 8 << 20
_LOADER = 2  # changes with what checkpoint.py makes of the same files, or refuses
_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None)


# Asked before host memory is used: bytes, and the name under which processes of the node share them (None: this process
# alone). Raises HostMemoryExceeded where they are not to be had. Asking for the same again does no harm.
ReserveHost = Callable[[int, str | None], None]


def reserve_nothing(num_bytes: int, shared_as: str | None) -> None:
    """For a process that shares its node's host memory with nobody."""


class NotShareable(Exception):
    """`model` has been loaded, but cannot be made again from its configuration alone."""

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        super().__init__(reason)
        self.model = model


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
    tensors = {id(tensor): tensor.nbytes for _, tensor in _named_tensors(loaded.model)}
    reserve_host(sum(tensors.values()), None)
    return loaded


def open_shared(
    resolved: ModelConfig, host: HostConfig, reserve_host: ReserveHost = reserve_nothing
) -> tuple[PreTrainedModel, SharedStore]:
    """A model bound to this node's store of its weights, which is built if it is not there. Raises NotShareable."""
    places, fingerprint = _usable_places(host), store_fingerprint(resolved)
    store = find_or_build(
        [place.directory for place in places], fingerprint, lambda: _build(resolved, fingerprint, places, reserve_host)
    )
    try:
        if any(place.in_memory and place.directory == store.path.parent for place in places):
            reserve_host(store.num_bytes, fingerprint)
        return _bound_model(store), store
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


# -- place --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Place:
    directory: Path
    in_memory: bool


def _usable_places(host: HostConfig) -> list[_Place]:
    """Where a store may be, in the order of preference. Raises ConfigError where there is no such directory."""
    configured = Path(host.directory) if host.directory is not None else None
    places = []
    if host.weights != "file":
        places.append(_Place(directory=configured or SHARED_MEMORY, in_memory=True))
    if host.weights == "file":
        places.append(_Place(directory=configured or FILES, in_memory=False))
    if host.weights == "auto":
        places.append(_Place(directory=FILES, in_memory=False))
    usable = [place for place in places if os.access(place.directory, os.W_OK | os.X_OK)]
    if not usable:
        tried = " and ".join(str(place.directory) for place in places)
        raise ConfigError(f"{tried} is no directory this user can write to: set host.directory to one")
    distinct = distinct_directories([place.directory for place in usable])
    if len(distinct) < len(usable):  # two that are one are what they are
        return [_Place(directory=each, in_memory=is_in_memory(each)) for each in distinct]
    return usable


def _place_for(places: Sequence[_Place], num_bytes: int, reserve: Callable[[], None]) -> _Place:
    """The first place with room for `num_bytes`. Raises HostMemoryExceeded, saying what to set, if there is none."""
    reasons: list[str] = []
    for place in places:
        reason = _why_not(place, num_bytes) or (_why_refused(reserve) if place.in_memory else None)
        if reason is None:
            for passed_over in reasons:
                logger.warning("%s; the weights go to a mapped file in %s instead", passed_over, place.directory)
            return place
        reasons.append(reason)
    raise HostMemoryExceeded("; ".join(reasons))


def _why_refused(reserve: Callable[[], None]) -> str | None:
    try:
        reserve()
    except HostMemoryExceeded as error:
        return str(error)
    return None


def _why_not(place: _Place, num_bytes: int) -> str | None:
    free = free_bytes(place.directory)
    if not place.in_memory:
        if num_bytes <= free:
            return None
        return (
            f"{place.directory} has {free:,} bytes free and the weights take {num_bytes:,}: set host.directory to "
            "one with more room and host.weights to 'file'"
        )
    if num_bytes > free:
        return (
            f"{place.directory} has {free:,} bytes free and the weights take {num_bytes:,}: make it larger (docker "
            f"run --shm-size={-(-num_bytes // 2**30) + 1}g; in Kubernetes an emptyDir with medium: Memory mounted "
            "there), or set host.directory to a larger tmpfs"
        )
    memory = available_host_memory()
    if num_bytes > memory.available_bytes:
        return (
            f"the weights take {num_bytes:,} bytes of host memory and {memory.available_bytes:,} are left by "
            f"{memory.limited_by}: raise that limit, or set host.weights to 'file'"
        )
    return None


# -- building -----------------------------------------------------------------------------------------------------


def _build(resolved: ModelConfig, fingerprint: str, places: Sequence[_Place], reserve_host: ReserveHost) -> SharedStore:
    model = load_weights(resolved)
    description = _describe(model)
    _check_rebuilds(model, description)
    sections, tensors = _layout(model)
    num_bytes = stored_bytes(sections)
    place = _place_for(places, num_bytes, lambda: reserve_host(num_bytes, fingerprint))
    pages = _FilePages()
    return write_store(
        place.directory,
        fingerprint,
        description,
        sections,
        lambda section: _chunks(section, tensors[section.name], pages, resolved),
    )


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    """What `_empty_model` makes the same model from, without its weights."""
    generation = model.generation_config
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": json.loads(generation.to_json_string(use_diff=False)) if generation else None,
        "dtype": _dtype_name(model.dtype),
    }


def _check_rebuilds(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Raises NotShareable unless the description alone leads to a model with the same tensors."""
    if not type(model).__module__.startswith("transformers.") or model.config.model_type not in CONFIG_MAPPING:
        raise NotShareable(model, "its code is not transformers' own, so its tensors cannot be told apart from others")
    empty = _empty_model(description)
    if type(empty) is not type(model) or _shapes(empty) != _shapes(model):
        raise NotShareable(model, "its configuration alone leads to other tensors (it is quantised, perhaps)")
    for name, module in empty.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise NotShareable(model, f"{name}.{attribute} is a tensor that is neither parameter nor buffer")


def _layout(model: PreTrainedModel) -> tuple[list[Section], dict[str, list[torch.Tensor]]]:
    """The sections of the model's store, one per decoder layer and one for the rest, and the tensors of each.

    Blocks are pieces of them: processes that offload layers and processes that offload blocks share a store.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    units = find_units(model)
    tensors: dict[str, list[torch.Tensor]] = {unit.name: list(unit.parameters) for unit in units}
    tensors[_REST] = list(resident_tensors(model, units))
    sections = []
    for section, members in tensors.items():
        specs, offset = [], 0
        for tensor in members:  # laid out as `units` does: what is aligned alike computes alike
            specs.append(
                StoredTensor(
                    names=tuple(names[id(tensor)]),
                    dtype=_dtype_name(tensor.dtype),
                    shape=tuple(tensor.shape),
                    offset=offset,
                    num_bytes=tensor.nbytes,
                )
            )
            offset = align_up(offset + tensor.nbytes, TENSOR_ALIGNMENT_BYTES)
        sections.append(Section(name=section, num_bytes=offset, tensors=tuple(specs)))
    return sections, tensors


def _chunks(section: Section, tensors: Sequence[torch.Tensor], pages: _FilePages, resolved: ModelConfig) -> Chunks:
    """The section's bytes, freeing what has been taken: at no time is much of the model in memory twice.

    Raises ConfigError for a damaged weight: it is in memory now, and will not be looked at again.
    """
    for spec, tensor in zip(section.tensors, tensors, strict=True):
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, spec.num_bytes, _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            if isinstance(tensor, nn.Parameter):  # masks among the buffers may be infinite
                refuse_not_finite(resolved, [(spec.names[0], chunk.view(tensor.dtype))])
            yield spec.offset + start, chunk
            pages.drop(chunk)
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        del data
        _return_free_memory()


class _FilePages:
    """The checkpoint's mapped pages: the file's, not ours, but counted as this process's memory until dropped."""

    def __init__(self) -> None:
        self._ranges = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, permissions, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0" and permissions.endswith("p"):
                start, _, end = span.partition("-")
                self._ranges.append((int(start, 16), int(end, 16)))

    def drop(self, data: torch.Tensor) -> None:
        """Unmaps the whole pages of `data`, if a file backs them; they would be read again if they were used."""
        start = align_up(data.data_ptr(), mmap.PAGESIZE)
        end = (data.data_ptr() + data.nbytes) & -mmap.PAGESIZE
        # Anywhere else this would destroy the bytes, and perhaps somebody else's.
        if start < end and any(first <= start and end <= last for first, last in self._ranges):
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _return_free_memory() -> None:
    """Has malloc give back what tensors that transformers had to convert no longer use; it would keep most of it."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc's own
        _LIBC.malloc_trim(0)


# -- binding ------------------------------------------------------------------------------------------------------


def _bound_model(store: SharedStore) -> PreTrainedModel:
    """A model whose parameters and buffers are the store's tensors: nobody may write to them."""
    model = _empty_model(store.model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for spec, tensor in store.tensors():
        is_parameter = spec.names[0] in parameters
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for name in spec.names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, value)
    return model.eval().requires_grad_(False)


def _empty_model(description: dict[str, Any]) -> PreTrainedModel:
    """The model without memory for its tensors."""
    values = without_tags(description["config"])
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, description["dtype"]))
    if description["generation_config"] is not None:
        model.generation_config = GenerationConfig.from_dict(description["generation_config"])
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
