"""The coordinator on real Ray: replicas get ranges, whatever is killed or hangs, and never more than the bus has."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest
import ray

from cluster.coordinator.actor import open_coordinator
from cluster.coordinator.coordinator import CoordinatorConfig
from cluster.protocol.messages import LinkDemand
from tests.support.bus_users import BusUser, ReportingNode
from tests.support.waiting import wait_until

# Generous with the clocks, so that a thread that wakes late on a busy machine is not taken for a broken promise.
CONFIG = CoordinatorConfig(lease_s=2.0, clock_drift=0.25)
HOLD_S, PERIOD_S = 0.4, 0.2
BUS_BYTES_PER_S, UNIT = 40_000_000, 1_000_000
TIMEOUT_S = 60


def loose(k_max: int) -> LinkDemand:
    """A unit costs 1 MB/s."""
    return LinkDemand(k_min=1, k_max=k_max, unit_bytes=UNIT, step_s=1.0)


def tight(k_max: int) -> LinkDemand:
    """A unit costs 4 MB/s."""
    return LinkDemand(k_min=1, k_max=k_max, unit_bytes=UNIT, step_s=0.25)


@pytest.fixture(scope="module")
def node(urls) -> Iterator[ReportingNode]:
    with ReportingNode(CONFIG, BUS_BYTES_PER_S, ("a", "b"), PERIOD_S) as node:
        yield node
    ray.kill(open_coordinator(CONFIG))


@pytest.fixture(scope="module")
def bus(node) -> Iterator[dict[str, Any]]:
    """Two replicas on one bus; checks at the end that they were never told to use more than it has."""
    users = {"a": start("a", loose(30)), "b": start("b", tight(30))}
    yield users
    ray.get([each.close.remote() for each in users.values()])
    told = ray.get([each.told.remote() for each in users.values()])
    assert most_at_once(told) <= BUS_BYTES_PER_S


def start(name: str, link: LinkDemand) -> Any:
    return ray.remote(num_cpus=0)(BusUser).remote(name, CONFIG, link, HOLD_S)


def most_at_once(told: list[list[tuple[float, int]]]) -> int:
    """The largest sum that ever held, each user at the last it was told."""
    now = [0] * len(told)
    most = 0
    for _, user, share in sorted((when, user, share) for user, events in enumerate(told) for when, share in events):
        now[user] = share
        most = max(most, sum(now))
    return most


def ranges(users: dict[str, Any]) -> dict[str, int]:
    """k_max by replica; -1 for one without a lease."""
    states = ray.get([each.state.remote() for each in users.values()], timeout=TIMEOUT_S)
    return {name: s.k_range[1] if s.has_lease else -1 for name, s in zip(users, states, strict=True)}


def wait_for_ranges(users: dict[str, Any], expected: dict[str, int]) -> None:
    wait_until(lambda: ranges(users) == expected, TIMEOUT_S, f"ranges {expected}")


def life() -> int:
    return ray.get(open_coordinator(CONFIG).status.remote(), timeout=TIMEOUT_S).life


def is_another_life(than: int) -> bool:
    try:
        return life() != than
    except ray.exceptions.RayError:
        return False


def coordinator_process() -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    return next(each for each in children if each.name().startswith("ray::CoordinatorActor"[:15]))


def test_replicas_get_the_allocation_and_follow_demand(bus):
    """30 MB/s for the loose one, which uses the bus better; 10 MB/s are 2 units of the tight one, and some to spare."""
    wait_for_ranges(bus, {"a": 30, "b": 2})
    ray.get(bus["a"].set_link.remote(loose(10)))
    wait_for_ranges(bus, {"a": 10, "b": 7})
    ray.get(bus["a"].set_link.remote(loose(30)))
    wait_for_ranges(bus, {"a": 30, "b": 2})


def test_a_coordinator_that_is_killed_twice_is_rebuilt_from_reports(bus):
    wait_for_ranges(bus, {"a": 30, "b": 2})
    for _ in range(2):
        before = life()
        ray.kill(open_coordinator(CONFIG), no_restart=False)
        wait_until(partial(is_another_life, before), TIMEOUT_S, "another life")
    wait_for_ranges(bus, {"a": 30, "b": 2})
    ray.get(bus["a"].set_link.remote(loose(10)))
    wait_for_ranges(bus, {"a": 10, "b": 7})
    ray.get(bus["a"].set_link.remote(loose(30)))


def test_one_that_is_gone_for_good_is_made_anew(bus):
    wait_for_ranges(bus, {"a": 30, "b": 2})
    before = life()
    ray.kill(open_coordinator(CONFIG), no_restart=True)
    wait_until(lambda: is_another_life(before), TIMEOUT_S, "a new coordinator")
    ray.get(bus["b"].set_link.remote(tight(1)))
    wait_for_ranges(bus, {"a": 30, "b": 1})
    ray.get(bus["b"].set_link.remote(tight(30)))


def test_replicas_fall_back_while_the_coordinator_hangs(bus):
    """The loose one to an equal share of the bus, the tight one to its own, which is less."""
    wait_for_ranges(bus, {"a": 30, "b": 2})
    process = coordinator_process()
    process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: set(ranges(bus).values()) == {-1}, TIMEOUT_S, "leases running out")
        states = dict(zip(bus, ray.get([each.state.remote() for each in bus.values()]), strict=True))
    finally:
        process.send_signal(signal.SIGCONT)
    assert states["a"].allowed.link_bytes_per_s == BUS_BYTES_PER_S // 2
    assert states["a"].k_range == (1, 20)
    assert states["b"].k_range == (1, 2)
    wait_for_ranges(bus, {"a": 30, "b": 2})


def test_what_a_dead_replica_had_goes_to_the_others(bus, node):
    """As soon as its node says so; until then its share is kept, since it may only be cut off."""
    everyone = {**bus, "c": start("c", loose(20))}
    node.replica_ids = ("a", "b", "c")
    wait_for_ranges(everyone, {"a": 18, "b": 1, "c": 18})
    ray.kill(everyone.pop("c"))
    node.replica_ids = ("a", "b")
    wait_for_ranges(bus, {"a": 30, "b": 2})
