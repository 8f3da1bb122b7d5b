"""Which process is which, whatever is done to the machine's clock: of real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from cluster.node.agent import is_alive
from cluster.node.host_claims import HostClaims
from cluster.node.processes import is_running, start_ticks
from cluster.protocol.node_reports import HostClaim

# Its name has what separates the fields of /proc/<pid>/stat.
CHILD = "open('/proc/self/comm', 'w').write(') Z 1 ('); print('here', flush=True); input()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def claim_of(pid: int, name: str = "a") -> HostClaim:
    return HostClaim(replica_id=name, bus_id=None, pid=pid, process_start_ticks=start_ticks(pid), own_bytes=10)


def test_a_process_is_there_until_it_has_ended_waited_for_or_not(child):
    ticks = start_ticks(child.pid)
    assert is_running(child.pid, ticks)
    assert not is_running(child.pid, ticks + 1), "another process of that number"
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.005)
    assert not is_running(child.pid, ticks)
    child.wait()
    assert not is_running(child.pid, ticks)


@pytest.mark.parametrize("step_s", [5.0, -3600.0])
def test_a_clock_that_is_set_ends_no_claim_and_keeps_none(child, monkeypatch, step_s):
    """After the step the kernel gives another boot time, and every creation time in seconds since 1970 has moved."""
    claims = HostClaims(100, is_alive=is_alive, now_s=-10.0, lease_s=3.0)
    assert claims.claim(claim_of(child.pid), 0.0).refusal is None
    unix_s, created_s = time.time, psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: unix_s() + step_s)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created_s(process) + step_s)
    assert claims.sweep(1.0) == ()
    assert claims.claim(claim_of(child.pid), 1.5).held_bytes == 10
    assert claims.report(2.0).reserved_bytes == 10
    child.kill()
    child.wait()
    assert claims.sweep(2.5) == ("a",)
    assert claims.report(2.5).reserved_bytes == 0
    claims.check_integrity()
