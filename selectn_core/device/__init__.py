"""Devices behind one contract (`base`); `open_device` picks and imports the implementation.

torch is imported with the first name that needs it: a node agent wants `device.bus` alone, and has no use for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from selectn_core.config import DeviceConfig
from selectn_core.device.alignment import ALIGNMENT_BYTES, align_up
from selectn_core.device.link_usage import LinkUsage
from selectn_core.errors import ConfigError

if TYPE_CHECKING:
    from selectn_core.device.base import Device, Event, Timestamp

__all__ = ["ALIGNMENT_BYTES", "Device", "Event", "LinkUsage", "Timestamp", "align_up", "open_device", "resolve_kind"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("selectn_core.device.base"), name)


def resolve_kind(config: DeviceConfig) -> str:
    """ "cuda" or "emulated": what `auto` means on this machine. Raises ConfigError for CUDA that is not there."""
    import torch

    has_cuda = torch.cuda.is_available()
    if config.kind == "cuda" and not has_cuda:
        raise ConfigError(
            "device.kind='cuda' but torch finds no CUDA device: use 'emulated', or install a CUDA build of torch"
        )
    if config.kind == "auto":
        return "cuda" if has_cuda else "emulated"
    return config.kind


def open_device(config: DeviceConfig, *, default_capacity_bytes: int | None = None) -> Device:
    """Opens the configured device; `default_capacity_bytes` sizes an emulated one that has no `memory_gib`.

    Raises ConfigError, or DeviceMemoryExceeded where the GPU has less than was asked for.
    """
    configured = int(config.memory_gib * (1 << 30)) if config.memory_gib is not None else None
    if resolve_kind(config) == "cuda":
        from selectn_core.device.cuda import CudaDevice

        return CudaDevice(configured)
    from selectn_core.device.emulated import EmulatedDevice

    capacity = configured if configured is not None else default_capacity_bytes
    if capacity is None:
        raise ConfigError("device.memory_gib is not set: an emulated device needs a size")
    return EmulatedDevice(capacity, bytes_per_s=config.link_gb_per_s * 1e9, bus_name=config.bus)
