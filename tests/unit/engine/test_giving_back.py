"""Engines hold one arena at a time, and give all device memory back when they close, without a garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from selectn_core.device.cpu_peak import CpuPeak
from selectn_core.engine import engine as engine_module
from selectn_core.engine.engine import Engine
from selectn_core.errors import DeviceMemoryExceeded, UnsupportedModel
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from tests.standins.allocating_device import AllocatingDevice
from tests.support.engines import engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model

CAPACITY_BYTES = 8 << 20


@pytest.fixture
def device(monkeypatch) -> Iterator[AllocatingDevice]:
    """The device that the next engine opens."""
    with AllocatingDevice(CAPACITY_BYTES) as device:
        monkeypatch.setattr(engine_module, "open_device", lambda *_, **__: device)
        yield device


@pytest.fixture
def no_collector(monkeypatch) -> Iterator[None]:
    """What is in a reference cycle stays. Transformers asks for a collection now and then, too."""
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("is_used", [False, True])
def test_a_closed_engine_holds_no_device_memory(device, is_used) -> None:
    """The engine, its model, and what else the caller may have of it are still there."""
    engine = Engine(tiny_model(), engine_config(2))
    assert device.alive().keys() == {"embeddings, norms and head", "the KV cache"}
    if is_used:
        handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
        with engine:
            assert all(handle.result() for handle in handles)
    engine.close()
    assert device.alive() == {}
    assert device.allocated_bytes == 0
    assert all(parameter.device.type == "cpu" for parameter in engine.model.parameters())
    engine.snapshot()


@pytest.mark.usefixtures("no_collector")
def test_loading_holds_one_arena_at_a_time(device) -> None:
    """One is made to measure activations with, and one to serve from. Both take most of what is free."""
    with CpuPeak() as peak:
        engine = Engine(tiny_model(), engine_config(0))
    arena_bytes = device.alive()["the KV cache"]
    assert arena_bytes > CAPACITY_BYTES // 2, "the test says nothing: two arenas would fit"
    assert device.most_alive_bytes <= CAPACITY_BYTES
    # Transformers makes a cache of its own first: not in the accounts of any device, but a GPU's memory all the same.
    assert peak.peak_bytes < arena_bytes + CAPACITY_BYTES // 2
    engine.close()


@pytest.mark.usefixtures("no_collector")
def test_ten_engines_in_a_row_have_room_in_one_process(monkeypatch) -> None:
    kept: list[Engine] = []  # a caller may be slow to forget them
    devices: list[AllocatingDevice] = []
    for _ in range(10):
        device = AllocatingDevice(CAPACITY_BYTES)
        device._given_out = [each for earlier in devices for each in earlier._given_out]  # all are on one card
        monkeypatch.setattr(engine_module, "open_device", lambda *_, device=device, **__: device)
        engine = Engine(tiny_model(), engine_config(2))
        with engine:
            assert engine.submit(make_prompts()[0], greedy(2)).result()
        kept.append(engine)
        devices.append(device)
    assert all(device.alive() == {} for device in devices)


class FailingExecutor(OverlappedExecutor):
    """Cannot place the weights."""

    def attach(self) -> None:
        raise DeviceMemoryExceeded("no room today")


class BreakingExecutor(OverlappedExecutor):
    """Fails in the first step, which is the self-test's."""

    def _before_unit(self, unit) -> None:
        super()._before_unit(unit)
        raise RuntimeError("a kernel that there is not")


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("executor_class", "error"), [(FailingExecutor, DeviceMemoryExceeded), (BreakingExecutor, UnsupportedModel)]
)
def test_an_engine_that_cannot_be_built_holds_no_device_memory(device, executor_class: type[Executor], error) -> None:
    with pytest.raises(error) as raised:
        Engine(tiny_model(), engine_config(2), executor_class=executor_class)
    assert raised.value.__traceback__ is not None, "which has all that was local"
    assert device.alive() == {}


class TestRoom:
    """What the accounts do not see."""

    def test_an_engine_without_room_for_a_step_after_warm_up_is_refused(self, device, monkeypatch) -> None:
        monkeypatch.setattr(AllocatingDevice, "room_bytes", 1000)
        with pytest.raises(DeviceMemoryExceeded, match=r"after warm-up 1,000 bytes .* lower device.memory_gib"):
            Engine(tiny_model(), engine_config(2))
        assert device.alive() == {}

    def test_an_error_of_torchs_allocator_while_loading_is_ours(self, device) -> None:
        class Large(OverlappedExecutor):
            def _before_unit(self, unit) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with pytest.raises(DeviceMemoryExceeded, match=r"Tried to allocate 2.00 GiB.* lower device.memory_gib"):
            Engine(tiny_model(), engine_config(2), executor_class=Large)
        assert device.alive() == {}
