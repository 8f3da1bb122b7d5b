"""Dividing a bus: how long it takes, whether it is optimal, and what it is worth over fixed equal shares. No Ray.

Fleets are random mixes of models (unit sizes of SmolLM2-135M, Llama-2-7B, Llama-2-13B and Qwen2.5-7B layers in their
usual dtypes) and TPOT objectives, on buses that hold some of what is wanted. "Next" allocations are those after one
replica has changed its demand, with the previous allocation at hand. Small cases are compared with exhaustive search.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.common import Check, finish, parse_arguments, table
from cluster.bus_allocation import BusAllocation, allocate_bus, unit_cost_bytes_per_s
from cluster.messages import LinkDemand

UNIT_BYTES = (14_160_384, 404_766_720, 634_388_480, 466_115_584)
STEP_S = (0.03, 0.05, 0.1, 0.2)
NUM_BUSES_OF_A_FLEET, REPLICAS_PER_BUS = 512, 8
Bus = tuple[dict[str, LinkDemand], int]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_samples, num_small = (50, 200) if arguments.quick else (200, 2000)
    samples = [
        *(_timed(64, kinds, num_samples) for kinds in (1, 2, 4, 8)),
        _fleet(5 if arguments.quick else 15),
        _against_exhaustive_search(num_small),
        _against_equal_shares(num_samples),
    ]
    timed = [sample for sample in samples if sample["what"] == "one bus"]
    print(
        table(("kinds", "median ms", "p95 ms", "next median ms", "next p95 ms", "unproven"), [_row(s) for s in timed])
    )
    return finish(arguments, "measured", samples, _checks(samples))


def random_bus(generator: random.Random, num_replicas: int, num_kinds: int, max_units: int = 76) -> Bus:
    """Replicas of up to `num_kinds` (model, objective) pairs, and a bus for 10 to 90 % of what they want."""
    kinds = [(generator.choice(UNIT_BYTES), generator.choice(STEP_S)) for _ in range(num_kinds)]
    demands = {}
    for index in range(num_replicas):
        unit_bytes, step_s = generator.choice(kinds)
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


def _timed(num_replicas: int, num_kinds: int, num_samples: int) -> dict[str, Any]:
    generator = random.Random(num_kinds)
    first_s, next_s, moved, unproven = [], [], [], []
    for _ in range(num_samples):
        demands, capacity = bus = random_bus(generator, num_replicas, num_kinds)
        seconds, before = _seconds(lambda bus=bus: allocate(bus))
        first_s.append(seconds)
        demands = changed(demands, before, generator)
        seconds, after = _seconds(lambda bus=(demands, capacity), before=before: allocate(bus, before))
        next_s.append(seconds)
        moved.append(sum(before.num_offloaded[name] != after.num_offloaded[name] for name in demands))
        exact = allocate_bus(demands, capacity)
        unproven.append(1 - exact.host_bytes / exact.bound_bytes)
    return {
        "what": "one bus",
        "num_replicas": num_replicas,
        "num_kinds": num_kinds,
        "first_s": first_s,
        "next_s": next_s,
        "replicas_changed_by_one_change": moved,
        "unproven_share_of_host_bytes": unproven,
    }


def _fleet(num_rounds: int) -> dict[str, Any]:
    generator = random.Random(0)
    buses = [
        random_bus(generator, REPLICAS_PER_BUS, generator.choice((1, 1, 2, 3))) for _ in range(NUM_BUSES_OF_A_FLEET)
    ]
    seconds = [_seconds(lambda: [allocate(bus) for bus in buses])[0] for _ in range(num_rounds)]
    return {"what": "fleet", "num_buses": len(buses), "num_replicas": len(buses) * REPLICAS_PER_BUS, "seconds": seconds}


def _against_exhaustive_search(num_cases: int) -> dict[str, Any]:
    generator = random.Random(3)
    num_equal = 0
    for _ in range(num_cases):
        demands, capacity = random_bus(generator, generator.randint(1, 4), 4, max_units=6)
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
    return [str(sample["num_kinds"]), *times, f"{max(sample['unproven_share_of_host_bytes']):.1e}"]


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    by = {(sample["what"], sample.get("num_kinds")): sample for sample in samples}
    exhaustive, fleet = by["exhaustive search", None], by["fleet", None]
    return [
        *(
            Check(
                name=f"64 replicas on a bus, {kinds} kinds, p95 ms",
                value=1e3 * _p95(by["one bus", kinds]["first_s"]),
                target="<= 5",
            )
            for kinds in (1, 2, 4, 8)
        ),
        Check(name="4,096 replicas on 512 buses, median ms", value=1e3 * median(fleet["seconds"]), target="<= 100"),
        Check(
            name="small cases with as much host memory as exhaustive search, share",
            value=exhaustive["num_equal"] / exhaustive["num_cases"],
            target=">= 1",
        ),
        Check(
            name="replicas whose range moves when one changes its demand, of 64 of 8 kinds, median",
            value=median(by["one bus", 8]["replicas_changed_by_one_change"]),
            target="<= 8",
        ),
        Check(
            name="host memory over equal fixed shares, two objectives on one bus, worst case",
            value=min(by["equal shares", None]["host_bytes_over_equal_shares"]),
            target=">= 1",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
