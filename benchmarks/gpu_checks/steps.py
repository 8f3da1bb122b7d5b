"""A real model's steps: which kernels attend, what a length costs the first time, and memory that no account has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_checks.finding import Finding, failed, measured, noted
from selectn_core.engine.engine import Engine

MOST_FIRST_OVER_WARM = 2.0
NUM_WARM = 5
# Lengths that no bucket has, so that a kernel which is planned or compiled for each shows.
LENGTHS = (117, 233, 349, 467, 583, 701, 811, 929)
BATCH = 4
# What attends, in the names that libraries give to their kernels.
_ATTENTION = ("attention", "attn", "flash", "fmha", "sdpa", "sdp_", "softmax", "embedding_bag", "sampled_addmm")
_MOST_NAMES = 6


@dataclass(frozen=True, kw_only=True)
class MemoryState:
    """Bytes of the GPU at one moment: what the driver has free, what torch holds of the rest, what accounts have."""

    driver_free: int
    torch_reserved: int
    in_accounts: int


# -- kernels ----------------------------------------------------------------------------------------------------------


def check_kernels(engine: Engine, on: DeviceType) -> list[Finding]:
    """Of a decode step and of one with a prompt in it: what attends, by name, and that it is not cuDNN."""
    check, findings = "attention kernels", []
    steps = {"decode": [(1, LENGTHS[0])] * BATCH, "prefill": [(LENGTHS[0], 0)]}
    for name, requests in steps.items():
        engine.batching.run_step(requests)
        with profiled() as run:
            engine.batching.run_step(requests)
            engine.device.synchronize()
        names = attention_names({event.key for event in run.key_averages() if event.device_type == on})
        findings += kernel_findings(check, name, names)
    return findings


@contextmanager
def profiled() -> Iterator[profile]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as run:
        yield run


def attention_names(kernels: set[str]) -> list[str]:
    return sorted(kernel for kernel in kernels if any(part in kernel.lower() for part in _ATTENTION))


def kernel_findings(check: str, step: str, names: Sequence[str]) -> list[Finding]:
    if not names:
        return [failed(check, step, "no kernel with the name of an attention has run")]
    listed = ", ".join(name[:60] for name in names[:_MOST_NAMES])
    is_planned = any("cudnn" in name.lower() for name in names)
    return [Finding(check=check, name=step, figure=listed, holds=not is_planned)]


# -- lengths ----------------------------------------------------------------------------------------------------------


def check_first_seen(
    run: Callable[[int], None],
    synchronize: Callable[[], None],
    lengths: Sequence[int] = LENGTHS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Finding]:
    """`run` makes a decode step at a length. The first length warms up what has nothing to do with lengths."""
    check = "first-seen lengths"

    def timed_s(length: int) -> float:
        synchronize()
        began_s = clock()
        run(length)
        synchronize()
        return clock() - began_s

    for _ in range(NUM_WARM):
        timed_s(lengths[0])
    findings, ratios = [], []
    for length in lengths[1:]:
        first_s = timed_s(length)
        warm_s = median(timed_s(length) for _ in range(NUM_WARM))
        ratios.append(first_s / warm_s)
        figure = f"{1e3 * first_s:.2f} ms, warm {1e3 * warm_s:.2f} ms"
        findings.append(noted(check, f"{length} tokens", figure, ratios[-1]))
    return [*findings, measured(check, "first over warm, median", median(ratios), f"<= {MOST_FIRST_OVER_WARM}")]


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_findings(
    before: MemoryState, loaded: MemoryState, stepped: MemoryState, closed: MemoryState, kept_back_bytes: int
) -> list[Finding]:
    """What the driver has given out against the accounts: before an engine, with one, after steps, and after it."""
    check, mib = "memory", 1 << 20

    def beside(state: MemoryState) -> float:
        return (before.driver_free - state.driver_free - (state.in_accounts - before.in_accounts)) / mib

    most_mib = kept_back_bytes / mib
    return [
        noted(check, "in the accounts of a loaded engine", f"{loaded.in_accounts / mib:,.0f} MiB"),
        noted(check, "held by torch then", f"{loaded.torch_reserved / mib:,.0f} MiB"),
        measured(check, "in no account, loaded", beside(loaded), f"<= {most_mib:g}", unit=" MiB"),
        measured(check, "in no account, after steps", beside(stepped), f"<= {most_mib:g}", unit=" MiB"),
        measured(check, "not back after closing", beside(closed), f"<= {most_mib:g}", unit=" MiB"),
        measured(check, "in the accounts after closing", closed.in_accounts / mib, "<= 0", unit=" MiB"),
    ]
