"""Token identity on a real GPU: the same bar as on the emulated device."""

from __future__ import annotations

import pytest
import torch

from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from tests.support.engines import engine_config, generate
from tests.support.tiny_models import FAMILIES, NUM_LAYERS
from tests.unit.engine import test_block_units as blocks
from tests.unit.engine.test_engine_identity import random_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_at_every_interval(family, dtype) -> None:
    expected = generate(family, engine_config(0, kind="cuda"), dtype=dtype)
    for num_offloaded in range(1, NUM_LAYERS + 1):
        for num_slots in (1, 2):
            tokens = generate(family, engine_config(num_offloaded, num_slots, kind="cuda"), dtype=dtype)
            assert tokens == expected, f"k={num_offloaded}, S={num_slots}"


@pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_with_random_plans_in_mid_generation(seed, executor_class) -> None:
    expected = generate("llama", engine_config(0, kind="cuda"))
    tokens = generate(
        "llama", engine_config(2, 1, kind="cuda"), before_step=random_plans(seed), executor_class=executor_class
    )
    assert tokens == expected


@pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_random_plans_of_blocks(family, executor_class) -> None:
    tokens = generate(
        family,
        engine_config(3, 1, kind="cuda", unit="block"),
        before_step=blocks.random_plans(11, blocks.is_attention, blocks.is_not_attention, blocks.anything),
        executor_class=executor_class,
    )
    assert tokens == generate(family, engine_config(0, kind="cuda"))
