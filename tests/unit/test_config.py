"""Configuration: frozen, and a wrong value is an error with field, value and what is allowed."""

from __future__ import annotations

import dataclasses

import pytest

from selectn_core.config import (
    BatchConfig,
    DeviceConfig,
    EngineConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    SloConfig,
)
from selectn_core.device import open_device, resolve_kind
from selectn_core.errors import ConfigError


@pytest.mark.parametrize(
    ("section", "field", "value", "allowed"),
    [
        (ModelConfig, "source", " ", "a directory"),
        (ModelConfig, "dtype", "int8", "bfloat16"),
        (DeviceConfig, "kind", "tpu", "emulated"),
        (DeviceConfig, "memory_gib", 0.0, "more than 0"),
        (DeviceConfig, "link_gb_per_s", -1.0, "more than 0"),
        (DeviceConfig, "compute_threads", 0, "at least 1"),
        (BatchConfig, "max_batch_tokens", 0, "at least 1"),
        (BatchConfig, "max_requests", 1000, "at most batch.max_batch_tokens"),
        (BatchConfig, "page_size", 2, "at least 4"),
        (OffloadConfig, "num_offloaded", -1, "'auto'"),
        (OffloadConfig, "num_offloaded", "all", "'auto'"),
        (OffloadConfig, "unit", "expert", "one of layer, block"),
        (OffloadConfig, "num_slots", 9, "at most 8"),
        (HostConfig, "weights", "pinned", "auto, shared_memory, file, private"),
        (HostConfig, "directory", "stores", "an absolute path"),
        (SloConfig, "tpot_ms", 0.0, "more than 0"),
        (SloConfig, "percentile", 1e-323, "at least 1"),
        (SloConfig, "percentile", 0.99, "at least 1"),
    ],
)
def test_wrong_values_name_field_value_and_what_is_allowed(section, field, value, allowed) -> None:
    with pytest.raises(ConfigError) as error:
        section(**{field: value})
    message = str(error.value)
    assert f".{field}={value!r}" in message
    assert allowed in message


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().device.kind = "cuda"  # type: ignore[misc]


def test_auto_is_what_the_machine_has() -> None:
    import torch

    assert resolve_kind(DeviceConfig()) == ("cuda" if torch.cuda.is_available() else "emulated")


def test_cuda_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="use 'emulated', or install a CUDA build"):
        resolve_kind(DeviceConfig(kind="cuda"))


def test_an_emulated_device_needs_a_size() -> None:
    with pytest.raises(ConfigError, match=r"device\.memory_gib is not set"):
        open_device(DeviceConfig(kind="emulated"))
    with open_device(DeviceConfig(kind="emulated", memory_gib=0.001)) as device:
        assert device.capacity_bytes == pytest.approx(0.001 * (1 << 30), rel=0.01)
