"""A process beside the test, which says things and may be killed anywhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

# A server that has torch and transformers loaded and forks: a new child takes milliseconds, and is free of this
# process's threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.store_users", "tests.support.engine_users"])


class Child:
    """Runs `target(pipe, *arguments)`, which sends what it `says`, and "closed" as its last word."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def says(self, timeout_s: float = 120) -> str:
        assert self._pipe.poll(timeout_s), "the process says nothing"
        return str(self._pipe.recv())

    def tell(self, command: str) -> None:
        self._pipe.send(command)

    def close(self) -> None:
        self.tell("close")
        assert self.says() == "closed"
        self.process.join()

    def kill(self) -> None:
        """kill -9, and waits until the kernel has dropped what it held."""
        self.process.kill()
        self.process.join()
