"""What a performance record of an engine is valid for, read off the engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from selectn_core.config import EngineConfig
from selectn_core.device import Device
from selectn_core.device.cpu_name import cpu_name
from selectn_core.planning.record import Fingerprint, UnitKind
from selectn_core.weights.units import Unit

# Of a model's configuration, what changes with where it was loaded from and not with what it computes.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation", "dtype")


def fingerprint_of(model: PreTrainedModel, config: EngineConfig, device: Device, attention: str) -> Fingerprint:
    """The fingerprint of an engine that runs `model` on `device`, and attends by what is named `attention`."""
    batch = config.batch
    is_emulated = device.kind == "emulated"
    return Fingerprint(
        model=model_hash(model.config),
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=attention,
        unit=config.offload.unit,
        device=device.kind,
        device_name=cpu_name() if is_emulated else torch.cuda.get_device_name(device.torch_device),
        compute_threads=torch.get_num_threads() if is_emulated else 0,
        link=f"emulated at {config.device.link_gb_per_s:g} GB/s" if is_emulated else "the GPU's own",
        max_batch_tokens=batch.max_batch_tokens,
        max_requests=batch.max_requests,
        page_size=batch.page_size,
        torch=str(torch.__version__),
        transformers=version("transformers"),
    )


def model_hash(config: PreTrainedConfig) -> str:
    """What a model computes, by its configuration: the same wherever it was loaded from."""
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def kinds_of(units: Sequence[Unit]) -> tuple[tuple[UnitKind, ...], tuple[int, ...]]:
    """The kinds of units there are, and for each unit which one it is."""
    kinds = [UnitKind(name=unit.kind, num_bytes=unit.num_bytes) for unit in units]
    distinct = tuple(dict.fromkeys(kinds))
    return distinct, tuple(distinct.index(kind) for kind in kinds)
