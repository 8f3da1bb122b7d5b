"""What the coordinator costs: a thousand simulated replicas on real Ray, at their own pace and as fast as they can.

The coordinator is the real actor. Replicas are `RangeHolder`s, eight to a bus, many in one process: each reports, waits
for the answer, applies it and reports again. Idle replicas want the same all the time; under load each changes its
demand every 8 s on average, as the engines of `bench_bus` do. CPU and memory are the coordinator process's own (/proc).
"As fast as they can" (no waiting for something new) is where it stops. On a machine with few cores reporters and
coordinator compete, so that it is a lower bound. Last, the same exchanges with the state machine alone, without Ray:
what is left of the cost.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import sys
import time
from typing import Any

import psutil
import ray

from benchmarks.common import Check, finish, parse_arguments, table
from cluster.coordinator.actor import CoordinatorActor, open_coordinator
from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig
from cluster.protocol.messages import BusState, LinkDemand, NodeState, RangeUpdate, ReplicaReport
from cluster.replica.lease import RangeHolder
from deployments.commands.local_cluster import ClusterConfig, local_cluster

NUM_REPLICAS, REPLICAS_PER_BUS = 1000, 8
NUM_PROCESSES = 2
CONFIG = CoordinatorConfig(lease_s=10.0)
HOLD_S, DEMAND_PERIOD_S = 2.0, 8.0
# The share of exchanges that ask to be answered at once, to see how long that takes.
PROBES = 0.05
BUS_BYTES_PER_S, UNIT_BYTES, STEP_S = 24_000_000_000, 404_766_720, (0.05, 0.1, 0.2)


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    seconds = 8.0 if arguments.quick else 20.0
    with local_cluster(ClusterConfig(address="local", num_cpus=NUM_PROCESSES)):
        samples = _on_ray(seconds)
    samples.append(_state_machine_alone(4000 if arguments.quick else 20_000))
    print(
        table(
            ("what", "messages/s", "CPU cores", "ms CPU a message", "MB", "p50 ms", "p99 ms"),
            [_row(s) for s in samples],
        )
    )
    return finish(arguments, "measured, reporters simulated", samples, _checks(samples))


def _on_ray(seconds: float) -> list[dict[str, Any]]:
    coordinator = open_coordinator(CONFIG)
    process = psutil.Process(ray.get(coordinator.__ray_call__.remote(_pid)))
    idle_bytes = process.memory_info().rss
    reporters_class = ray.remote(num_cpus=0)(Reporters)
    reporters = [reporters_class.remote(number) for number in range(NUM_PROCESSES)]
    ray.get([each.report_nodes.remote() for each in reporters])
    ray.get(
        [each.run.remote(CONFIG.lease_bound_s + 3, HOLD_S, None) for each in reporters]
    )  # until everybody has a range
    samples = []
    paces = (("idle", HOLD_S, None), ("under load", HOLD_S, DEMAND_PERIOD_S), ("as fast as they can", 0.0, None))
    for what, hold_s, demand_period_s in paces:
        before, started_s = process.cpu_times(), time.perf_counter()
        results = ray.get([each.run.remote(seconds, hold_s, demand_period_s) for each in reporters])
        elapsed_s, after = time.perf_counter() - started_s, process.cpu_times()
        answers_s = [answer_s for result in results for answer_s in result["answer_s"]]
        status = ray.get(coordinator.status.remote())
        samples.append(
            {
                "what": what,
                "num_replicas": len(status.replicas),
                "num_with_lease": sum(result["num_with_lease"] for result in results),
                "most_of_a_bus": max(result["most_of_a_bus"] for result in results),
                "messages": sum(result["messages"] for result in results),
                "seconds": elapsed_s,
                "cpu_s": after.user + after.system - before.user - before.system,
                "rss_bytes": process.memory_info().rss,
                "idle_rss_bytes": idle_bytes,
                "answer_quantiles_s": {str(q): _quantile(answers_s, q) for q in (0.5, 0.9, 0.99, 1.0)},
            }
        )
    ray.kill(coordinator)
    return samples


def _pid(_: CoordinatorActor) -> int:
    return os.getpid()


class Reporters:
    """A process with its part of the replicas. `answer_s` is for exchanges that asked not to be held."""

    def __init__(self, number: int) -> None:
        self._coordinator = open_coordinator(CONFIG)
        self._random = random.Random(number)
        num_buses = NUM_REPLICAS // REPLICAS_PER_BUS
        self._buses = [f"bus{index}" for index in range(number, num_buses, NUM_PROCESSES)]
        self._holders = [
            RangeHolder(replica_id=f"{bus}-{index}", node_id=bus, bus_id=bus)
            for bus in self._buses
            for index in range(REPLICAS_PER_BUS)
        ]
        self._demands = {holder.replica_id: _demand(self._random) for holder in self._holders}

    async def report_nodes(self) -> None:
        life = 0
        for sequence in (1, 2):
            for bus in self._buses:
                life = await self._coordinator.report_node.remote(node_report(bus, sequence, life))

    async def run(self, seconds: float, hold_s: float, demand_period_s: float | None) -> dict[str, Any]:
        end_s = time.monotonic() + seconds
        counts = await asyncio.gather(*(self._one(holder, end_s, hold_s, demand_period_s) for holder in self._holders))
        now_s = time.monotonic()
        used = [holder.allowed(now_s).link_bytes_per_s for holder in self._holders]
        per_bus = [sum(used[start : start + REPLICAS_PER_BUS]) for start in range(0, len(used), REPLICAS_PER_BUS)]
        return {
            "messages": sum(count for count, _ in counts),
            "answer_s": [answer_s for _, answers_s in counts for answer_s in answers_s],
            "num_with_lease": sum(holder.has_lease(now_s) for holder in self._holders),
            "most_of_a_bus": max(per_bus) / BUS_BYTES_PER_S,
        }

    async def _one(
        self, holder: RangeHolder, end_s: float, hold_s: float, demand_period_s: float | None
    ) -> tuple[int, list[float]]:
        """As `RangeClient` does: one call that waits, and one beside it when the demand changes."""
        answers_s: list[float] = []
        count, calls, link = 0, set[asyncio.Task[None]](), self._demands[holder.replica_id]
        change_s = self._next_change_s(demand_period_s)
        await asyncio.sleep(self._random.uniform(0, hold_s))
        while (now_s := time.monotonic()) < end_s:
            has_changed = now_s >= change_s
            if has_changed:
                link = self._demands[holder.replica_id] = _demand(self._random)
                change_s = self._next_change_s(demand_period_s)
            if not calls or (has_changed and len(calls) == 1):
                held_s = hold_s if self._random.random() > PROBES else 0.0
                calls.add(asyncio.create_task(self._exchange(holder, link, held_s, answers_s)))
                count += 1
            due_s = min(change_s, end_s) - time.monotonic()
            _, calls = await asyncio.wait(calls, timeout=max(0.0, due_s), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*calls)
        return count, answers_s

    async def _exchange(self, holder: RangeHolder, link: LinkDemand, held_s: float, answers_s: list[float]) -> None:
        began_s = time.monotonic()
        update = await self._coordinator.wait_for_update.remote(holder.report(link, began_s), held_s)
        if not held_s:
            answers_s.append(time.monotonic() - began_s)
        if update is not None:
            holder.apply(update, time.monotonic())

    def _next_change_s(self, period_s: float | None) -> float:
        return math.inf if period_s is None else time.monotonic() + self._random.expovariate(1 / period_s)


def node_report(bus: str, sequence: int, heard_life: int) -> NodeState:
    """A node with one bus and its eight devices."""
    ids = tuple(f"{bus}-{index}" for index in range(REPLICAS_PER_BUS))
    report = BusState(bus_id=bus, bytes_per_s=BUS_BYTES_PER_S, num_devices=REPLICAS_PER_BUS, replica_ids=ids)
    return NodeState(
        node_id=bus,
        sequence=sequence,
        heard_life=heard_life,
        buses=(report,),
    )


def _demand(generator: random.Random) -> LinkDemand:
    k_min = generator.randrange(2)
    return LinkDemand(
        k_min=k_min, k_max=generator.randint(k_min, 32), unit_bytes=UNIT_BYTES, step_s=generator.choice(STEP_S)
    )


def _state_machine_alone(num_messages: int) -> dict[str, Any]:
    generator = random.Random(9)
    coordinator = Coordinator(CONFIG, life=1, now_s=-2 * CONFIG.lease_s)
    buses = [f"bus{index}" for index in range(NUM_REPLICAS // REPLICAS_PER_BUS)]
    for bus in buses:
        coordinator.on_node_report(node_report(bus, 1, 1), 0.0)
    holders = [
        RangeHolder(replica_id=f"{bus}-{index}", node_id=bus, bus_id=bus)
        for bus in buses
        for index in range(REPLICAS_PER_BUS)
    ]
    links = {holder.replica_id: _demand(generator) for holder in holders}
    seconds = 0.0
    for number in range(num_messages):
        holder, now_s = holders[number % len(holders)], HOLD_S * number / len(holders)
        if generator.random() < HOLD_S / DEMAND_PERIOD_S:
            links[holder.replica_id] = _demand(generator)
        report = holder.report(links[holder.replica_id], now_s)
        started_s = time.perf_counter()
        update = _answer(coordinator, report, now_s)
        seconds += time.perf_counter() - started_s
        if update is not None:
            holder.apply(update, now_s)
    return {"what": "state machine alone", "messages": num_messages, "seconds": seconds, "cpu_s": seconds}


def _answer(coordinator: Coordinator, report: ReplicaReport, now_s: float) -> RangeUpdate | None:
    """What the actor does with a report, its waiting aside."""
    if coordinator.on_replica_report(report, now_s) == "new":
        coordinator.wanting_updates(report, now_s)
    return coordinator.update_for(report, now_s)


def _quantile(values: list[float], quantile: float) -> float:
    return sorted(values)[int(quantile * (len(values) - 1))] if values else 0.0


def _row(sample: dict[str, Any]) -> list[str]:
    answers_s = sample.get("answer_quantiles_s")
    return [
        sample["what"],
        f"{_rate(sample):.0f}",
        f"{sample['cpu_s'] / sample['seconds']:.2f}",
        f"{1e3 * sample['cpu_s'] / sample['messages']:.3f}",
        f"{_megabytes(sample):.0f}" if "rss_bytes" in sample else "",
        *((f"{1e3 * answers_s[q]:.1f}" for q in ("0.5", "0.99")) if answers_s else ("", "")),
    ]


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    idle, loaded, fast, _ = samples
    values = [
        ("replicas with a lease under load", loaded["num_with_lease"], f">= {NUM_REPLICAS}"),
        ("the fullest bus over what it has", max(each["most_of_a_bus"] for each in (idle, loaded, fast)), "<= 1"),
        ("coordinator's CPU cores for 1,000 replicas under load", loaded["cpu_s"] / loaded["seconds"], "<= 1"),
        ("messages/s it can take over those of 1,000 idle replicas", _rate(fast) / _rate(idle), ">= 1.5"),
        ("messages/s it can take over those of 1,000 replicas under load", _rate(fast) / _rate(loaded), ">= 1"),
        ("coordinator process with 1,000 replicas, MB", max(_megabytes(each) for each in (loaded, fast)), "<= 256"),
    ]
    return [Check(name=name, value=value, target=target) for name, value, target in values]


def _rate(sample: dict[str, Any]) -> float:
    return sample["messages"] / sample["seconds"]


def _megabytes(sample: dict[str, Any]) -> float:
    return sample["rss_bytes"] / 1e6


if __name__ == "__main__":
    sys.exit(main())
