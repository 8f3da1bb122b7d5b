"""Waiting for another process's lock ends: with the lock, or with whose it is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from selectn_core.errors import LockHeld
from selectn_core.file_lock import SAY_EVERY_S, file_lock, lock_within
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def test_who_waits_in_vain_is_told_for_whom(tmp_path, clock, caplog) -> None:
    path = tmp_path / "lock"
    fd = opened(path)
    with file_lock(path), pytest.raises(LockHeld, match="lock has been held by this process itself for 100 s without"):
        lock_within(fd, path, patience_s=100, clock=clock, sleep=clock.sleep)
    os.close(fd)
    assert clock.now_s == pytest.approx(100, abs=1)
    assert len(caplog.records) == 100 // SAY_EVERY_S


def test_a_holder_that_gets_on_is_waited_for(tmp_path, clock) -> None:
    path = tmp_path / "lock"
    holder, waiter = opened(path), opened(path)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def hold() -> None:
        if clock.now_s < 1000:
            os.utime(path, ns=(0, int(clock.now_s // 50) * 50_000_000_000))
        elif clock.now_s >= 1050:
            fcntl.flock(holder, fcntl.LOCK_UN)

    clock.on_sleep = hold
    lock_within(waiter, path, patience_s=100, clock=clock, sleep=clock.sleep)
    assert 1050 <= clock.now_s < 1060
    os.close(holder)
    os.close(waiter)


def test_it_is_free_after_the_block_and_stays_a_file(tmp_path) -> None:
    for _ in range(2):
        with file_lock(tmp_path / "lock", patience_s=0):
            pass
    assert (tmp_path / "lock").exists()
