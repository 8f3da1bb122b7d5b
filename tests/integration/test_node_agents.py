"""Node agents on a real Ray cluster of several nodes: in step with the nodes, whatever dies."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cluster.node.bus_topology import BusConfig
from cluster.protocol.node_reports import NodeReport, NvmlInfo, Unavailable
from tests.standins.nvml import StandIn
from tests.support import agent_cluster
from tests.support.agent_cluster import Driver
from tests.support.processes import is_loopback
from tests.support.waiting import wait_until

TIMEOUT_S = 60
BUSES = (
    BusConfig(name="bus-left", node="left", gb_per_s=1),
    BusConfig(name="bus-right", node="right", gb_per_s=2),
    BusConfig(name="bus-head", node="head", gb_per_s=3),
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """A cluster of the nodes "head" and "left", with agents. Fails at the end if a process is left."""
    driver = Driver()
    try:
        driver.run(agent_cluster.start_cluster)
        driver.run(agent_cluster.add_node, "left")
        driver.run(agent_cluster.start_agents, BUSES)
        yield driver
        assert driver.run(agent_cluster.stop_cluster) == []
    finally:
        driver.close()


def reports_of_all(driver: Driver) -> dict[str, NodeReport]:
    """By node id, as soon as every node reports."""

    def is_so() -> bool:
        return set(driver.run(agent_cluster.reports)) == driver.run(agent_cluster.living_nodes)

    wait_until(is_so, TIMEOUT_S, "a report of every node")
    return driver.run(agent_cluster.reports)


def wait_for_another_agent(driver: Driver, before: NodeReport) -> None:
    def is_there() -> bool:
        report = driver.run(agent_cluster.reports).get(before.node_id)
        return report is not None and report.agent_id != before.agent_id

    wait_until(is_there, TIMEOUT_S, "a new agent's report")


def test_every_node_reports_its_own_hardware(driver):
    reports = reports_of_all(driver)
    assert {node_id: report.node_id for node_id, report in reports.items()} == {each: each for each in reports}
    buses = [[(bus.name, bus.bytes_per_s) for bus in report.telemetry.buses] for report in reports.values()]
    assert [("bus-head", 3e9)] in buses
    assert [("bus-left", 1e9)] in buses


def test_reports_go_on_and_reach_the_sink_even_a_new_one(driver):
    first = reports_of_all(driver)

    def all_are_received() -> bool:
        return driver.run(agent_cluster.received).keys() >= first.keys()

    wait_until(all_are_received, TIMEOUT_S, "reports received")
    driver.run(agent_cluster.replace_receiver)
    wait_until(all_are_received, TIMEOUT_S, "reports received by the new one")
    for node_id, report in driver.run(agent_cluster.received).items():
        assert report.agent_id == first[node_id].agent_id
        assert report.sequence > first[node_id].sequence


def test_a_sink_that_hangs_collects_no_reports_and_gets_the_newest_next(driver):
    node_id = next(iter(reports_of_all(driver)))

    def newest() -> int:
        return driver.run(agent_cluster.reports)[node_id].sequence

    pid = driver.run(agent_cluster.process_of_receiver)
    driver.run(agent_cluster.send_signal, pid, signal.SIGSTOP)
    hung_at = newest()
    try:
        wait_until(lambda: newest() >= hung_at + 20, TIMEOUT_S, "20 reports while nobody takes them")
    finally:
        driver.run(agent_cluster.send_signal, pid, signal.SIGCONT)
    wait_until(
        lambda: driver.run(agent_cluster.taken)[node_id][-1] >= hung_at + 20, TIMEOUT_S, "reports are taken again"
    )
    late = [each for each in driver.run(agent_cluster.taken)[node_id] if hung_at < each < hung_at + 20]
    assert len(late) <= 1  # the one that was under way


def test_an_agent_whose_process_is_killed_comes_back(driver):
    report = next(iter(reports_of_all(driver).values()))
    driver.run(agent_cluster.send_signal, driver.run(agent_cluster.processes_of_agents)[report.node_id], signal.SIGKILL)
    wait_for_another_agent(driver, report)


def test_an_agent_that_ray_will_not_restart_is_started_anew(driver):
    report = next(iter(reports_of_all(driver).values()))
    driver.run(agent_cluster.kill_agent_for_good, report.node_id)
    wait_for_another_agent(driver, report)


def test_a_node_joins_after_its_manager_died_and_leaves(driver):
    reports_of_all(driver)
    agents_before = driver.run(agent_cluster.processes_of_agents)
    driver.run(agent_cluster.send_signal, driver.run(agent_cluster.process_of_manager), signal.SIGKILL)
    node_id = driver.run(agent_cluster.add_node, "right")
    joined = reports_of_all(driver)[node_id]
    assert [bus.name for bus in joined.telemetry.buses] == ["bus-right"]
    # The others have gone on: the new manager has found them.
    assert agents_before.items() <= driver.run(agent_cluster.processes_of_agents).items()

    driver.run(agent_cluster.remove_node, "right")
    wait_until(
        lambda: driver.run(agent_cluster.nodes_with_agents) == set(agents_before), TIMEOUT_S, "the agent to be gone"
    )


def test_a_gpu_is_lost_while_its_node_reports(driver, tmp_path):
    machine = StandIn(tmp_path)
    node_id = driver.run(agent_cluster.add_node, "with-gpus", machine.environment)
    report = reports_of_all(driver)[node_id]
    assert isinstance(report.telemetry.nvml, NvmlInfo)
    assert [gpu.trouble for gpu in report.telemetry.gpus] == [None, None]

    machine.describe("lost 1", "hang 0 nvmlDeviceGetPowerUsage")

    def troubles() -> list[str]:
        gpus = driver.run(agent_cluster.reports)[node_id].telemetry.gpus
        return [gpu.trouble.cause for gpu in gpus if isinstance(gpu.trouble, Unavailable)]

    wait_until(lambda: troubles() == ["timed_out", "gpu_lost"], TIMEOUT_S, "both GPUs in trouble")
    machine.describe()
    wait_until(lambda: troubles() == [], TIMEOUT_S, "both GPUs back")
    wait_until(
        lambda: "ray_selectn_gpu_temperature_c{" in driver.run(agent_cluster.metrics_of, node_id),
        TIMEOUT_S,
        "the GPU's metrics",
    )


def test_nothing_listens_outside_loopback(driver):
    listeners = driver.run(agent_cluster.listeners)
    assert any("NodeAgent" in name for name in listeners.values())
    assert {address for address in listeners if not is_loopback(address)} == set()
