"""What the coordinator answers, case by case; test_protocol.py has what must hold in all of them."""

from __future__ import annotations

import functools
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest

from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig
from cluster.protocol.messages import BusState, LinkDemand, NodeState, RangeUpdate
from cluster.replica.lease import RangeHolder
from selectn_core.errors import ConfigError

CONFIG = CoordinatorConfig(lease_s=10.0, clock_drift=0.01, forget_after_s=100.0)
BUS = 1000
SETTLED_S = CONFIG.lease_bound_s


def demand(k_min: int, k_max: int, step_s: float = 1.0) -> LinkDemand:
    return LinkDemand(k_min=k_min, k_max=k_max, unit_bytes=10, step_s=step_s)


def holder(name: str) -> RangeHolder:
    return RangeHolder(replica_id=name, node_id="n", bus_id="b")


def node_report(coordinator: Coordinator, *replica_ids: str, sequence: int = 1, num_devices: int = 2) -> NodeState:
    bus = BusState(bus_id="b", bytes_per_s=BUS, num_devices=num_devices, replica_ids=replica_ids)
    return NodeState(
        node_id="n",
        sequence=sequence,
        heard_life=coordinator.life,
        buses=(bus,),
    )


def exchange(coordinator: Coordinator, who: RangeHolder, link: LinkDemand, now_s: float) -> RangeUpdate | None:
    report = who.report(link, now_s)
    assert coordinator.on_replica_report(report, now_s) != "old"
    update = coordinator.update_for(report, now_s)
    if update is not None:
        assert who.apply(update, now_s)
    return update


def told(coordinator: Coordinator, who: RangeHolder, link: LinkDemand, now_s: float) -> RangeUpdate:
    """As `exchange`, by a coordinator that knows what to say."""
    update = exchange(coordinator, who, link, now_s)
    assert update is not None
    return update


@pytest.fixture
def coordinator() -> Coordinator:
    """One that has settled and knows a node whose bus two replicas use."""
    coordinator = Coordinator(CONFIG, life=1, now_s=0.0)
    coordinator.on_node_report(node_report(coordinator, "a", "b"), SETTLED_S)
    return coordinator


def test_one_that_grows_waits_until_the_other_has_shrunk(coordinator):
    a, b = holder("a"), holder("b")
    exchange(coordinator, a, demand(0, 100), 11)
    coordinator.on_replica_report(b.report(demand(0, 100), 11), 11)
    exchange(coordinator, a, demand(0, 100), 11)
    exchange(coordinator, a, demand(0, 20), 12)
    assert a.k_range(demand(0, 20), 12) == (0, 20)
    assert told(coordinator, b, demand(0, 100), 12).k_max == 50, "a may not have heard yet that it has less"
    coordinator.on_replica_report(a.report(demand(0, 20), 12.5), 12.5)
    assert told(coordinator, b, demand(0, 100), 12.5).k_max == 80


def test_a_new_coordinator_renews_and_raises_nobody_for_a_lease(coordinator):
    a, newcomer = holder("a"), holder("b")
    exchange(coordinator, a, demand(0, 30), 11)
    held = a.allowed(11).link_bytes_per_s
    second = Coordinator(CONFIG, life=2, now_s=12.0)
    second.on_node_report(node_report(second, "a", "b"), 12.0)
    assert exchange(second, newcomer, demand(0, 30), 12.5) is None
    update = told(second, a, demand(0, 100), 13)
    assert update.allowed.link_bytes_per_s == held
    assert a.has_lease(22.9)
    later_s = 12.0 + SETTLED_S
    exchange(second, a, demand(0, 100), later_s)
    assert told(second, newcomer, demand(0, 30), later_s).k_max == 30


def test_what_the_previous_life_promised_to_one_that_is_not_heard_stays_free(coordinator):
    """b is alive and cut off from the new coordinator: its fallback, an equal share, is not given to a."""
    a = holder("a")
    second = Coordinator(CONFIG, life=2, now_s=20.0)
    second.on_node_report(node_report(second, "a", "b"), 20.0 + SETTLED_S)
    exchange(second, a, demand(0, 100), 20.0 + SETTLED_S)
    assert a.allowed(32).link_bytes_per_s == BUS // 2
    second.on_node_report(node_report(second, "a", sequence=2), 32)
    exchange(second, a, demand(0, 100), 32)
    assert a.allowed(32).link_bytes_per_s == BUS


def test_a_silent_replica_keeps_its_fallback_until_its_node_says_it_is_gone(coordinator):
    a, b = holder("a"), holder("b")
    exchange(coordinator, b, demand(0, 100), 11)
    exchange(coordinator, a, demand(0, 100), 11)
    exchange(coordinator, b, demand(0, 100), 12)
    for now_s in (22.0, 23.0):
        exchange(coordinator, a, demand(0, 100), now_s)
    assert a.allowed(23).link_bytes_per_s == BUS - b.allowed(23).link_bytes_per_s == BUS // 2
    coordinator.on_node_report(node_report(coordinator, "a", sequence=2), 24)
    coordinator.sweep(24)
    exchange(coordinator, a, demand(0, 100), 24)
    assert a.allowed(24).link_bytes_per_s == BUS


def test_one_without_a_node_that_vouches_for_it_is_forgotten_in_the_end(coordinator):
    exchange(coordinator, holder("a"), demand(0, 100), 11)
    coordinator.sweep(11 + CONFIG.forget_after_s - 1)
    assert len(coordinator.status(50).replicas) == 1
    coordinator.sweep(11 + CONFIG.forget_after_s)
    assert coordinator.status(200).replicas == ()
    coordinator.sweep(SETTLED_S + CONFIG.forget_after_s)
    assert coordinator.status(200).num_nodes == 0


def test_minima_that_do_not_fit_share_the_bus_and_say_so(coordinator):
    a, b = holder("a"), holder("b")
    for now_s in (11, 12, 13):
        exchange(coordinator, a, demand(80, 90), now_s)
        update = told(coordinator, b, demand(50, 90), now_s)
    assert update.problem is not None
    assert "over their fair part: a by" in update.problem
    assert a.k_range(demand(80, 90), 13) == (80, 80)
    assert a.allowed(13).link_bytes_per_s == b.allowed(13).link_bytes_per_s == BUS // 2


def test_what_has_been_promised_is_not_given_to_others(coordinator):
    """Promised memory is a higher k_min; an update from before that, which takes it away, is dropped."""
    a, b, wanted = holder("a"), holder("b"), demand(0, 100, step_s=1.0)
    looser = demand(0, 200, step_s=2.0)  # each of its bytes costs half as much: all that is free should be its own
    for now_s in (11, 12):
        exchange(coordinator, a, wanted, now_s)
    assert a.allowed(12).fallback_bytes_per_s == BUS // 2
    coordinator.on_replica_report(b.report(looser, 12), 12)
    before = a.report(wanted, 12)
    coordinator.on_replica_report(before, 12)
    update = coordinator.update_for(before, 12)
    assert update.allowed.link_bytes_per_s < 400
    promised = demand(40, 100)
    assert not a.apply(update, 12, promised)
    for now_s in (13, 14):
        exchange(coordinator, a, promised, now_s)
        exchange(coordinator, b, looser, now_s)
    assert a.k_range(promised, 14) == (40, 40)
    assert b.allowed(14).link_bytes_per_s == 600
    exchange(coordinator, a, wanted, 15)
    assert a.allowed(15).link_bytes_per_s < 400, "the promise has been kept"


def test_a_repeated_report_or_an_older_one_is_left_unanswered(coordinator):
    a = holder("a")
    first, second = a.report(demand(0, 9), 11), a.report(demand(0, 9), 11)
    assert coordinator.on_replica_report(second, 11) == "new"
    assert coordinator.on_replica_report(second, 11) == "old"
    assert coordinator.on_replica_report(first, 11) == "old"


def test_a_coordinator_whose_clock_went_back_takes_a_number_that_replicas_listen_to():
    first = Coordinator(CONFIG, life=50, now_s=0.0)
    first.on_node_report(node_report(first, "a"), 0)
    a = holder("a")
    exchange(first, a, demand(0, 5), SETTLED_S)
    second = Coordinator(CONFIG, life=7, now_s=20.0)
    assert exchange(second, a, demand(0, 5), 20.5) is not None
    assert second.life > 50
    assert second.status(21).is_settling


def test_an_update_is_dropped_late_twice_and_by_another_version(coordinator):
    a = holder("a")
    report = a.report(demand(0, 9), 11)
    coordinator.on_replica_report(report, 11)
    update = coordinator.update_for(report, 11)
    assert not holder("b").apply(update, 12)
    assert not a.apply(update, 21), "its lease is over"
    assert a.apply(update, 20.9)
    assert not a.apply(update, 20.9)
    assert a.k_range(demand(0, 9), 20.9) == (0, 9)
    assert a.tick(21)
    assert not a.tick(22)


@pytest.mark.parametrize("wrong", [{"lease_s": 0.0}, {"clock_drift": -1.0}, {"forget_after_s": 15.0}])
def test_a_configuration_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"coordinator.{next(iter(wrong))}="):
        CoordinatorConfig(**wrong)


def tampered(message: Any, path: str, value: object) -> Any:
    """The message as another process may send it: unpickling asks no class whether it makes sense."""
    message = pickle.loads(pickle.dumps(message))
    *owners, name = path.split(".")
    object.__setattr__(functools.reduce(getattr, owners, message), name, value)
    return message


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1, None, "many", True, 10**400])
@pytest.mark.parametrize(
    "path",
    ["sent_s", "sequence", "version", "allowed.link_bytes_per_s", "link.step_s", "link.unit_bytes", "link.k_max"],
)
def test_a_replicas_report_that_makes_no_sense_stops_nobody(coordinator, path, value):
    a, b = holder("a"), holder("b")
    exchange(coordinator, a, demand(0, 100), 11)
    before = coordinator.status(11)
    report = tampered(b.report(demand(0, 100), 11), path, value)
    is_allowed = path == "sent_s" and value == -1  # any finite time of another's clock
    assert (coordinator.on_replica_report(report, 11) == "old") == (not is_allowed)
    if not is_allowed:
        assert coordinator.status(11) == replace(before, num_refused=1)
        assert coordinator.update_for(report, 11) is None
    assert exchange(coordinator, b, demand(0, 100), 12) is not None
    assert exchange(coordinator, a, demand(0, 100), 12) is not None


@pytest.mark.parametrize("value", [math.inf, math.nan, -1, None, "many"])
@pytest.mark.parametrize("name", ["bytes_per_s", "num_devices"])
def test_a_nodes_report_that_makes_no_sense_changes_nothing(coordinator, name, value, caplog):
    report = node_report(coordinator, "a", "b", sequence=2)
    for _ in range(9):
        coordinator.on_node_report(replace(report, buses=(tampered(report.buses[0], name, value),)), 11)
    assert coordinator.status(11).num_refused == 9
    assert len(caplog.records) == 4  # the 1st, 2nd, 4th and 8th: a log has an end
    assert f"buses.0.{name}={value!r}" in caplog.text
    assert exchange(coordinator, holder("a"), demand(0, 100), 12) is not None


@pytest.mark.parametrize("path", ["lease_s", "sent_s", "allowed.link_bytes_per_s", "k_max", "epoch.life"])
def test_an_update_that_makes_no_sense_is_not_applied(coordinator, path):
    a = holder("a")
    report = a.report(demand(0, 100), 11)
    coordinator.on_replica_report(report, 11)
    update = coordinator.update_for(report, 11)
    assert not a.apply(tampered(update, path, math.inf), 11)
    assert a.apply(update, 11)


def test_of_two_updates_that_cross_only_one_is_applied(coordinator):
    """The second allows less, so the rest goes to b; the first, when it comes at last, must not undo that."""
    a, b = holder("a"), holder("b")
    first = a.report(demand(0, 90), 11)
    coordinator.on_replica_report(first, 11)
    late = coordinator.update_for(first, 11)
    exchange(coordinator, a, demand(0, 10), 11.5)
    exchange(coordinator, b, demand(0, 100), 12)
    exchange(coordinator, a, demand(0, 10), 12.5)
    exchange(coordinator, b, demand(0, 100), 13)
    assert not a.apply(late, 13)
    assert a.allowed(13).link_bytes_per_s + b.allowed(13).link_bytes_per_s <= BUS


def test_what_was_asked_for_before_the_lease_ran_out_does_not_bring_it_back(coordinator):
    """By then the coordinator may have given the difference to the fallback away."""
    a = holder("a")
    exchange(coordinator, a, demand(0, 90), 11)
    report = a.report(demand(0, 90), 20)
    coordinator.on_replica_report(report, 20)
    update = coordinator.update_for(report, 20)
    assert a.tick(21)
    assert not a.apply(update, 21)
    assert a.allowed(21).link_bytes_per_s == BUS // 2


def test_who_has_heard_of_a_new_life_is_deaf_to_the_old_one(coordinator):
    """From its next report on the new life counts on what it says it has."""
    a = holder("a")
    exchange(coordinator, a, demand(0, 10), 11)
    before = a.report(demand(0, 10), 11)
    exchange(coordinator, a, demand(0, 10), 11.5)
    report = a.report(demand(0, 90), 12)
    coordinator.on_replica_report(report, 12)
    from_the_old_life = coordinator.update_for(report, 12)
    assert from_the_old_life is not None
    second = Coordinator(CONFIG, life=2, now_s=12)
    second.on_replica_report(before, 12)
    for_another_version = second.update_for(before, 12)
    assert for_another_version is not None
    assert not a.apply(for_another_version, 12.1), "it is for another version"
    assert a.report(demand(0, 90), 12.2).heard_life == 2
    assert not a.apply(from_the_old_life, 12.3)


def test_one_that_reported_and_has_not_heard_yet_may_have_a_fallback_of_the_old_life(coordinator):
    """Its report said that it has nothing; since then the previous life's last update may have reached it."""
    a, b = holder("a"), holder("b")
    report = a.report(demand(0, 90), 11)
    coordinator.on_replica_report(report, 11)
    late = coordinator.update_for(report, 11)
    second = Coordinator(CONFIG, life=2, now_s=12)
    second.on_node_report(node_report(second, "a", "b"), 12)
    second.on_replica_report(report, 12.1)
    assert a.apply(late, 12.2)
    settled_s = 13 + SETTLED_S
    exchange(second, b, demand(0, 90), settled_s)
    assert a.allowed(settled_s).link_bytes_per_s == BUS // 2
    assert a.allowed(settled_s).link_bytes_per_s + b.allowed(settled_s).link_bytes_per_s <= BUS


def test_a_list_from_before_the_restart_says_nothing_of_who_has_come_since(coordinator):
    b = holder("b")
    old_list = node_report(coordinator, "b")
    second = Coordinator(CONFIG, life=2, now_s=12)
    second.on_node_report(old_list, 12)
    exchange(second, b, demand(0, 90), 12 + SETTLED_S)
    exchange(second, b, demand(0, 90), 13 + SETTLED_S)
    assert b.allowed(13 + SETTLED_S).link_bytes_per_s == BUS // 2, "somebody may be on the other device"
