"""The host copy of every unit's weights: one contiguous aligned buffer each, so a unit moves in one copy.

The buffers are this process's own, or sections of a shared store that all processes of the node map.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence

import torch

from selectn_core.device import Device
from selectn_core.errors import PinningRefused, StoreRefused
from selectn_core.weights.shared_store import Section, SharedStore
from selectn_core.weights.units import TENSOR_ALIGNMENT_BYTES, Unit

logger = logging.getLogger(__name__)


class HostStore:
    """Owns the units' weights in host memory; they are written once, here, and only read afterwards."""

    def __init__(
        self,
        units: Sequence[Unit],
        device: Device,
        shared: SharedStore | None = None,
        *,
        reserve_private: Callable[[int], None] | None = None,
    ) -> None:
        """Moves the units' parameters into buffers that `device`'s link can read, one unit at a time.

        Afterwards the parameters are views of those buffers and their old memory is free, so the peak is one
        unit above the model's size. With `shared`, they are views of its sections already and nothing moves: those
        are layers, and a block is a piece of one.

        Where the device cannot lock the shared pages, the weights go to buffers of this process after all, if
        `reserve_private` is given: it is asked for their bytes first. `reason` then says so. Else PinningRefused is
        raised.
        """
        self.units = tuple(units)
        self.reason: str | None = None
        if shared is not None and not self._is_pinned(shared, device, reserve_private):
            shared.close()
            shared = None
        self._device, self._shared = device, shared
        if shared is None:
            self._buffers = [self._adopt(unit, device) for unit in self.units]
            self._checked = [
                (unit.name, buffer, _checksum(buffer)) for unit, buffer in zip(self.units, self._buffers, strict=True)
            ]
        else:
            pieces = [_piece_of(shared, unit) for unit in self.units]
            self._buffers = [
                shared.section(section.name)[start : start + unit.num_bytes]
                for unit, (section, start) in zip(self.units, pieces, strict=True)
            ]
            sections = {section.name: section for section, _ in pieces}
            self._checked = [(name, shared.section(name), section.crc32) for name, section in sections.items()]

    def _is_pinned(self, shared: SharedStore, device: Device, reserve_private: Callable[[int], None] | None) -> bool:
        """Has the device lock the shared pages; False, and that is announced, if private ones are to be used."""
        try:
            device.register_host(shared.memory)
        except PinningRefused as error:
            if reserve_private is None:
                raise PinningRefused(
                    f"{error}. Set host.weights to 'auto' or 'private': this process's own memory can be locked"
                ) from error
            num_bytes = sum(unit.num_bytes for unit in self.units)
            reserve_private(num_bytes)
            self.reason = f"not shared: {error}. The weights take {num_bytes:,} bytes of this process's own"
            logger.warning("%s is %s", shared.path, self.reason)
            return False
        return True

    def close(self) -> None:
        """Gives up a shared store: call it when the device copies no more. Buffers stay while tensors view them."""
        if self._shared is not None:
            self._device.unregister_host(self._shared.memory)
            self._shared.close()
            self._shared = None

    @property
    def location(self) -> str:
        """The shared store's file, or "private"."""
        return str(self._shared.path) if self._shared is not None else "private"

    @property
    def num_bytes(self) -> int:
        """Host bytes of all units."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def buffer(self, unit: Unit) -> torch.Tensor:
        """The unit's bytes, uint8 [unit.num_bytes]."""
        return self._buffers[unit.index]

    def bind(self, unit: Unit) -> None:
        """Makes the unit's parameters be the host copy."""
        unit.bind(unit.views(self._buffers[unit.index]))

    def check_integrity(self) -> None:
        """Raises AssertionError if a manifest overlaps or overruns its buffer, or if any weight has changed."""
        for unit, buffer in zip(self.units, self._buffers, strict=True):
            end = 0
            for spec in unit.tensors:
                assert spec.offset >= end, f"{unit.name}.{spec.name} overlaps the tensor before it"
                assert spec.offset % TENSOR_ALIGNMENT_BYTES == 0, f"{unit.name}.{spec.name} is not aligned"
                end = spec.offset + spec.num_bytes
            assert end <= buffer.nbytes == unit.num_bytes, f"{unit.name} overruns its buffer"
        for name, buffer, checksum in self._checked:
            assert _checksum(buffer) == checksum, f"the host copy of {name} has changed"

    @staticmethod
    def _adopt(unit: Unit, device: Device) -> torch.Tensor:
        buffer = device.allocate_host(unit.num_bytes)
        views = unit.views(buffer)
        for view, parameter in zip(views, unit.parameters, strict=True):
            view.copy_(parameter.data)
        unit.bind(views)
        return buffer


def _piece_of(shared: SharedStore, unit: Unit) -> tuple[Section, int]:
    """The section that holds the unit's buffer, and where in it that begins.

    Raises StoreRefused unless the unit's tensors follow each other there as they do in the unit.
    """
    section = shared.sections.get(unit.name) or shared.sections.get(unit.name.rpartition(".")[0])
    if section is not None:
        stored = {name: tensor for tensor in section.tensors for name in tensor.names}
        found = [stored[name] for spec in unit.tensors if (name := f"{unit.name}.{spec.name}") in stored]
        start = found[0].offset if found else 0
        places = [(tensor.offset - start, tensor.num_bytes) for tensor in found]
        mine = [(spec.offset, spec.num_bytes) for spec in unit.tensors]
        if places == mine and start + unit.num_bytes <= section.num_bytes:
            return section, start
    raise StoreRefused(
        f"{shared.path} has {unit.name} laid out otherwise, by another version of this software: stop "
        "the processes that use it, or set host.weights to 'private' for this one"
    )


def _checksum(buffer: torch.Tensor) -> int:
    return zlib.crc32(buffer.numpy().data)
