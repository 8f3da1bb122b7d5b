"""CPU seconds of groups of processes over a time, and what the rest of the machine took meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import psutil

from benchmarks.noise import busy_s

Groups = Mapping[str, Sequence[int]]  # process ids by what the processes are


@dataclass(frozen=True, kw_only=True)
class Used:
    """CPU seconds between two instants, by group; `busiest_s` those of a group's busiest thread.

    `taken_share`: of all CPU time, what processes had that are in no group.
    """

    seconds: float
    cpu_s: dict[str, float]
    busiest_s: dict[str, float]
    taken_share: float


class CpuUse:
    """Watches groups of processes while the `with` block lasts. The processes must outlive it."""

    def __init__(self, groups: Groups) -> None:
        self._groups = {name: [psutil.Process(pid) for pid in pids] for name, pids in groups.items()}

    def __enter__(self) -> CpuUse:
        self._threads_s, self._cpu_s = self._read_threads_s(), self._read_cpu_s()
        self._began_s, self._busy_s = time.perf_counter(), busy_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds, busy = time.perf_counter() - self._began_s, busy_s() - self._busy_s
        cpu_s = {name: after - self._cpu_s[name] for name, after in self._read_cpu_s().items()}
        threads_s = self._read_threads_s()
        self.used = Used(
            seconds=seconds,
            cpu_s=cpu_s,
            busiest_s={
                name: max((after - self._threads_s[name].get(thread, 0.0) for thread, after in of.items()), default=0.0)
                for name, of in threads_s.items()
            },
            taken_share=max(0.0, (busy - sum(cpu_s.values())) / (seconds * (os.cpu_count() or 1))),
        )

    def _read_cpu_s(self) -> dict[str, float]:
        return {name: sum(_cpu_s(each.cpu_times()) for each in of) for name, of in self._groups.items()}

    def _read_threads_s(self) -> dict[str, dict[int, float]]:
        return {
            name: {thread.id: thread.user_time + thread.system_time for each in of for thread in each.threads()}
            for name, of in self._groups.items()
        }


def _cpu_s(times: object) -> float:
    return times.user + times.system  # type: ignore[attr-defined]
