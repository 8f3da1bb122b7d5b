"""Tests and benchmarks take no more of a GPU than their small models need."""

from __future__ import annotations

import pytest

from benchmarks.bench_interval import enough_gib
from selectn_core.batching import kv_geometry, kv_shapes
from selectn_core.config import BatchConfig
from selectn_core.engine.device_budget import everything_bytes
from selectn_core.weights.units import find_units
from tests.support.engines import CUDA_MEMORY_GIB, engine_config
from tests.support.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_an_engine_is_given_of_a_gpu_is_enough_and_no_card(family: str) -> None:
    model = tiny_model(family).model
    units = find_units(model, "layer")
    geometry = kv_geometry(model, BatchConfig().page_size, kv_shapes(model, units[-1].module))
    given_bytes = enough_gib(model, kv_tokens=4096) * 2**30
    assert everything_bytes(model, units, geometry, 4096) < given_bytes < 2 * 2**30
    assert engine_config(kind="cuda").device.memory_gib == CUDA_MEMORY_GIB < 1
