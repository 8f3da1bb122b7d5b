"""Nothing that is started on a single machine can be reached from another."""

from __future__ import annotations

import psutil
from ray.serve._private import replica as serve_replica

from deployments import private_server
from tests.integration.processes import is_loopback, listening_addresses


def test_every_listener_is_on_loopback(http, cluster_processes):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listeners = listening_addresses(processes)
    assert any(name.startswith("ray::Serve") for name in listeners.values())
    assert {address for address in listeners if not is_loopback(address)} == set()


def test_the_private_name_of_serve_is_where_it_was():
    assert callable(getattr(serve_replica, private_server.FUNCTION_NAME))
