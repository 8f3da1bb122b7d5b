"""Where weights go when a device cannot lock the pages of a shared store: to private memory, and that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selectn_core.config import HostConfig, ModelConfig
from selectn_core.device.emulated import EmulatedDevice
from selectn_core.engine import engine as engine_module
from selectn_core.errors import HostMemoryExceeded, PinningRefused
from selectn_core.start import load_unsteered_engine
from tests.support.engines import engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model


class RefusingDevice(EmulatedDevice):
    """Locks no pages of others, as a GPU does not where the kernel refuses."""

    def register_host(self, memory: torch.Tensor) -> None:
        raise PinningRefused("CUDA cannot lock 9 bytes of it")


@pytest.fixture
def device(monkeypatch) -> RefusingDevice:
    device = RefusingDevice(8 << 20, bytes_per_s=50e9)
    monkeypatch.setattr(engine_module, "open_device", lambda *_, **__: device)
    return device


@pytest.fixture
def stores(tmp_path) -> Path:
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores"


def config_of(directory: Path, weights: str):
    tiny_model().model.save_pretrained(directory.parent / "model")
    model = ModelConfig(source=str(directory.parent / "model"))
    return replace(engine_config(2), model=model, host=HostConfig(weights=weights, directory=str(directory)))


@pytest.mark.usefixtures("device")
def test_where_any_place_will_do_the_weights_become_private_and_that_is_said_once(stores, caplog) -> None:
    reserved: list[tuple[int, str | None]] = []
    engine = load_unsteered_engine(
        config_of(stores, "auto"), reserve_host=lambda num_bytes, name: reserved.append((num_bytes, name))
    )
    try:
        assert list(stores.iterdir()) == [], "a store that nobody uses was left behind"
        (message,) = [record.message for record in caplog.records if record.name.endswith("host_store")]
        assert "not shared: CUDA cannot lock 9 bytes of it. The weights take" in message
        snapshot = engine.snapshot()
        assert snapshot["host_store"] == "private"
        assert snapshot["host_store_reason"] in message
        assert reserved[-1] == (engine.store.num_bytes, None), "private memory that was not asked for"
        assert snapshot["host_allocated_bytes"] >= engine.store.num_bytes
        prompt = make_prompts()[0]
        engine.start()
        assert len(engine.submit(prompt, greedy()).result()) > 0
        engine.check_integrity()
    finally:
        engine.close()


@pytest.mark.parametrize("weights", ["shared_memory", "file"])
def test_where_one_place_was_asked_for_it_is_an_error_that_says_what_to_set(device, stores, weights) -> None:
    with pytest.raises(PinningRefused, match=r"cannot lock 9 bytes of it. Set host.weights to 'auto' or 'private'"):
        load_unsteered_engine(config_of(stores, weights))
    assert list(stores.iterdir()) == []


def test_without_room_for_private_weights_it_is_an_error(device, stores) -> None:
    def refuse(num_bytes: int, shared_as: str | None) -> None:
        if shared_as is None:
            raise HostMemoryExceeded("the node has nothing left")

    with pytest.raises(HostMemoryExceeded, match="the node has nothing left"):
        load_unsteered_engine(config_of(stores, "auto"), reserve_host=refuse)
    assert list(stores.iterdir()) == []


def test_a_store_that_can_be_locked_needs_no_reason(stores) -> None:
    engine = load_unsteered_engine(config_of(stores, "shared_memory"))
    assert engine.snapshot()["host_store_reason"] is None
    assert engine.snapshot()["host_store"].startswith(str(stores))
    engine.close()
