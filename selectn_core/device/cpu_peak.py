"""The most bytes of new tensors that are alive at once on the CPU, where no allocator keeps count."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuPeak(TorchDispatchMode):
    """While entered, counts the storage of every tensor that an operator returns, until it is freed.

    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._now_bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._add(storage, 0)  # it was there before, and views of it are not new
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._add(storage, storage.nbytes())
        return result

    def _add(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = num_bytes
        self._now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now_bytes -= self._known.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    # A sparse tensor is made of others, which have been counted.
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]
