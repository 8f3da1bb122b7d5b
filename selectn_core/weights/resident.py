"""The weights that always stay on the device: embeddings, final norm, head, and every buffer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from selectn_core.device import Device, align_up
from selectn_core.weights.units import Unit


class ResidentWeights:
    """Moves every parameter and buffer that belongs to no unit into one allocation on the device."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], device: Device) -> None:
        """Raises DeviceMemoryExceeded if they do not fit. Tied tensors move once."""
        self._tensors, self._device = list(resident_tensors(model, units)), device
        self.num_bytes = sum(align_up(tensor.nbytes) for tensor in self._tensors)
        self.memory = device.allocate(self.num_bytes, "embeddings, norms and head")
        self._is_closed = False
        offset = 0
        for tensor in self._tensors:
            view = self.memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.data)
            tensor.data = view
            offset += align_up(view.nbytes)

    def close(self) -> None:
        """Copies them back to host memory and gives the device's back. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for tensor in self._tensors:
            tensor.data = tensor.data.to("cpu", copy=True)
        memory, self.memory = self.memory, torch.empty(0, dtype=torch.uint8)
        self._device.free(memory)


def resident_tensors(model: nn.Module, units: Sequence[Unit]) -> Iterable[torch.Tensor]:
    """Parameters outside the units, and all buffers (those of the units are small and do not move)."""
    moving = {id(parameter) for unit in units for parameter in unit.parameters}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in moving)
    yield from model.buffers()
