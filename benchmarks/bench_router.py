"""Routing by headroom against Ray Serve's power of two choices and round robin, on requests of mixed lengths.

Two replicas of a tiny model, every layer offloaded through a slow link, so that a step takes the same time whatever is
in it, as it does where reading weights dominates. Their KV caches are what is scarce: most requests are short, some
are long and hold their share for a long time. All sides get the same requests at the same times, faster than they
can be served; as many may be running and waiting on each side, in each replica or in all together. All have the same
objective, a first token within 4 s.

- headroom: this project's admission, router and door, in the benchmark's own process as they are in an ingress. What
  would miss the objective by waiting is refused;
- headroom, patient: the same with `refuse_late: false`, so that nobody is refused for that;
- power of two choices: Serve's own router, by queue length; what does not fit waits in the engines;
- round robin: in turn.

What the time to the first token does not show: a request that was let in too early is preempted, and its client waits
in the middle of the answer instead of before it. The longest gap in an answer is measured for that, and the time until
it is complete.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from benchmarks.common import Check, finish, parse_arguments, table
from cluster.node.telemetry import TelemetryConfig
from cluster.services import CoordinationConfig
from deployments.api.errors import ApiError
from deployments.app import ROUTER
from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.messages import Accepted, Delta, Finished, GenerateRequest, Refused, Sampling
from deployments.replica.door import Visit
from deployments.replica.replica import SelectNReplica
from deployments.routing.admission import Admission, AdmissionConfig
from deployments.routing.replica_client import Generation, ReplicaClient
from deployments.routing.shared_board import board_of
from deployments.routing.sizing import PromptSizes
from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, ModelConfig, OffloadConfig, SloConfig
from tests.support.tiny_checkpoint import NUM_LAYERS, save_tiny_llama

NUM_REPLICAS = 2
# A layer of about 0.15 MB every 8 ms: steps of about 30 ms.
LINK_GB_PER_S = 0.02
MAX_REQUESTS, MAX_WAITING = 8, 6
SHORT, LONG, LONG_SHARE = (16, 16), (64, 160), 0.2  # prompt and output tokens
TTFT_S = 4.0
SIDES = ("headroom", "headroom, patient", "power of two", "round robin")
OURS, OTHERS = SIDES[:2], SIDES[2:]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests a second for `duration_s`, in `num_rounds` rounds of all sides."""

    requests_per_s: float
    duration_s: float
    num_rounds: int


QUICK = Load(requests_per_s=8.5, duration_s=20, num_rounds=1)
FULL = Load(requests_per_s=8.5, duration_s=40, num_rounds=3)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request, and when it comes."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request; without tokens it was refused, which took `refused_s`.

    `gap_s`: the longest time between two pieces of text. `total_s`: until the answer was complete.
    """

    is_long: bool
    ttft_s: float | None = None
    gap_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0
    refused_s: float = 0.0


class CountingReplica(SelectNReplica):
    """Reports its preemptions as well."""

    async def record_routing_stats(self) -> dict[str, Any]:
        return {**await super().record_routing_stats(), "preemptions": self._engine.snapshot()["preemptions"]}


class OpenReplica(CountingReplica):
    """Without a door: the engine's own queue is all there is."""

    @asynccontextmanager
    async def _let_in(self, *_: Any) -> AsyncIterator[Visit]:
        yield Visit(origin="", prompt_tokens=0, total_tokens=0, decide=lambda _: None)


class RoundRobin(RequestRouter):
    """One replica after the other."""

    def initialize_state(self, **_: Any) -> None:
        self._next = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        self._next += 1
        ordered = sorted(candidate_replicas, key=lambda each: each.replica_id.unique_id)
        return [[ordered[self._next % len(ordered)]]]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    load = QUICK if arguments.quick else FULL
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, local_cluster(ClusterConfig(address="local", num_cpus=2)):
        source = str(save_tiny_llama(Path(directory))) if arguments.model == "embedded" else arguments.model
        for round_number in range(load.num_rounds):
            arrivals = list(_arrivals(load, seed=round_number))
            for side in SIDES:
                print(f"round {round_number + 1} of {load.num_rounds}: {side}, {len(arrivals)} requests", flush=True)
                samples.append({"round": round_number, "side": side, **_measure(side, source, arrivals)})
        serve.shutdown()
    rows = {side: _median_row([sample for sample in samples if sample["side"] == side]) for side in SIDES}
    _print(rows)
    return finish(arguments, "emulated", samples, _checks(rows))


def _arrivals(load: Load, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals, the same for every side."""
    rng = random.Random(seed)
    at_s = rng.expovariate(load.requests_per_s)
    while at_s < load.duration_s:
        num_prompt, num_output = LONG if rng.random() < LONG_SHARE else SHORT
        yield Arrival(at_s=at_s, prompt=tuple(rng.randrange(10, 256) for _ in range(num_prompt)), max_tokens=num_output)
        at_s += rng.expovariate(load.requests_per_s)


def _measure(side: str, source: str, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    with _serving(side, source) as handle:
        ask = _headroom_client(handle, refuse_late=side == OURS[0]) if side in OURS else partial(_ask_directly, handle)
        began_s = time.perf_counter()
        outcomes = asyncio.run(_offer(arrivals, ask))
        seconds = time.perf_counter() - began_s
        preemptions = sum(stats["preemptions"] for stats in _replica_stats())
    served = [outcome for outcome in outcomes if outcome.ttft_s is not None]
    refused = [outcome for outcome in outcomes if outcome.ttft_s is None]
    ttfts_s = {is_long: _ttfts_s(served, is_long) for is_long in (False, True)}
    all_s = sorted(ttfts_s[False] + ttfts_s[True])
    return {
        "offered": len(outcomes),
        "refused": len(refused),
        "refused_long": sum(outcome.is_long for outcome in refused),
        "refused_p95_s": _percentile([outcome.refused_s for outcome in refused], 95),
        "preemptions": preemptions,
        "tokens_per_s": sum(outcome.num_tokens for outcome in served) / seconds,
        "objective_met": sum(ttft_s <= TTFT_S for ttft_s in all_s) / len(outcomes),
        "ttft_mean_s": mean(all_s),
        "ttft_p50_s": _percentile(all_s, 50),
        "ttft_p99_s": _percentile(all_s, 99),
        "ttft_p99_short_s": _percentile(ttfts_s[False], 99),
        "ttft_p99_long_s": _percentile(ttfts_s[True], 99),
        "gap_p99_s": _percentile([outcome.gap_s for outcome in served], 99),
        "total_p99_s": _percentile([outcome.total_s for outcome in served], 99),
        "seconds": seconds,
        "ttfts_short_s": ttfts_s[False],
        "ttfts_long_s": ttfts_s[True],
    }


def _ttfts_s(served: Sequence[Outcome], is_long: bool) -> list[float]:
    return sorted(round(each.ttft_s, 4) for each in served if each.ttft_s is not None and each.is_long == is_long)


def _percentile(values: Sequence[float], percent: int) -> float:
    """0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


@contextmanager
def _serving(side: str, source: str) -> Iterator[DeploymentHandle]:
    config = EngineConfig(
        model=ModelConfig(source=source, dtype="float32"),
        device=DeviceConfig(kind="emulated", link_gb_per_s=LINK_GB_PER_S, compute_threads=1),
        batch=BatchConfig(max_requests=MAX_REQUESTS, max_waiting=MAX_WAITING, kv_tokens=256, prefix_sharing=False),
        offload=OffloadConfig(num_offloaded=NUM_LAYERS),
        slo=SloConfig(ttft_ms=TTFT_S * 1e3, tpot_ms=10_000),
    )
    routers: dict[str, dict[str, Any]] = {
        **{each: {"request_router_class": ROUTER} for each in OURS},
        "power of two": {},
        "round robin": {"request_router_class": RoundRobin},
    }
    replica = serve.deployment(
        CountingReplica if side in OURS else OpenReplica,
        name="Replica",
        num_replicas=NUM_REPLICAS,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=1,
        request_router_config=RequestRouterConfig(request_routing_stats_period_s=0.5, **routers[side]),
    )
    alone = CoordinationConfig(coordinator=False)  # the plan is fixed by hand: there is nothing to share
    handle = serve.run(replica.bind(config, 256, alone, TelemetryConfig()), name="bench", route_prefix=None)
    try:
        for stats in _replica_stats():
            assert stats["preemptions"] == 0
        time.sleep(2)  # the first reports have reached the router
        yield handle
    finally:
        serve.delete("bench")


def _replica_stats() -> list[dict[str, Any]]:
    names = [each for each in ray.util.list_named_actors(all_namespaces=True) if "bench#Replica#" in each["name"]]
    actors = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in names]
    return ray.get([actor.record_routing_stats.remote() for actor in actors])


async def _offer(arrivals: Sequence[Arrival], ask: Callable[[GenerateRequest], Awaitable[Outcome]]) -> list[Outcome]:
    began_s = time.perf_counter()

    async def one(number: int, arrival: Arrival) -> Outcome:
        await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
        sampling = Sampling(max_tokens=arrival.max_tokens, temperature=0.0, ignore_eos=True)
        return await ask(GenerateRequest(request_id=f"r{number}", prompt=arrival.prompt, sampling=sampling))

    return list(await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(arrivals))))


def _headroom_client(handle: DeploymentHandle, *, refuse_late: bool) -> Callable[[GenerateRequest], Awaitable[Outcome]]:
    """As an ingress does it. What runs and waits is bounded by as much as the other sides' engines hold together."""
    most, in_flight = NUM_REPLICAS * (MAX_REQUESTS + MAX_WAITING), 0
    config = AdmissionConfig(max_queued_requests=most, timeout_s=120.0, refuse_late=refuse_late)
    admission = Admission(board_of("bench"), config)
    client = ReplicaClient(handle, admission, PromptSizes(256), ttft_s=TTFT_S, timeout_s=120.0)

    async def ask(request: GenerateRequest) -> Outcome:
        nonlocal in_flight
        asked_s = time.perf_counter()
        is_long = request.sampling.max_tokens == LONG[1]

        async def read(generation: Generation) -> Outcome:
            return await _follow(generation.messages, asked_s, is_long)

        if in_flight >= most:
            return Outcome(is_long=is_long)
        in_flight += 1
        try:
            return await client.generate(request, read, key="bench", priority="normal")
        except ApiError as error:
            if error.status != 429:
                raise
            return Outcome(is_long=is_long, refused_s=time.perf_counter() - asked_s)
        finally:
            in_flight -= 1

    return ask


async def _ask_directly(handle: DeploymentHandle, request: GenerateRequest) -> Outcome:
    asked_s, is_long = time.perf_counter(), request.sampling.max_tokens == LONG[1]
    stream = handle.options(stream=True).generate.remote(request)
    first = await anext(stream)
    if isinstance(first, Refused):
        assert first.kind == "overloaded", first
        return Outcome(is_long=is_long, refused_s=time.perf_counter() - asked_s)
    assert isinstance(first, Accepted)
    return await _follow(stream, asked_s, is_long)


async def _follow(messages: AsyncIterator[Delta | Finished], asked_s: float, is_long: bool) -> Outcome:
    """Reads a generation to its end."""
    times_s = []
    async for message in messages:
        times_s.append(time.perf_counter())
        if isinstance(message, Finished):
            return Outcome(
                is_long=is_long,
                ttft_s=times_s[0] - asked_s,
                gap_s=max((later - earlier for earlier, later in pairwise(times_s)), default=0.0),
                total_s=times_s[-1] - asked_s,
                num_tokens=message.num_output_tokens,
            )
    raise AssertionError("a generation without an end")


def _median_row(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    middle = len(samples) // 2
    names = [name for name, value in samples[0].items() if isinstance(value, int | float)]
    return {name: sorted(sample[name] for sample in samples)[middle] for name in names}


def _print(rows: dict[str, dict[str, float]]) -> None:
    header = [
        "side",
        "offered",
        "refused",
        "of them long",
        "preemptions",
        "tokens/s",
        "TTFT p50",
        "TTFT p99",
        "of short ones",
        "gap p99",
        "complete p99",
        "TTFT met",
    ]
    cells = [
        [
            side,
            f"{row['offered']:.0f}",
            f"{row['refused']:.0f}",
            f"{row['refused_long']:.0f}",
            f"{row['preemptions']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ttft_p50_s']:.2f} s",
            f"{row['ttft_p99_s']:.2f} s",
            f"{row['ttft_p99_short_s']:.2f} s",
            f"{row['gap_p99_s']:.2f} s",
            f"{row['total_p99_s']:.1f} s",
            f"{100 * row['objective_met']:.0f} %",
        ]
        for side, row in rows.items()
    ]
    print()
    print(table(header, cells))


def _checks(rows: dict[str, dict[str, float]]) -> list[Check]:
    ours, checks = rows[OURS[0]], []
    for side in OTHERS:
        theirs = rows[side]
        fewer = {"refusals": "refused", "preemptions": "preemptions", "TTFT p99": "ttft_p99_s"}
        for name, key in fewer.items():
            # One more on both sides where a count may be 0.
            one = 0 if key == "ttft_p99_s" else 1
            value = (ours[key] + one) / (theirs[key] + one)
            checks.append(Check(name=f"headroom over {side}: {name}", value=value, target="<= 1"))
        for name, key in {"tokens/s": "tokens_per_s", "TTFT met, of all offered": "objective_met"}.items():
            checks.append(Check(name=f"headroom over {side}: {name}", value=ours[key] / theirs[key], target=">= 1"))
    return checks


if __name__ == "__main__":
    sys.exit(main())
