"""The device under contract: every implementation, CUDA only where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from selectn_core.device import Device

CAPACITY_BYTES = 1 << 20


def open_emulated() -> Device:
    from selectn_core.device.emulated import EmulatedDevice

    return EmulatedDevice(CAPACITY_BYTES, bytes_per_s=50e9)


def open_cuda() -> Device:
    from selectn_core.device.cuda import CudaDevice

    return CudaDevice(CAPACITY_BYTES)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[open_emulated, pytest.param(open_cuda, marks=[pytest.mark.gpu, NO_CUDA])])
def device(request) -> Iterator[Device]:
    opened: Callable[[], Device] = request.param
    with opened() as device:
        yield device
