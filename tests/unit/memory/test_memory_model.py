"""The memory model is the engine's own layout: what it says a plan takes is what the engine then holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.batching import KvPages
from selectn_core.errors import ConfigError
from selectn_core.latency.recurrence import Link, StepCosts
from selectn_core.memory.memory_model import MemoryModel, kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.candidates import Objective, UnitSet, candidates_of
from selectn_core.planning.search import search
from tests.support.engines import CheckedEngine, engine_config
from tests.support.tiny_models import tiny_model


def memory_of(engine, **limits) -> MemoryModel:
    return MemoryModel(
        resident_bytes=engine.resident.num_bytes,
        kv=engine.batching.geometry,
        num_reserved_sectors=KvPages.num_reserved,
        workspace=engine.workspace,
        **limits,
    )


def unit_set(engine, memory, kv_tokens) -> UnitSet:
    costs = StepCosts(compute_s=(1.0,) * len(engine.units), unit_bytes=tuple(unit.num_bytes for unit in engine.units))
    return UnitSet(
        name="layers",
        objectives=(Objective(name="TPOT", limit_s=1e9, steps=(costs,)),),
        memory=memory,
        kv_sectors=engine.batching.geometry.sectors_for(kv_tokens),
    )


def tight_engine(family: str) -> tuple[CheckedEngine, UnitSet]:
    """An engine whose KV cache must hold so much that three layers have to be offloaded."""
    kv_tokens = 48
    for _ in range(2):  # the first finds out how large the arena is
        config = engine_config("auto", 1, memory_gib=0.5 / 1024, kv_tokens=kv_tokens)
        engine = CheckedEngine(tiny_model(family), config)
        units = unit_set(engine, memory_of(engine, device_bytes=engine.device.capacity_bytes), kv_tokens)
        three = next(c for c in candidates_of(units) if len(c.offloaded) == 3)
        room = engine.arena.num_sectors - three.home_sectors - three.slot_sectors
        kv_tokens = engine.batching.geometry.tokens_in(room)
        if room == units.kv_sectors:
            break
        engine.close()
    return engine, units


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mistral"])
def test_a_plan_takes_of_a_real_engine_what_was_planned(family: str) -> None:
    """Units alike and not, a sliding window; every k and S that fits is accepted, every other is refused."""
    engine, units = tight_engine(family)
    memory = units.memory
    with engine:
        assert memory.num_sectors == engine.arena.num_sectors
        fitting = 0
        for candidate in candidates_of(units):
            if not candidate.fits_device:
                with pytest.raises(ConfigError, match="is not possible"):
                    engine.set_plan(candidate.plan)
                continue
            fitting += 1
            engine.set_plan(candidate.plan)
            engine.executor.request_plan(candidate.plan)
            engine.executor.apply_plan()
            held = engine.account().device
            need = memory.need(
                home_sectors=candidate.home_sectors, slot_sectors=candidate.slot_sectors, kv_sectors=units.kv_sectors
            )
            assert need.kv_bytes <= held.kv_bytes
            for owner in ("resident_bytes", "homes_bytes", "slots_bytes", "padding_bytes", "workspace_bytes"):
                assert getattr(need, owner) == getattr(held, owner), owner
        assert 0 < fitting < len(list(candidates_of(units)))
        assert search([units], Link(bytes_per_s=1.0)).k_min == 3


@given(
    st.integers(0, 400),
    st.sampled_from([0.0, 0.1, 0.75, 3.3]),
    st.integers(0, 3000),
    st.integers(0, 1000),
)
def test_the_smallest_device_is_the_smallest(num_sectors, per_sector, step_bytes, resident_bytes) -> None:
    model = MemoryModel(
        resident_bytes=resident_bytes,
        kv=kv_of_tokens(16),
        workspace=Workspace(step_bytes=step_bytes, bytes_per_sector=per_sector),
    )
    least = model.device_bytes_for(num_sectors)

    def sectors(device_bytes):
        given_bytes = MemoryModel(
            resident_bytes=resident_bytes, kv=model.kv, workspace=model.workspace, device_bytes=device_bytes
        )
        return given_bytes.num_sectors

    assert sectors(least) >= num_sectors > sectors(least - 1)


@given(st.integers(1, 9), st.integers(1, 200))
def test_every_request_of_a_batch_has_pages_of_its_own(num_requests, num_tokens) -> None:
    geometry = kv_of_tokens(16, page_size=16)
    assert geometry.sectors_for_batch(num_requests, num_tokens) == num_requests * geometry.sectors_for(num_tokens)
