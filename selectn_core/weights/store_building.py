"""Writes a model's weights into a store, freeing what has been written: at no time is much of it in memory twice."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from selectn_core.config import ModelConfig
from selectn_core.device import align_up
from selectn_core.weights.checkpoint import load_weights, refuse_not_finite
from selectn_core.weights.resident import resident_tensors
from selectn_core.weights.shared_store import Chunks, Section, SharedStore, StoredTensor, stored_bytes, write_store
from selectn_core.weights.store_binding import dtype_name, empty_model, named_tensors, tensor_shapes
from selectn_core.weights.store_places import Place, ReserveHost, place_for
from selectn_core.weights.units import TENSOR_ALIGNMENT_BYTES, find_units

_REST = "rest"  # the section of what belongs to no unit: embeddings, norms, head, and all buffers
_CHUNK_BYTES = 8 << 20
_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None)


class NotShareable(Exception):
    """`model` has been loaded, but cannot be made again from its configuration alone."""

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        super().__init__(reason)
        self.model = model


def build_store(
    resolved: ModelConfig, fingerprint: str, places: Sequence[Place], reserve_host: ReserveHost
) -> SharedStore:
    """The store of a checkpoint, in the first place with room. Raises NotShareable, HostMemoryExceeded."""
    model = load_weights(resolved)
    description = description_of(model)
    _check_rebuilds(model, description)
    sections, tensors = _layout(model)
    num_bytes = stored_bytes(sections)
    place = place_for(places, num_bytes, lambda: reserve_host(num_bytes, fingerprint))
    pages = _FilePages()
    return write_store(
        place.directory,
        fingerprint,
        description,
        sections,
        lambda section: _chunks(section, tensors[section.name], pages, resolved),
    )


def description_of(model: PreTrainedModel) -> dict[str, Any]:
    """What `empty_model` makes the same model from, without its weights."""
    generation = model.generation_config
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": json.loads(generation.to_json_string(use_diff=False)) if generation else None,
        "dtype": dtype_name(model.dtype),
    }


def _check_rebuilds(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Raises NotShareable unless the description alone leads to a model with the same tensors."""
    if not type(model).__module__.startswith("transformers.") or model.config.model_type not in CONFIG_MAPPING:
        raise NotShareable(model, "its code is not transformers' own, so its tensors cannot be told apart from others")
    empty = empty_model(description)
    if type(empty) is not type(model) or tensor_shapes(empty) != tensor_shapes(model):
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
    for name, tensor in named_tensors(model):
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
                    dtype=dtype_name(tensor.dtype),
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
