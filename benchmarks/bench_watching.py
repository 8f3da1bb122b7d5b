"""What metrics cost an engine: tokens per second with and without them, on a model that costs next to nothing.

The engine is alone, with 64 requests; the replica's own code publishes to a real Ray. Sides take turns, in pairs. A
ratio of tokens per second is as good as the machine is quiet. The CPU time of the thread that publishes, and of the
calls on the engine's thread, is not: it is measured beside, as a share of the time in which the engine ran.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import free_model
from benchmarks.bench_serving_path import FREE, FREE_TOKENS, Setting, engine_alone
from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.noise import NoiseWatch
from cluster.metrics.meters import Meters
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.config import AppArgs
from deployments.replica.metrics import ReplicaMetrics
from selectn_core.engine.engine import Engine
from selectn_core.requests.handle import RequestHandle
from selectn_core.start import load_unsteered_engine

NUM_STREAMS = 64
NUM_PAIRS, NUM_PAIRS_QUICK, SECONDS = 12, 4, 4.0


class Timed(ReplicaMetrics):
    """Notes the CPU seconds that publishing takes, and those of the calls on the engine's thread."""

    published_s = 0.0

    def publish(self) -> None:
        began_s = time.thread_time()
        super().publish()
        self.published_s += time.thread_time() - began_s


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_pairs = NUM_PAIRS_QUICK if arguments.quick else NUM_PAIRS
    with tempfile.TemporaryDirectory() as folder, NoiseWatch() as watch:
        args = {
            "model": {"source": str(free_model.save(Path(folder) / "free")), "dtype": "float32"},
            "device": {"kind": "emulated"},
            "offload": {"num_offloaded": 0},
            "batch": {"max_requests": NUM_STREAMS, "kv_tokens": NUM_STREAMS * 400},
        }
        with local_cluster(ClusterConfig()), load_unsteered_engine(AppArgs.model_validate(args).engine) as engine:
            meters = Meters("replica", {"model_name": FREE})
            samples = [_pair(engine, meters, is_watched_first=bool(number % 2)) for number in range(num_pairs)]
    return _report(arguments, samples, watch.report)


def _pair(engine: Engine, meters: Meters, *, is_watched_first: bool) -> dict[str, Any]:
    setting = Setting(model=FREE, num_streams=NUM_STREAMS, num_tokens=FREE_TOKENS, seconds=SECONDS, warm_up_s=0.5)
    without = None if is_watched_first else engine_alone(engine, setting)
    with _watched(engine, meters) as metrics:
        began_s, published_s = time.perf_counter(), metrics.published_s
        watched = engine_alone(engine, setting)
        publishing = (metrics.published_s - published_s) / (time.perf_counter() - began_s)
    without = without or engine_alone(engine, setting)
    calls = watched["tokens_per_s"] * _seconds_of_a_call(metrics)
    sample = {
        "is_watched_first": is_watched_first,
        "without_tokens_per_s": without["tokens_per_s"],
        "with_tokens_per_s": watched["tokens_per_s"],
        "publishing_share": publishing,
        "calls_share": calls,
    }
    print({name: round(value, 4) for name, value in sample.items()}, flush=True)
    return sample


@contextlib.contextmanager
def _watched(engine: Engine, meters: Meters) -> Iterator[Timed]:
    def state() -> dict[str, Any]:
        return {**engine.snapshot(is_brief=True), "at_door": 0, "headroom_tokens": 0, "cluster": None}

    metrics = Timed(meters, state, engine.steps.records)
    engine.observe(metrics.numbers)
    try:
        yield metrics
    finally:
        engine.lifecycle.observer = None
        metrics.close()


def _seconds_of_a_call(metrics: Timed) -> float:
    handle, times = RequestHandle("r", 1, lambda ticket: None), 20_000
    began_s = time.thread_time()
    for _ in range(times):
        metrics.numbers.tokens(handle, 1, 0.01)
    return (time.thread_time() - began_s) / times


def _report(arguments: Any, samples: list[dict[str, Any]], noise: Any) -> int:
    ratios = sorted(each["with_tokens_per_s"] / each["without_tokens_per_s"] for each in samples)
    shares = [each["publishing_share"] + each["calls_share"] for each in samples]
    rows = [
        ("tokens/s with metrics over without", f"{median(ratios):.4f}", f"{ratios[0]:.3f}..{ratios[-1]:.3f}"),
        ("CPU share of metrics", f"{median(shares):.2%}", f"{min(shares):.2%}..{max(shares):.2%}"),
    ]
    print(table(("figure", "median", "range"), rows))
    checks = [
        Check(name="CPU time of metrics over the engine's time", value=median(shares), target="<= 0.01"),
        Check(name="tokens/s with metrics over without", value=median(ratios), target=">= 0.99", is_timed=True),
    ]
    return finish(arguments, "measured: the engine alone, a model that costs next to nothing", samples, checks, noise)


if __name__ == "__main__":
    raise SystemExit(main())
