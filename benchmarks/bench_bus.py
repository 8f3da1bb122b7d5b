"""Dividing a bus: how long it takes, whether it is optimal, and what it is worth over fixed equal shares. No Ray.

Fleets are random mixes of models (unit sizes of SmolLM2-135M, Llama-2-7B, Llama-2-13B and Qwen2.5-7B layers in their
usual dtypes) and TPOT objectives, on buses that hold some of what is wanted; or no two replicas are alike, in units
of 10 to 900 MB, in objectives of 30 to 400 ms, or both. "Next" allocations are those after one replica has changed its
demand, with the previous allocation at hand. Small cases are compared with exhaustive search.

Last, two engines with different objectives contend for one emulated bus (`contention.py`): with fixed equal shares, and
with what the coordinator gives them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.contention import BUS_GB_PER_S, LOAD_SHARES, MULTIPLES, NEW_TOKENS, PROMPT_TOKENS, contention
from benchmarks.noise import NoiseWatch
from cluster.bus.allocation import BusAllocation, allocate_bus, unit_cost_bytes_per_s
from cluster.protocol.messages import LinkDemand

UNIT_BYTES = (14_160_384, 404_766_720, 634_388_480, 466_115_584)
STEP_S = (0.03, 0.05, 0.1, 0.2)
# How a replica's (model, objective) is drawn where all differ.
Kind = Callable[[random.Random], tuple[int, float]]
ALL_DIFFER: dict[str, Kind] = {
    "models and objectives": lambda generator: (
        generator.randrange(10_000_000, 900_000_000),
        generator.uniform(0.03, 0.4),
    ),
    "models": lambda generator: (generator.randrange(10_000_000, 900_000_000), STEP_S[2]),
    "objectives": lambda generator: (UNIT_BYTES[1], generator.uniform(0.03, 0.4)),
}
NUM_REPLICAS, KIND_COUNTS = 64, (1, 2, 4, 8)
NUM_BUSES_OF_A_FLEET, REPLICAS_PER_BUS = 512, 8
Bus = tuple[dict[str, LinkDemand], int]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_samples, num_small = (50, 200) if arguments.quick else (200, 2000)
    with NoiseWatch() as watch:
        samples = _samples(arguments, num_samples, num_small)
    timed = [sample for sample in samples if sample["what"] == "one bus"]
    print(
        table(("kinds", "median ms", "p95 ms", "next median ms", "next p95 ms", "unproven"), [_row(s) for s in timed])
    )
    contending = [sample for sample in samples if sample["what"] == "contention"]
    print(f"\nemulated bus of {BUS_GB_PER_S} GB/s; requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens")
    print(table(list(COLUMNS), [[show(s) for show in COLUMNS.values()] for s in contending]))
    return finish(arguments, "measured; contention emulated", samples, _checks(samples), watch.report)


def _samples(arguments: argparse.Namespace, num_samples: int, num_small: int) -> list[dict[str, Any]]:
    return [
        *(_timed(str(kinds), partial(random_kinds, num_kinds=kinds), num_samples) for kinds in KIND_COUNTS),
        *(
            _timed(f"all differ in {what}", partial(all_different, kind), num_samples)
            for what, kind in ALL_DIFFER.items()
        ),
        _fleet(5 if arguments.quick else 15),
        _against_exhaustive_search(num_small),
        _against_equal_shares(num_samples),
        *contention(
            arguments.model,
            seconds=8.0 if arguments.quick else 40.0,
            profile_s=8.0 if arguments.quick else 20.0,
            load_shares=LOAD_SHARES[-1:] if arguments.quick else LOAD_SHARES,
        ),
    ]


def random_kinds(generator: random.Random, num_replicas: int, *, num_kinds: int) -> list[tuple[int, float]]:
    """(unit bytes, objective) of each replica: up to `num_kinds` different ones."""
    kinds = [(generator.choice(UNIT_BYTES), generator.choice(STEP_S)) for _ in range(num_kinds)]
    return [generator.choice(kinds) for _ in range(num_replicas)]


def all_different(kind: Kind, generator: random.Random, num_replicas: int) -> list[tuple[int, float]]:
    """(unit bytes, objective) of each replica, each drawn for itself."""
    return [kind(generator) for _ in range(num_replicas)]


def random_bus(generator: random.Random, kinds: Sequence[tuple[int, float]], max_units: int = 76) -> Bus:
    """A replica of each of `kinds`, and a bus for 10 to 90 % of what they want."""
    demands = {}
    for index, (unit_bytes, step_s) in enumerate(kinds):
        k_min = generator.randrange(4)
        k_max = k_min + generator.randrange(1, max_units)
        demands[f"r{index:02}"] = LinkDemand(k_min=k_min, k_max=k_max, unit_bytes=unit_bytes, step_s=step_s)
    least, most = (_cost(demands, {name: getattr(d, end) for name, d in demands.items()}) for end in ("k_min", "k_max"))
    return demands, int(least + (most - least) * generator.uniform(0.1, 0.9))


def changed(demands: dict[str, LinkDemand], before: BusAllocation, generator: random.Random) -> dict[str, LinkDemand]:
    """One replica wants up to three units less than it has."""
    name = generator.choice([name for name, demand in demands.items() if before.num_offloaded[name] > demand.k_min])
    old = demands[name]
    k_max = max(old.k_min, before.num_offloaded[name] - generator.choice((1, 2, 3)))
    new = LinkDemand(k_min=old.k_min, k_max=k_max, unit_bytes=old.unit_bytes, step_s=old.step_s)
    return {**demands, name: new}


def allocate(bus: Bus, previous: BusAllocation | None = None) -> BusAllocation:
    """As the coordinator does it: less than a unit is a tie."""
    demands, capacity = bus
    tie_bytes = min(demand.unit_bytes for demand in demands.values()) - 1
    return allocate_bus(demands, capacity, previous.num_offloaded if previous else None, tie_bytes=tie_bytes)


def _timed(
    kinds: str, drawn: Callable[[random.Random, int], list[tuple[int, float]]], num_samples: int
) -> dict[str, Any]:
    generator = random.Random(kinds)
    first_s, next_s, moved, unproven = [], [], [], []
    for _ in range(num_samples):
        demands, capacity = bus = random_bus(generator, drawn(generator, NUM_REPLICAS))
        seconds, before = _seconds(partial(allocate, bus))
        first_s.append(seconds)
        demands = changed(demands, before, generator)
        seconds, after = _seconds(partial(allocate, (demands, capacity), before))
        next_s.append(seconds)
        moved.append(sum(before.num_offloaded[name] != after.num_offloaded[name] for name in demands))
        exact = allocate_bus(demands, capacity)
        unproven.append(1 - exact.host_bytes / exact.bound_bytes)
    return {
        "what": "one bus",
        "num_replicas": NUM_REPLICAS,
        "kinds": kinds,
        "first_s": first_s,
        "next_s": next_s,
        "replicas_changed_by_one_change": moved,
        "unproven_share_of_host_bytes": unproven,
    }


def _fleet(num_rounds: int) -> dict[str, Any]:
    generator = random.Random(0)
    buses = [
        random_bus(generator, random_kinds(generator, REPLICAS_PER_BUS, num_kinds=generator.choice((1, 1, 2, 3))))
        for _ in range(NUM_BUSES_OF_A_FLEET)
    ]
    seconds = [_seconds(lambda: [allocate(bus) for bus in buses])[0] for _ in range(num_rounds)]
    return {"what": "fleet", "num_buses": len(buses), "num_replicas": len(buses) * REPLICAS_PER_BUS, "seconds": seconds}


def _against_exhaustive_search(num_cases: int) -> dict[str, Any]:
    generator = random.Random(3)
    num_equal = 0
    for _ in range(num_cases):
        demands, capacity = random_bus(
            generator, random_kinds(generator, generator.randint(1, 4), num_kinds=4), max_units=6
        )
        num_equal += allocate_bus(demands, capacity).host_bytes == _most_by_trying_everything(demands, capacity)
    return {"what": "exhaustive search", "num_cases": num_cases, "num_equal": num_equal}


def _most_by_trying_everything(demands: dict[str, LinkDemand], capacity: int) -> int:
    ranges = [range(demand.k_min, demand.k_max + 1) for demand in demands.values()]
    costs = [unit_cost_bytes_per_s(demand) for demand in demands.values()]
    sizes = [demand.unit_bytes for demand in demands.values()]
    return max(
        sum(map(int.__mul__, counts, sizes))
        for counts in itertools.product(*ranges)
        if sum(map(int.__mul__, counts, costs)) <= capacity
    )


def _against_equal_shares(num_cases: int) -> dict[str, Any]:
    """Host memory over that of fixed equal shares: two replicas of one model whose objectives differ.

    Their minima are 0, so that equal shares can meet both objectives.
    """
    generator = random.Random(4)
    ratios = []
    for _ in range(num_cases):
        unit_bytes, (tight, loose) = generator.choice(UNIT_BYTES), sorted(generator.sample(STEP_S, 2))
        demands = {
            "tight": LinkDemand(k_min=0, k_max=32, unit_bytes=unit_bytes, step_s=tight),
            "loose": LinkDemand(k_min=0, k_max=32, unit_bytes=unit_bytes, step_s=loose),
        }
        capacity = int(generator.uniform(0.1, 0.9) * _cost(demands, {"tight": 32, "loose": 32}))
        share = capacity // 2
        equal = sum(min(d.k_max, share // unit_cost_bytes_per_s(d)) * d.unit_bytes for d in demands.values())
        if equal:
            ratios.append(allocate((demands, capacity)).host_bytes / equal)
    return {"what": "equal shares", "provenance": "modelled", "host_bytes_over_equal_shares": ratios}


def _cost(demands: dict[str, LinkDemand], counts: dict[str, int]) -> int:
    return sum(counts[name] * unit_cost_bytes_per_s(demand) for name, demand in demands.items())


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    result = work()
    return time.perf_counter() - started_s, result


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def _row(sample: dict[str, Any]) -> list[str]:
    first, following = sample["first_s"], sample["next_s"]
    times = [f"{1e3 * value:.2f}" for value in (median(first), _p95(first), median(following), _p95(following))]
    return [sample["kinds"], *times, f"{max(sample['unproven_share_of_host_bytes']):.1e}"]


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "shares": lambda s: s["mode"],
    "load": lambda s: f"{s['load_share']:g}",
    "replica": lambda s: f"{s['replica']}, {s['tpot_ms']:.0f} ms",
    "offered/s": lambda s: f"{s['requests_per_s']:.2f}",
    "attained": lambda s: f"{s['attained']:.1%}",
    "TPOT p99": lambda s: f"{s['tpot_p99_ms']:.0f} ms",
    "TTFT p99": lambda s: f"{s['ttft_p99_ms'] / 1e3:.1f} s",
    "tokens/s": lambda s: f"{s['tokens_per_s']:.1f}",
    "k": lambda s: f"{s['mean_k']:.1f}",
    "host MiB": lambda s: f"{s['host_bytes'] / 2**20:.0f}",
    "link": lambda s: f"{s['link_use']:.0%}",
}


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    one_bus = {sample["kinds"]: sample for sample in samples if sample["what"] == "one bus"}
    by = {sample["what"]: sample for sample in samples}
    exhaustive, fleet = by["exhaustive search"], by["fleet"]
    contending = {(s["mode"], s["load_share"], s["replica"]): s for s in samples if s["what"] == "contention"}
    loads = sorted({load for _, load, _ in contending})
    return [
        *(
            Check(
                name=f"64 replicas on a bus, kinds: {kinds}, p95 ms",
                value=1e3 * _p95(sample["first_s"]),
                target="<= 5",
                is_timed=True,
            )
            for kinds, sample in one_bus.items()
        ),
        Check(
            name="host memory left unproven, worst of all buses, share",
            value=max(max(sample["unproven_share_of_host_bytes"]) for sample in one_bus.values()),
            target="<= 0.001",
        ),
        Check(
            name="4,096 replicas on 512 buses, median ms",
            value=1e3 * median(fleet["seconds"]),
            target="<= 100",
            is_timed=True,
        ),
        Check(
            name="small cases with as much host memory as exhaustive search, share",
            value=exhaustive["num_equal"] / exhaustive["num_cases"],
            target=">= 1",
        ),
        Check(
            name="replicas whose range moves when one changes its demand, of 64 of 8 kinds, median",
            value=median(one_bus["8"]["replicas_changed_by_one_change"]),
            target="<= 8",
        ),
        Check(
            name="modelled host memory over equal fixed shares, two objectives on one bus, worst case",
            value=min(by["equal shares"]["host_bytes_over_equal_shares"]),
            target=">= 1",
        ),
        *(
            Check(
                name=f"two engines on one bus, coordinated, load {load:g}: {replica} attains",
                value=contending["coordinated", load, replica]["attained"],
                target=">= 0.99",
                is_timed=True,
            )
            for load in loads
            for replica in MULTIPLES
        ),
        *(
            Check(
                name=f"two engines on one bus, load {load:g}: host memory over that with equal fixed shares",
                value=sum(contending["coordinated", load, replica]["host_bytes"] for replica in MULTIPLES)
                / sum(contending["equal", load, replica]["host_bytes"] for replica in MULTIPLES),
                target=">= 1.0001",
                is_timed=True,
            )
            for load in loads
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
