"""What the doctor says of files in shared memory: real files and real locks, in a directory of the test."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from deployments.commands.doctor import leftovers
from deployments.commands.doctor.findings import Severity
from selectn_core.device.bus import Bus
from selectn_core.device.host_memory import SHARED_MEMORY
from selectn_core.weights.store_files import store_name
from tests.support.odd_machine import OddMachine, only

OK, NOTE, WARNING, ERROR = Severity


@pytest.fixture
def odd(tmp_path) -> OddMachine:
    return OddMachine(tmp_path)


def store(odd: OddMachine, fingerprint: str, suffix: str = "") -> Path:
    path = odd.write(f"shm/{store_name(fingerprint, suffix)}", "weights")
    path.chmod(0o600)
    return path


def test_a_store_that_no_process_holds(odd) -> None:
    path = store(odd, "abc")
    before = sorted(odd.root.rglob("*"))
    finding = only(leftovers.check_stores(odd.subject()))
    assert finding.severity == WARNING
    assert str(path) in finding.found
    assert sorted(odd.root.rglob("*")) == before


def test_a_store_in_use_is_not_left_behind(odd) -> None:
    with store(odd, "abc").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        assert only(leftovers.check_stores(odd.subject())).severity == OK


def test_a_store_that_is_being_built_is_not_left_behind(odd) -> None:
    building = store(odd, "abc", ".building")
    lock = store(odd, "abc", ".lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert only(leftovers.check_stores(odd.subject())).severity == OK
    assert str(building) in only(leftovers.check_stores(odd.subject())).found
    assert building.exists()


def test_stores_in_other_places_are_found_too(odd) -> None:
    elsewhere = odd.root / "elsewhere"
    elsewhere.mkdir()
    store(odd, "abc").rename(elsewhere / store_name("abc"))
    subject = odd.subject({"host": {"directory": str(elsewhere)}})
    assert only(leftovers.check_stores(subject)).severity == WARNING
    assert only(leftovers.check_stores(odd.subject())).severity == OK


def test_files_of_others_are_left_alone(odd) -> None:
    odd.write(f"shm/selectn-store-{os.geteuid() + 1}-abc", "")
    odd.write("shm/something", "")
    assert only(leftovers.check_stores(odd.subject())).severity == OK


@pytest.fixture
def bus(odd) -> Path:
    """The file of an emulated bus of 2 GB/s that nothing has open."""
    name = f"doctor-{os.getpid()}"
    made = Bus(name, 2e9)
    try:
        return Path(shutil.copy(Bus.path(name), Bus.path("lab", odd.root / "shm")))
    finally:
        made.close()
        Bus.unlink(name)


@pytest.mark.parametrize(
    ("device", "severity"),
    [
        ({}, NOTE),
        ({"bus": "lab", "link_gb_per_s": 2}, NOTE),
        ({"bus": "lab", "link_gb_per_s": 4}, WARNING),
        ({"bus": "other", "link_gb_per_s": 4}, NOTE),
    ],
)
def test_a_bus_that_no_process_has_open(odd, bus, device, severity) -> None:
    finding = only(leftovers.check_buses(odd.subject({"device": device})))
    assert finding.severity == severity
    assert str(bus) in finding.found
    assert bus.exists()


def test_a_bus_in_use(odd) -> None:
    name = f"doctor-{os.getpid()}"
    used = Bus(name, 3e9)
    try:
        subject = odd.subject(shared_memory=SHARED_MEMORY, proc=Path("/proc"))
        findings = [each for each in leftovers.check_buses(subject) if name in each.found]
        assert only(findings).severity == OK
        assert "3 GB/s" in findings[0].found
    finally:
        used.close()
        Bus.unlink(name)
    assert not any(name in each.found for each in leftovers.check_buses(subject))


def test_no_bus(odd) -> None:
    assert only(leftovers.check_buses(odd.subject())).severity == OK
