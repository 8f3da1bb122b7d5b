"""Which GPUs share a bus, and what it carries."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cluster.node.bus_topology import (
    LANE_BYTES_PER_S,
    MAX_BUSES,
    SHARED_UP_TO_LEVEL,
    BusConfig,
    emulated_buses,
    find_buses,
    link_bytes_per_s,
    require_disjoint,
)
from cluster.protocol.node_reports import GpuReport, Unavailable
from selectn_core.errors import ConfigError

LOST = Unavailable(cause="gpu_lost", detail="GPU is lost")
UNSUPPORTED = Unavailable(cause="not_supported", detail="Not Supported")
LEVELS = (0, 10, 20, 30, 40, 50)


def gpu(index: int, **readings: Any) -> GpuReport:
    """A GPU of which only what buses are made from is known."""
    nothing = {field.name: UNSUPPORTED for field in fields(GpuReport)}
    link = {"pcie_max_generation": 4, "pcie_width": 16}
    names = {"uuid": f"GPU-{index}", "pci_bus_id": f"0000:{index:02x}:00.0"}
    return GpuReport(**{**nothing, "trouble": None, **link, **names, **readings, "index": index})


@st.composite
def machines(draw):
    """GPUs, some in trouble, and what NVML has told of their common ancestors: a tree, some of it not told."""
    count = draw(st.integers(1, 6))
    troubled = draw(st.sets(st.integers(0, count - 1)))
    gpus = [gpu(index, trouble=LOST if index in troubled else None) for index in range(count)]
    switch = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    told = draw(st.booleans())
    levels = {
        frozenset((a, b)): 10 if switch[a] == switch[b] else 50
        for a in range(count)
        for b in range(a)
        if told or draw(st.booleans())
    }
    return gpus, levels


@given(machine=machines())
def test_each_gpu_is_on_one_bus_and_buses_have_names_of_their_own(machine):
    gpus, levels = machine
    buses = find_buses(gpus, levels)
    assert sorted(name for bus in buses for name in bus.gpus) == sorted(f"GPU-{each.index}" for each in gpus)
    assert len({bus.name for bus in buses}) == len(buses)


@given(machine=machines())
def test_gpus_that_are_known_to_share_are_never_apart(machine):
    gpus, levels = machine
    bus_of = {name: bus.name for bus in find_buses(gpus, levels) for name in bus.gpus}
    for pair, level in levels.items():
        if level <= SHARED_UP_TO_LEVEL:
            assert len({bus_of[f"GPU-{index}"] for index in pair}) == 1


@given(machine=machines())
def test_with_the_whole_topology_known_gpus_share_exactly_as_it_says(machine):
    gpus, levels = machine
    pairs = {frozenset((a.index, b.index)) for a in gpus for b in gpus if a.index < b.index}
    full = {pair: levels.get(pair, 50) for pair in pairs}
    buses = find_buses(gpus, full)
    together = {frozenset((a, b)) for bus in buses for a in bus.gpus for b in bus.gpus if a != b}
    linked = {frozenset(f"GPU-{i}" for i in pair) for pair, level in full.items() if level <= SHARED_UP_TO_LEVEL}
    assert linked <= together
    assert all(bus.found_by == "topology" for bus in buses)
    if not linked:
        assert not together


@pytest.mark.parametrize("level", LEVELS)
def test_switches_and_host_bridges_are_shared_and_what_is_farther_is_not(level):
    assert len(find_buses([gpu(0), gpu(1)], {frozenset((0, 1)): level})) == (1 if level <= 30 else 2)


def test_what_is_not_known_is_assumed_shared_among_gpus_that_work():
    (bus,) = find_buses([gpu(0), gpu(1)], {})
    assert (bus.gpus, bus.found_by) == (("GPU-0", "GPU-1"), "assumed")


def test_a_silent_gpu_does_not_chain_others_together():
    buses = find_buses([gpu(0), gpu(1, trouble=LOST), gpu(2)], {frozenset((0, 2)): 50})
    assert [bus.gpus for bus in buses] == [("GPU-0",), ("GPU-1",), ("GPU-2",)]
    assert buses[1].bytes_per_s == LOST


class TestRates:
    @pytest.mark.parametrize(("generation", "gb_per_s"), [(1, 4), (3, 15.75), (4, 31.5), (5, 63), (6, 121)])
    def test_sixteen_lanes(self, generation, gb_per_s):
        assert link_bytes_per_s(generation, 16, 1.0) == pytest.approx(gb_per_s * 1e9, rel=1e-3)

    @given(st.integers(1, 2**32 - 1), st.integers(1, 32))
    def test_newer_and_wider_is_not_slower_and_garbage_is_bounded(self, generation, width):
        rate = link_bytes_per_s(generation, width, 0.5)
        assert link_bytes_per_s(min(generation + 1, 2**32 - 1), width, 0.5) >= rate
        assert 0 < rate <= max(LANE_BYTES_PER_S.values()) * 32 * 0.5

    def test_a_bus_is_as_fast_as_its_best_working_link(self):
        together = {frozenset(pair): 10 for pair in ((0, 1), (0, 2), (1, 2))}
        gpus = [gpu(0, pcie_width=8), gpu(1, pcie_max_generation=3), gpu(2, pcie_max_generation=5, trouble=LOST)]
        (bus,) = find_buses(gpus, together, efficiency=0.5)
        assert bus.bytes_per_s == link_bytes_per_s(3, 16, 0.5) == pytest.approx(link_bytes_per_s(4, 8, 0.5))

    @pytest.mark.parametrize(
        ("readings", "cause"),
        [
            ({"pcie_width": UNSUPPORTED}, "not_supported"),
            ({"pcie_width": 0}, "failed"),
            ({"trouble": LOST}, "gpu_lost"),
        ],
    )
    def test_without_a_link_it_is_a_state(self, readings, cause):
        (bus,) = find_buses([gpu(0, **readings)], {})
        assert isinstance(bus.bytes_per_s, Unavailable)
        assert bus.bytes_per_s.cause == cause


class TestConfigured:
    def test_by_uuid_or_index_and_modelled_without_a_rate(self):
        configured = [BusConfig(name="left", gpus=("GPU-1", 0)), BusConfig(name="right", gpus=(2,), gb_per_s=7)]
        left, right, rest = find_buses([gpu(index) for index in range(4)], {}, configured, efficiency=0.5)
        assert (left.name, left.gpus, left.rate_from) == ("left", ("GPU-0", "GPU-1"), "pcie_link")
        assert left.bytes_per_s == link_bytes_per_s(4, 16, 0.5)
        assert (right.gpus, right.bytes_per_s, right.rate_from) == (("GPU-2",), 7e9, "configuration")
        assert (rest.gpus, rest.found_by) == (("GPU-3",), "topology")

    def test_one_without_gpus_here_is_left_out(self):
        (bus,) = find_buses([gpu(0)], {}, [BusConfig(name="far", gpus=("GPU-9",))])
        assert bus.gpus == ("GPU-0",)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "a b"}, "buses.name='a b' is not allowed: expected 1 to 64"),
            ({"name": "a", "gb_per_s": 0}, "buses.gb_per_s=0 is not allowed: expected more than 0"),
            ({"name": "a", "gpus": (-1,)}, "buses.gpus=.* is not allowed: expected UUIDs, or indices"),
        ],
    )
    def test_wrong_values_name_the_field(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            BusConfig(**settings)

    def test_a_gpu_or_a_name_is_on_one_bus_only(self):
        left = BusConfig(name="left", gpus=(0,))
        with pytest.raises(ConfigError, match="buses.gpus=0"):
            require_disjoint([left, BusConfig(name="right", gpus=(0,))])
        with pytest.raises(ConfigError, match="buses.name='left'"):
            require_disjoint([left, BusConfig(name="left", gpus=(1,))])
        require_disjoint([left, replace(left, node="other")])


class TestEmulated:
    def test_the_users_buses_and_what_they_carry_now(self):
        (bus,) = emulated_buses((), ["b"], peek=lambda name: 2e9)
        assert (bus.name, bus.bytes_per_s, bus.found_by, bus.rate_from) == ("b", 2e9, "emulated", "emulated")

    def test_configured_ones_come_instead(self):
        configured = (BusConfig(name="x", gb_per_s=1.5), BusConfig(name="y"), BusConfig(name="gpus", gpus=(0,)))
        x, y = emulated_buses(configured, ["z"], peek=lambda name: None)
        assert (x.bytes_per_s, x.rate_from, x.found_by) == (1.5e9, "configuration", "configuration")
        assert isinstance(y.bytes_per_s, Unavailable)

    def test_no_more_than_so_many(self):
        names = [f"b{index}" for index in range(2 * MAX_BUSES)]
        assert len(emulated_buses((), names, peek=lambda name: 1.0)) == MAX_BUSES

    def test_one_that_cannot_be_read_is_a_state(self):
        def peek(name: str) -> float:
            raise PermissionError("not yours")

        (bus,) = emulated_buses((), ["b"], peek=peek)
        assert bus.bytes_per_s == Unavailable(cause="failed", detail="not yours")
