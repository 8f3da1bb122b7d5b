"""Throughput in one device memory, by layers offloaded: what the bytes that offloading frees are worth as KV cache.

The device holds the resident model and a quarter of the KV cache that the load wants. All requests are offered at
once, and all `WANTED` may run together. Every side serves the same requests on the same device with the same link;
the sides take turns.

The objective is that of someone who would otherwise buy the memory: 1.1 times the TPOT that the same load has, in the
same round, on a device with room for all of it and nothing offloaded. (A tenth over the unloaded step is what layers
freed are compared at in this project.) A side meets it if 95 % of its requests do.

- k = 0: everything resident, four ways: preempted requests' KV swapped to host memory, or computed again, or no more
  requests at once than fit to their end, or half as many again with swapping (as many as fit at their mean length);
- paper N = i: of every i layers one offloaded through one slot (arXiv 2502.08182);
- k_max: the most layers, placed evenly in time, and the slots with which the predicted step meets the objective.

The load follows from the device. k_max is what the link carries in a step of the full batch, about eleven layers here,
three of them given back as slots. A page of 16 tokens takes 1/20 of a layer, so 24 requests of 96 tokens want 144
pages, of which the resident model leaves 36 and five to six layers make up the rest: the load wants most of what k_max
frees, neither much less (then a smaller k would do, and be faster) nor more (then it would be preempted all the same).
Decode throughput grows with the batch only while a step is dominated by reading weights, on a GPU as on a CPU. On the
CPU here it still does at 24: 18 tokens/s for one request, 62 for 6, 150 for 24. Prefill costs every side the same;
outputs are twice as long as prompts so that decoding dominates.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from benchmarks.common import Check, StepReader, finish, parse_arguments, random_prompts, table
from benchmarks.noise import NoiseWatch
from selectn_core.config import (
    MAX_SLOTS,
    BatchConfig,
    DeviceConfig,
    EngineConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
)
from selectn_core.engine.engine import Engine
from selectn_core.latency.placement import OffloadPlan, best_slots, place_integer_interval
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s
from selectn_core.memory.plan_memory import unmeasured_plan
from selectn_core.profiling.unit_timer import UnitTimer
from selectn_core.requests.sampling import SamplingParams
from selectn_core.start import load_engine

WANTED = 24
SHARE = 4
PAGE_SIZE = 16
LINK_GB_PER_S = 1.0
OBJECTIVE = 1.1
# Half of what the objective allows is planned for; what no plan knows has the other half: noise, and copies that
# slow the model because they use the same memory, which only an emulated device has.
PLANNED = 1.05
ATTAINED = 0.95
INTERVALS = (1, 2, 3, 4, 6)
REFERENCE = "k = 0, room for all"
RESIDENT = ("k = 0, swapping", "k = 0, recomputing", "k = 0, no more than fit", "k = 0, half as many again")


@dataclass(frozen=True, kw_only=True)
class Load:
    """`WANTED` requests of so many tokens, in rounds of all sides."""

    prompt_tokens: int
    new_tokens: int
    num_rounds: int
    intervals: tuple[int, ...]

    @property
    def request_tokens(self) -> int:
        """What a request holds at its end, in whole pages."""
        return -(-(self.prompt_tokens + self.new_tokens) // PAGE_SIZE) * PAGE_SIZE


# A shorter load wants less KV than k_max frees: `QUICK` shows that all works, not what it is worth.
QUICK = Load(prompt_tokens=16, new_tokens=24, num_rounds=1, intervals=INTERVALS[2:3])
FULL = Load(prompt_tokens=32, new_tokens=64, num_rounds=3, intervals=INTERVALS)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to serve the load."""

    name: str
    engine: Engine
    plan: OffloadPlan


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "", [("--plot", {"type": Path, "metavar": "FILE", "help": "draw tokens/s and batch against k"})]
    )
    load = QUICK if arguments.quick else FULL
    with NoiseWatch() as watch, ExitStack() as stack:

        def build(**settings: Any) -> Engine:
            return stack.enter_context(_engine(arguments.model, load, **settings))

        fitting = WANTED // SHARE
        reference, swapping = build(kv_share=1), build()
        resident = unmeasured_plan(swapping.units, 0, 1)
        engines = (swapping, build(kv_gib=0.0), build(max_requests=fitting), build(max_requests=fitting * 3 // 2))
        sides = [
            Side(name=REFERENCE, engine=reference, plan=resident),
            Side(name="k_max", engine=swapping, plan=_largest_plan(reference, load)),
        ]
        sides += [Side(name=name, engine=engine, plan=resident) for name, engine in zip(RESIDENT, engines, strict=True)]
        sides += [Side(name=f"paper N = {n}", engine=swapping, plan=_paper_plan(swapping, n)) for n in load.intervals]
        samples = list(_rounds(sides, load))
    rows = _summary(samples)
    _print(rows)
    if arguments.plot:
        from benchmarks.plots import plot_capacity  # late: matplotlib is only needed here

        plot_capacity(rows, rows[0]["objective_s"] * 1e3, arguments.plot)
    return finish(arguments, "emulated", samples, _checks(rows, samples), watch.report)


def _engine(
    source: str, load: Load, *, kv_gib: float = 1.0, max_requests: int = WANTED, kv_share: int = SHARE
) -> Engine:
    config = EngineConfig(
        model=ModelConfig(source=source),
        # Without memory_gib an emulated device is as large as the resident model and `kv_tokens` take.
        device=DeviceConfig(kind="emulated", link_gb_per_s=LINK_GB_PER_S),
        batch=BatchConfig(
            max_requests=max_requests,
            page_size=PAGE_SIZE,
            kv_tokens=load.request_tokens * WANTED // kv_share,
            prefix_sharing=False,
        ),
        offload=OffloadConfig(num_offloaded=0),
        host=HostConfig(kv_gib=kv_gib),
    )
    return load_engine(config)


def _paper_plan(engine: Engine, interval: int) -> OffloadPlan:
    num_units = len(engine.units)
    return OffloadPlan(offloaded=place_integer_interval(interval, num_units), num_slots=1, num_units=num_units)


def _largest_plan(reference: Engine, load: Load) -> OffloadPlan:
    """k_max for the whole load: by the recurrence, from units timed while all of it decodes with nothing offloaded."""
    with UnitTimer(reference.units, reference.device) as timer, _decoding(reference, load) as reader:
        reader.next_steps(4)
        timer.reset()
        records = reader.next_steps(32)
        compute_s = timer.median_compute_s()
    rest_s = median(record.duration_s - record.stall_s for record in records) - sum(compute_s)
    unit_bytes = tuple(unit.num_bytes for unit in reference.units)
    costs = StepCosts(compute_s=compute_s, unit_bytes=unit_bytes, rest_s=max(0.0, rest_s))
    link, longest_s = Link(bytes_per_s=LINK_GB_PER_S * 1e9), PLANNED * costs.unloaded_s
    plans = [best_slots(k, MAX_SLOTS, costs, link) for k in range(len(reference.units) + 1)]
    feasible = [plan for plan in plans if predict_step_s(costs, plan.offloaded, plan.num_slots, link) <= longest_s]
    # Most host memory, the paper's objective; slots are device memory again.
    return max(feasible, key=lambda plan: (plan.num_offloaded - plan.slots_used, plan.num_offloaded))


class _decoding:  # noqa: N801  (reads as a verb)
    """The whole load decodes while the block lasts, from a little before its mean length."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine, self._load = engine, load

    def __enter__(self) -> StepReader:
        engine, load = self._engine, self._load
        params = SamplingParams(max_tokens=64, ignore_eos=True)
        length = max(1, load.prompt_tokens + load.new_tokens // 2 - 16)
        self._handles = [
            engine.submit(prompt, params) for prompt in random_prompts(WANTED, length, _vocab_size(engine))
        ]
        reader = StepReader(engine, self._handles)
        while not (engine.steps.records and engine.steps.records[-1].shape.num_decodes == WANTED):
            reader.next_steps(1)
        return reader

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.cancel()
        while self._engine.batching.num_active:
            time.sleep(0.01)


def _vocab_size(engine: Engine) -> int:
    return int(engine.model.config.get_text_config().vocab_size)


def _rounds(sides: Sequence[Side], load: Load) -> Iterator[dict[str, Any]]:
    for round_number in range(load.num_rounds):
        objective_s = 0.0
        for side in tqdm(sides, desc=f"round {round_number + 1} of {load.num_rounds}"):
            sample = _serve(side, load)
            if side.name == REFERENCE:
                objective_s = OBJECTIVE * sample["tpot_p95_s"]
            attained = mean(tpot_s <= objective_s for tpot_s in sample.pop("tpots_s"))
            yield {"round": round_number, **sample, "objective_s": objective_s, "attained": attained}


def _serve(side: Side, load: Load) -> dict[str, Any]:
    engine = side.engine
    engine.set_plan(side.plan)
    params = SamplingParams(max_tokens=load.new_tokens, ignore_eos=True)
    before, first = engine.snapshot(), engine.steps.num_steps
    started_s = time.perf_counter()
    prompts = random_prompts(WANTED, load.prompt_tokens, _vocab_size(engine))
    handles = [engine.submit(prompt, params) for prompt in prompts]
    tokens = [handle.result() for handle in handles]
    seconds, after = time.perf_counter() - started_s, engine.snapshot()
    records = [record for record in engine.steps.records if record.iteration >= first]
    timings = [handle.timing for handle in handles]
    tpots_s = sorted(timing.tpot_s for timing in timings if timing.tpot_s is not None)
    ttfts_s = sorted(timing.ttft_s for timing in timings if timing.ttft_s is not None)
    return {
        "side": side.name,
        "k": side.plan.num_offloaded,
        "slots": side.plan.slots_used,
        "kv_tokens": after["kv_capacity_tokens"],
        "offloaded_bytes": after["offloaded_bytes"],
        "tokens_per_s": WANTED * load.new_tokens / seconds,
        "mean_batch": mean(record.shape.num_requests for record in records),
        "decode_step_s": median(record.duration_s for record in records if record.shape.is_decode_only),
        "preemptions": after["preemptions"] - before["preemptions"],
        "swapped": after["preemptions_swapped"] - before["preemptions_swapped"],
        "ttft_p50_s": median(ttfts_s),
        "ttft_p95_s": _percentile(ttfts_s, 95),
        "tpot_p50_s": median(tpots_s),
        "tpot_p95_s": _percentile(tpots_s, 95),
        "tpots_s": tpots_s,
        "tokens": tokens,
    }


def _percentile(ascending: Sequence[float], percent: int) -> float:
    return ascending[min(len(ascending) - 1, len(ascending) * percent // 100)]


def _of(samples: Sequence[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["side"] == side]


def _summary(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per side: the median of its rounds, and the spread of its tokens/s."""
    rows = []
    for name in dict.fromkeys(sample["side"] for sample in samples):
        mine = _of(samples, name)
        row = {key: median(s[key] for s in mine) for key, value in mine[0].items() if isinstance(value, int | float)}
        rates = [s["tokens_per_s"] for s in mine]
        rows.append({**row, "side": name, "lowest": min(rates), "highest": max(rates)})
    return rows


def _print(rows: Sequence[dict[str, Any]]) -> None:
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "side": lambda r: r["side"],
        "k": lambda r: int(r["k"]),
        "slots": lambda r: int(r["slots"]),
        "KV tokens": lambda r: int(r["kv_tokens"]),
        "batch": lambda r: f"{r['mean_batch']:.1f}",
        "preempted": lambda r: f"{r['preemptions']:.0f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "(range)": lambda r: f"{r['lowest']:.0f}-{r['highest']:.0f}",
        "TTFT p50": lambda r: f"{r['ttft_p50_s']:.1f} s",
        "TTFT p95": lambda r: f"{r['ttft_p95_s']:.1f} s",
        "TPOT p95": lambda r: f"{r['tpot_p95_s'] * 1e3:.0f} ms",
        "attained": lambda r: f"{r['attained']:.0%}",
    }
    objective_ms = rows[0]["objective_s"] * 1e3
    print(f"\nobjective: TPOT {objective_ms:.0f} ms for 95 % of the requests (median round); emulated device")
    print(table(list(columns), [[show(row) for show in columns.values()] for row in rows]))


def _checks(rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> list[Check]:
    by_name = {row["side"]: row for row in rows}
    resident = [by_name[name] for name in RESIDENT]
    attaining = [row for row in resident if row["attained"] >= ATTAINED]
    # Where none attains, the one nearest to it: a check of its own says that it does not.
    best = max(attaining, key=lambda r: r["tokens_per_s"]) if attaining else max(resident, key=lambda r: r["attained"])
    ours = by_name["k_max"]
    ratios = [
        mine["tokens_per_s"] / theirs["tokens_per_s"]
        for mine, theirs in zip(*(_of(samples, side) for side in ("k_max", best["side"])), strict=True)
    ]
    print(f"k_max over {best['side']}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) tokens/s by round")
    paper = [row for row in rows if row["side"].startswith("paper") and row["attained"] >= ATTAINED]
    most_paper = max((row["offloaded_bytes"] for row in paper), default=ours["offloaded_bytes"])
    tokens = [sample.pop("tokens") for sample in samples]
    expected = tokens[0]
    equal = mean(mine == theirs for each in tokens for mine, theirs in zip(each, expected, strict=True))
    return [
        Check(
            name="k_max over the best k = 0: tokens/s",
            value=median(ratios),
            target=">= 1.85",
            is_timed=True,
        ),
        Check(
            name="k_max over the paper's intervals that attain: layers' bytes in host memory",
            value=ours["offloaded_bytes"] / most_paper,
            target=">= 1",
            is_timed=True,
        ),
        Check(
            name="k_max: requests that meet the TPOT objective",
            value=ours["attained"],
            target=f">= {ATTAINED}",
            is_timed=True,
        ),
        Check(
            name=f"{best['side']}, the best k = 0: requests that meet it",
            value=best["attained"],
            target=f">= {ATTAINED}",
            is_timed=True,
        ),
        # Batches differ between the sides, and with them the order of sums: a token may differ where two logits tie.
        Check(name="requests with equal tokens on every side", value=equal, target=">= 0.9"),
    ]


if __name__ == "__main__":
    sys.exit(main())
