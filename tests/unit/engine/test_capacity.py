"""What an engine says it can take is what it can take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectn_core.engine.capacity import capacity_tokens, footprint_tokens
from selectn_core.engine.engine import Engine
from selectn_core.errors import RequestError, RequestTooLarge
from selectn_core.memory.kv_geometry import BlockGeometry, KvGeometry
from tests.support.engines import engine_config, greedy, memory_gib_for
from tests.support.tiny_models import tiny_model

BLOCKS = st.builds(
    BlockGeometry,
    page_size=st.sampled_from([4, 16]),
    blocks_per_sector=st.integers(1, 5),
    sliding_window=st.none() | st.integers(1, 64),
)
GEOMETRIES = st.builds(
    lambda types: KvGeometry(sector_bytes=256, types=tuple(types)), st.lists(BLOCKS, min_size=1, max_size=2)
)


@given(GEOMETRIES, st.lists(st.integers(1, 300), max_size=12), st.integers(10, 400), st.floats(0, 1))
def test_requests_whose_promises_fit_fit(geometry, lengths, num_sectors, share):
    kv_sectors = int(num_sectors * share)
    footprints = sum(footprint_tokens(geometry, num_sectors, length) for length in lengths)
    if footprints <= capacity_tokens(geometry, num_sectors, kv_sectors) and geometry.tokens_in(num_sectors):
        assert sum(geometry.sectors_for_request(length) for length in lengths) <= kv_sectors


def test_more_offloaded_is_more_capacity_and_what_is_counted_on_is_there():
    with Engine(tiny_model("llama"), engine_config(kv_tokens=64, max_requests=16)) as engine:
        few, many = engine.reachable_kv_tokens(), engine.reachable_kv_tokens(len(engine.units))
        assert few < many
        assert engine.reachable_kv_tokens(0) == few
        each = engine.footprint_tokens(3 + 20)
        handles = [engine.submit([5, 6, 7], greedy(20)) for _ in range(few // each)]
        assert len(handles) > 1
        for handle in handles:
            handle.result()
        assert engine.batching.swap.num_preemptions == 0
        capacity = engine.capacity()
        assert capacity.waiting_prefill_tokens == 0
        assert capacity.decode_step_s is not None
        assert capacity.decode_step_s > 0
        assert capacity.prefill_s_per_token is not None
        assert capacity.prefill_s_per_token > 0


def test_too_long_for_the_model_is_not_the_same_as_too_long_for_this_memory():
    small = engine_config("auto", memory_gib=memory_gib_for(3, kv_tokens=32), kv_tokens=32)
    with Engine(tiny_model("llama"), small) as engine:
        limit = engine.model.config.max_position_embeddings
        assert engine.max_model_len < limit
        assert not engine.capacity().is_model_limit
        with pytest.raises(RequestTooLarge):
            engine.check_request([5], greedy(limit - 1))
        with pytest.raises(RequestError) as caught:
            engine.check_request([5], greedy(limit))
        assert not isinstance(caught.value, RequestTooLarge)
    with Engine(tiny_model("llama"), engine_config(kv_tokens=512)) as engine:
        assert engine.capacity().is_model_limit
