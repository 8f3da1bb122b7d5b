"""What the host link carries from pinned memory, alone and beside compute, and whether the host waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from benchmarks.gpu_checks.finding import Finding, measured, noted
from selectn_core.device import Device

CHECK = "link"
NUM_BYTES, NUM_COPIES, NUM_ROUNDS = 256 << 20, 8, 3
LEAST_BESIDE_COMPUTE = 0.8
MOST_ISSUE_SHARE = 0.1


def check_bandwidth(
    device: Device,
    compute: Callable[[], None],
    *,
    num_bytes: int = NUM_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Finding]:
    """`compute` issues work of at least the time that the copies take."""
    source, target = device.allocate_host(num_bytes), device.allocate(num_bytes, "the target of copies")
    alone, beside, shares = [], [], []

    def copied(work: Callable[[], None] | None) -> float:
        """Bytes per second of a few copies, issued after `work`; notes what issuing them took of their time."""
        device.synchronize()
        before = device.link_usage()
        if work is not None:
            work()
        began_s = clock()
        for _ in range(NUM_COPIES):
            device.copy_async(source, target)
        issue_s = clock() - began_s
        device.synchronize()
        usage = device.link_usage().since(before)
        shares.append(issue_s / usage.busy_s)
        return usage.bytes_per_s

    copied(None)  # the first copies of a process are slow
    shares.clear()
    for _ in range(NUM_ROUNDS):
        alone.append(copied(None))
        beside.append(copied(compute))
    device.free(target)
    ratio = median(b / a for a, b in zip(alone, beside, strict=True))
    return [
        noted(CHECK, "pinned, alone", _gb_per_s(median(alone)), median(alone) / 1e9),
        noted(CHECK, "pinned, beside compute", _gb_per_s(median(beside)), median(beside) / 1e9),
        measured(CHECK, "beside compute over alone", ratio, f">= {LEAST_BESIDE_COMPUTE}"),
        # Of memory that is not locked after all, each copy is over when the call returns.
        measured(CHECK, "issuing copies, of the time they take", median(shares), f"<= {MOST_ISSUE_SHARE}"),
    ]


def _gb_per_s(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"
