"""What the coordinator is told of a node's report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.node.node_state import bus_of_gpu, node_state
from cluster.protocol.messages import BusState
from cluster.protocol.node_reports import (
    BusReport,
    HostReport,
    LedgerReport,
    NodeReport,
    NodeTelemetry,
    Placement,
    Unavailable,
)
from selectn_core.device.host_memory import HostMemory

UNKNOWN = Unavailable(cause="failed", detail="for a test")
MEMORY = HostMemory(available_bytes=60, limit_bytes=100, limited_by="a cgroup")


def bus(name: str, *gpus: str, rate: float | Unavailable = 1e9) -> BusReport:
    return BusReport(name=name, gpus=gpus, bytes_per_s=rate, found_by="topology", rate_from="pcie_link")


def report(
    *buses: BusReport,
    ledger: LedgerReport | None = None,
    memory: HostMemory | Unavailable = MEMORY,
    at_s: float = 5.0,
    unix_s: float = 1e9,
) -> NodeReport:
    return NodeReport(
        node_id="n",
        agent_id="agent",
        sequence=3,
        telemetry=NodeTelemetry(
            sampled_s=at_s,
            sampled_unix_s=unix_s,
            sampling_s=0.1,
            nvml=UNKNOWN,
            gpus=(),
            buses=buses,
            host=HostReport(memory=memory, pressure=UNKNOWN, shared_memory_free_bytes=UNKNOWN),
        ),
        ledger=ledger,
    )


def ledger_of(*placed: tuple[str, str | None], is_complete: bool = True) -> LedgerReport:
    replicas = tuple(Placement(replica_id=name, bus_id=bus_id) for name, bus_id in placed)
    return LedgerReport(capacity_bytes=80, reserved_bytes=10, replicas=replicas, is_complete=is_complete)


def test_buses_have_their_rate_their_devices_and_who_lives_on_them():
    placed = ledger_of(("a", "one"), ("b", "two"), ("c", None))
    state = node_state(report(bus("one", "G1", "G2"), bus("two", "G3"), ledger=placed), heard_life=7, num_sharing=4)
    assert state.buses == (
        BusState(bus_id="one", bytes_per_s=10**9, num_devices=2, replica_ids=("a",)),
        BusState(bus_id="two", bytes_per_s=10**9, num_devices=1, replica_ids=("b",)),
    )
    assert (state.node_id, state.heard_life) == ("n", 7)


@pytest.mark.parametrize(("num_sharing", "num_placed", "expected"), [(3, 1, 3), (1, 0, 1), (1, 2, 2)])
def test_a_bus_without_gpus_has_as_many_devices_as_may_share_it_or_do(num_sharing, num_placed, expected):
    placed = ledger_of(*((f"r{number}", "lab") for number in range(num_placed)))
    (state,) = node_state(report(bus("lab"), ledger=placed), heard_life=0, num_sharing=num_sharing).buses
    assert state.num_devices == expected


def test_nobody_is_left_out_by_a_list_that_may_not_be_whole():
    for ledger in (ledger_of(("a", "one"), is_complete=False), None):
        (state,) = node_state(report(bus("one", "G"), ledger=ledger), heard_life=0, num_sharing=1).buses
        assert state.replica_ids is None


def test_a_bus_whose_rate_is_not_known_is_not_divided():
    state = node_state(report(bus("one", "G", rate=UNKNOWN), bus("two", "H")), heard_life=0, num_sharing=1)
    assert [each.bus_id for each in state.buses] == ["two"]


def test_a_restarted_agents_reports_are_newer_than_its_predecessors():
    before, after = report(at_s=1e9), replace(report(at_s=1e9 + 0.2), agent_id="another", sequence=0)
    states = [node_state(each, heard_life=0, num_sharing=1) for each in (before, after)]
    assert states[0].sequence < states[1].sequence


@pytest.mark.parametrize("step_s", [5.0, -3600.0])
def test_a_nodes_clock_that_is_set_changes_no_order(step_s: float):
    before, after = report(at_s=7.0, unix_s=1e9), report(at_s=7.2, unix_s=1e9 + 0.2 + step_s)
    first, second = (node_state(each, heard_life=0, num_sharing=1).sequence for each in (before, after))
    assert second - first == pytest.approx(0.2e6)


def test_the_bus_of_a_gpu():
    known = report(bus("one", "G1", "G2"), bus("two", "G3"))
    assert bus_of_gpu(known, "G3") == "two"
    assert bus_of_gpu(known, "G9") is None


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_bus_with_a_rate_that_is_none_does_not_keep_the_others_from_being_heard_of(rate):
    state = node_state(report(bus("odd", "g", rate=rate), bus("good", "h")), heard_life=1, num_sharing=1)
    assert [each.bus_id for each in state.buses] == ["good"]
