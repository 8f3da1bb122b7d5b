"""The device under contract: every implementation, CUDA only where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from selectn_core.device import Device
from tests.standins.fake_cuda import FakeCuda, install

CAPACITY_BYTES = 1 << 20


def open_emulated() -> Device:
    from selectn_core.device.emulated import EmulatedDevice

    return EmulatedDevice(CAPACITY_BYTES, bytes_per_s=50e9)


def open_cuda() -> Device:
    from selectn_core.device.cuda import CudaDevice

    return CudaDevice(CAPACITY_BYTES)


def open_cuda_on_a_fake() -> Device:
    """The same code on a fake of torch.cuda, which the fixture has put in place."""
    return open_cuda()


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[open_emulated, open_cuda_on_a_fake, pytest.param(open_cuda, marks=[pytest.mark.gpu, NO_CUDA])])
def device(request, monkeypatch) -> Iterator[Device]:
    opened: Callable[[], Device] = request.param
    if opened is open_cuda_on_a_fake:
        install(monkeypatch, FakeCuda())
    with opened() as device:
        yield device
