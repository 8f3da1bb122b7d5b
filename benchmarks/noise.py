"""How noisy the machine was while a benchmark ran: what others took of its CPUs, and how even its pace was.

A room of its own because every script that compares times asks it, and none of them should decide what noise is.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from statistics import median, quantiles
from types import TracebackType

import psutil

# Above either, two runs of one program on this machine differ by more than what the checks distinguish.
MOST_TAKEN_SHARE = 0.1
MOST_PACE_SPREAD = 1.3
_NUM_PACES, _PACE_LOOPS = 50, 100_000


@dataclass(frozen=True, kw_only=True)
class NoiseReport:
    """`taken_share`: of all CPU time, what neither this process nor its children had (other processes, and steal).

    `pace_spread`: the ninth decile over the median of the time of one fixed piece of work, repeated before and after.
    """

    taken_share: float
    pace_spread: float

    @property
    def is_noisy(self) -> bool:
        return self.taken_share > MOST_TAKEN_SHARE or self.pace_spread > MOST_PACE_SPREAD

    def __str__(self) -> str:
        return (
            f"others took {self.taken_share:.0%} of the CPUs (limit {MOST_TAKEN_SHARE:.0%}), fixed work took up to "
            f"{self.pace_spread:.2f} times its median (limit {MOST_PACE_SPREAD:g})"
        )


class NoiseWatch:
    """Watches while the `with` block lasts; children that it has waited for are its own, and no noise."""

    def __enter__(self) -> NoiseWatch:
        self._paces_s = paces_s()
        self._started_s, self._busy_s, self._own_s = time.perf_counter(), busy_s(), _own_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        available_s = (time.perf_counter() - self._started_s) * (os.cpu_count() or 1)
        taken_s = (busy_s() - self._busy_s) - (_own_s() - self._own_s)
        self.report = NoiseReport(
            taken_share=max(0.0, taken_s / available_s),
            pace_spread=pace_spread([*self._paces_s, *paces_s()]),
        )


def busy_s() -> float:
    """CPU time that anybody had, a hypervisor's other guests included, since the machine started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def paces_s() -> list[float]:
    """How long one fixed piece of work takes, again and again."""
    return [_pace_s() for _ in range(_NUM_PACES)]


def pace_spread(paces_s: list[float]) -> float:
    """The ninth decile of these times over their median."""
    return quantiles(paces_s, n=10)[-1] / median(paces_s)


def _pace_s() -> float:
    started_s = time.perf_counter()
    for _ in range(_PACE_LOOPS):
        pass
    return time.perf_counter() - started_s
