"""A call to Ray ends when Ray does: what Ray itself would wait for is not waited for."""

from __future__ import annotations

import contextlib
import subprocess
import threading

import psutil
import pytest
from ray.exceptions import RayError

from deployments import ray_calls
from deployments.commands import serving
from deployments.commands.local_cluster import Cluster
from deployments.ray_calls import RayIsGone, answer, never


def test_what_is_called_answers_or_raises_as_it_would_alone():
    assert answer(lambda: 3, is_gone=lambda: False) == 3
    with pytest.raises(KeyError, match="it"):
        answer(lambda: dict[str, int]()["it"])


def test_a_call_that_would_never_return_ends_with_the_clusters_own_process():
    """As where `timeout` signals the process group: a child that has ended is a zombie until its parent looks."""
    blocked = threading.Event()
    with subprocess.Popen(["sleep", "600"]) as process:
        cluster = Cluster(is_own=True, dashboard_url=None, control=(psutil.Process(process.pid),))
        assert not cluster.is_gone()

        def call() -> None:
            process.terminate()
            blocked.wait()

        with pytest.raises(RayIsGone):
            answer(call, is_gone=cluster.is_gone)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        called: list[int] = []
        with pytest.raises(RayIsGone):
            answer(lambda: called.append(1), is_gone=cluster.is_gone)
        assert not called, "nothing is asked of what is gone"
        blocked.set()
    assert cluster.is_gone()


def test_a_call_has_a_deadline_too():
    blocked = threading.Event()
    with pytest.raises(RayIsGone):
        answer(blocked.wait, at_most_s=0.01)
    blocked.set()


def test_an_error_of_a_cluster_that_is_gone_is_that_it_is_gone():
    gone = threading.Event()

    def call() -> None:
        gone.set()
        raise ConnectionError("lost")

    with pytest.raises(RayIsGone):
        answer(call, is_gone=gone.is_set)


def test_so_is_one_of_a_cluster_whose_parts_are_still_ending():
    """The store of Serve's controller fails before the process that keeps it is found to have ended."""
    asked = 0

    def is_gone() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    with pytest.raises(RayIsGone):
        answer(lambda: dict[str, int]()["it"], is_gone=is_gone)


@pytest.mark.parametrize("is_own", [True, False])
def test_what_a_cluster_fails_to_delete_is_an_error_only_if_it_goes_on(monkeypatch, is_own):
    """Serve's controller fails while Ray's parts end, which may take longer than is waited for."""
    monkeypatch.setattr(ray_calls, "ENDING_S", 0.0)

    def fails(name: str) -> None:
        raise RayError(f"no store for {name}")

    monkeypatch.setattr(serving, "begin_to_delete", fails)
    is_gone = (lambda: False) if is_own else never
    with contextlib.nullcontext() if is_own else pytest.raises(RayError, match="no store for llm"):
        serving._delete(["llm"], 1.0, is_gone)
