"""Nothing that is started on a single machine can be reached from another."""

from __future__ import annotations

import psutil

from tests.support.processes import is_loopback, listening_addresses


def test_every_listener_is_on_loopback(http, cluster_processes):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listeners = listening_addresses(processes)
    assert any(name.startswith("ray::Serve") for name in listeners.values())
    assert {address for address in listeners if not is_loopback(address)} == set()
