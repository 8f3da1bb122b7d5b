"""Measured step time against T_bound and against the recurrence, at every k; and what the executor costs at k = 0.

The real executor runs the model in decode steps of a fixed batch. For each k the placement and S are those that the
recurrence says are fastest, from compute times measured at k = 0 just before and after (the machine's speed drifts).
On CUDA the link is the real one and the model's compute is not disturbed by copies; on the emulated device the link
is paced, and copy thread and model share the CPU's memory, which is why its bandwidths are kept low.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.common import Check, StepReader, finish, parse_arguments, random_prompts, table
from selectn_core.config import DEVICE_KINDS, BatchConfig, DeviceConfig, EngineConfig, ModelConfig, OffloadConfig
from selectn_core.device import resolve_kind
from selectn_core.engine.engine import Engine
from selectn_core.latency.placement import OffloadPlan, best_slots
from selectn_core.latency.recurrence import Link, StepCosts, bound_s, predict_step_s
from selectn_core.profiling.unit_timer import UnitTimer
from selectn_core.requests.sampling import SamplingParams
from selectn_core.weights.checkpoint import load_model

BANDWIDTHS_GB_PER_S = (0.5, 1.0)
BATCH_SIZES = (1, 4, 16)
PROMPT_TOKENS = 64
MAX_SLOTS = 4
NUM_SETTLE, NUM_MEASURED = 3, 5


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured: k values, and pairs of steps for the executor's own cost."""

    ks: Callable[[int], list[int]]
    num_cost_pairs: int


QUICK = Effort(ks=lambda num_units: sorted({0, 2, num_units // 3, num_units}), num_cost_pairs=40)
FULL = Effort(ks=lambda num_units: list(range(num_units + 1)), num_cost_pairs=200)


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "",
        [
            ("--device", {"default": "auto", "choices": DEVICE_KINDS, "help": "auto: CUDA if there is one"}),
            ("--plot", {"type": Path, "metavar": "FILE", "help": "draw step time against k"}),
        ],
    )
    effort = QUICK if arguments.quick else FULL
    kind = resolve_kind(DeviceConfig(kind=arguments.device))
    samples: list[dict[str, Any]] = []
    cost_samples: list[dict[str, Any]] = []
    for batch_size in BATCH_SIZES:
        engine = _engine(arguments.model, kind, batch_size, effort)
        with engine, UnitTimer(engine.units, engine.device) as timer:
            reader = _start_decoding(engine, batch_size)
            for gb_per_s in BANDWIDTHS_GB_PER_S if kind == "emulated" else (None,):
                samples += _measure_intervals(engine, timer, reader, batch_size, gb_per_s, effort)
            if batch_size == 1:
                engine.set_num_offloaded(0)
                cost_samples = _measure_executor_cost(engine, reader, effort.num_cost_pairs)
    _print(samples)
    provenance = "measured" if kind == "cuda" else "emulated"
    if arguments.plot:
        from benchmarks.plots import plot_intervals  # late: matplotlib is only needed here

        plot_intervals(samples, provenance, arguments.plot)
    return finish(arguments, provenance, samples + cost_samples, _checks(samples, cost_samples))


def _engine(source: str, kind: str, batch_size: int, effort: Effort) -> Engine:
    loaded, kv_tokens = load_model(ModelConfig(source=source)), batch_size * (PROMPT_TOKENS + _max_tokens(effort) + 32)
    return Engine(
        loaded,
        EngineConfig(
            device=DeviceConfig(
                kind=kind,
                link_gb_per_s=BANDWIDTHS_GB_PER_S[-1],
                memory_gib=enough_gib(loaded.model, kv_tokens) if kind == "cuda" else None,
            ),
            batch=BatchConfig(
                max_batch_tokens=max(256, batch_size),
                max_requests=batch_size,
                kv_tokens=kv_tokens,
                prefix_sharing=False,
            ),
            offload=OffloadConfig(num_offloaded=0),
        ),
    )


def enough_gib(model: PreTrainedModel, kv_tokens: int) -> float:
    """Device memory for all weights, slots, `kv_tokens` and activations: of a whole card a small model has no use.

    Keys are counted as if every head had its own, of twice the usual width.
    """
    config = model.config.get_text_config()
    weight_bytes = sum(tensor.nbytes for tensor in model.parameters())
    token_bytes = 2 * 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return (1.25 * weight_bytes + kv_tokens * token_bytes) / 2**30 + 1.0


def _max_tokens(effort: Effort) -> int:
    per_k = 2 * (NUM_SETTLE + NUM_MEASURED + 2)
    return len(BANDWIDTHS_GB_PER_S) * (len(effort.ks(32)) + 1) * per_k + 3 * effort.num_cost_pairs + 100


def _start_decoding(engine: Engine, batch_size: int) -> StepReader:
    vocab_size = engine.model.config.get_text_config().vocab_size
    max_tokens = engine.max_model_len // batch_size if batch_size == 1 else engine.max_model_len
    max_tokens = min(max_tokens, engine.kv_capacity_tokens // batch_size) - PROMPT_TOKENS - 32
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = random_prompts(batch_size, PROMPT_TOKENS, vocab_size)
    reader = StepReader(engine, [engine.submit(prompt, params) for prompt in prompts])
    while not (engine.steps.records and engine.steps.records[-1].shape.num_decodes == batch_size):
        reader.next_steps(1)
    return reader


def _measure_intervals(
    engine: Engine,
    timer: UnitTimer,
    reader: StepReader,
    batch_size: int,
    gb_per_s: float | None,
    effort: Effort,
) -> list[dict[str, Any]]:
    """One sample per k, each between two measurements at k = 0."""
    if gb_per_s is not None:
        engine.device.bus.bytes_per_s = gb_per_s * 1e9  # type: ignore[attr-defined]
    link = Link(bytes_per_s=gb_per_s * 1e9 if gb_per_s else _measured_bandwidth(engine, reader))
    samples = []
    before = _unloaded_costs(engine, timer, reader)
    progress = tqdm(effort.ks(len(engine.units)), desc=f"batch {batch_size}, {link.bytes_per_s / 1e9:.1f} GB/s")
    for num_offloaded in progress:
        plan = best_slots(num_offloaded, MAX_SLOTS, before, link)
        engine.set_plan(plan)
        step_s = reader.median_s(NUM_MEASURED, after=NUM_SETTLE)
        after = _unloaded_costs(engine, timer, reader)
        samples.append(_sample(batch_size, plan, _mean_costs(before, after), link, step_s))
        before = after
    return samples


def _unloaded_costs(engine: Engine, timer: UnitTimer, reader: StepReader) -> StepCosts:
    """c_l and R of the decode step as it is now, at k = 0."""
    engine.set_num_offloaded(0, 1)
    reader.next_steps(NUM_SETTLE)
    timer.reset()
    step_s = median(record.duration_s for record in reader.next_steps(NUM_MEASURED))
    compute_s = timer.median_compute_s()
    return StepCosts(
        compute_s=compute_s,
        unit_bytes=tuple(unit.num_bytes for unit in engine.units),
        rest_s=max(0.0, step_s - sum(compute_s)),
    )


def _mean_costs(a: StepCosts, b: StepCosts) -> StepCosts:
    return StepCosts(
        compute_s=tuple((x + y) / 2 for x, y in zip(a.compute_s, b.compute_s, strict=True)),
        unit_bytes=a.unit_bytes,
        rest_s=(a.rest_s + b.rest_s) / 2,
    )


def _measured_bandwidth(engine: Engine, reader: StepReader) -> float:
    before = engine.device.link_usage()
    engine.set_num_offloaded(len(engine.units), 1)
    reader.next_steps(NUM_SETTLE)
    after = engine.device.link_usage()
    return (after.copied_bytes - before.copied_bytes) / (after.busy_s - before.busy_s)


def _sample(batch_size: int, plan: OffloadPlan, costs: StepCosts, link: Link, step_s: float) -> dict[str, Any]:
    bound = bound_s(costs, plan.offloaded, plan.num_slots, link)
    predicted = predict_step_s(costs, plan.offloaded, plan.num_slots, link)
    return {
        "what": "interval",
        "batch": batch_size,
        "link_gb_per_s": round(link.bytes_per_s / 1e9, 3),
        "k": plan.num_offloaded,
        "slots": plan.slots_used,
        "unloaded_s": costs.unloaded_s,
        "measured_s": step_s,
        "bound_s": bound,
        "predicted_s": predicted,
        "over_bound": step_s / bound,
        "prediction_error": abs(predicted - step_s) / step_s,
    }


def _measure_executor_cost(engine: Engine, reader: StepReader, num_pairs: int) -> list[dict[str, Any]]:
    """Forward passes with and without the executor's hooks, in turn, at k = 0: one sample per pair.

    Without them the model is as transformers built it, under continuous batching with the same attention.
    """
    reader.next_steps(NUM_SETTLE)
    times: list[float] = []
    started_s = 0.0

    def start(*_: object) -> None:
        nonlocal started_s
        (engine.executor.hook if len(times) % 2 else engine.executor.unhook)()
        started_s = time.perf_counter()

    def stop(*_: object) -> None:
        engine.device.synchronize()
        times.append(time.perf_counter() - started_s)

    model = engine.model
    # `start` runs between steps: hooks changed inside a forward would apply to half of it.
    planned, engine.on_step_planned = engine.on_step_planned, start
    handle = model.register_forward_hook(stop)
    reader.next_steps(2 * num_pairs + 2)
    engine.on_step_planned = planned
    handle.remove()
    reader.next_steps(1)
    engine.executor.unhook()
    engine.executor.hook()
    pairs = list(zip(times[0::2], times[1::2], strict=False))[:num_pairs]
    return [{"what": "executor cost", "without_s": a, "with_s": b} for a, b in pairs]


def _checks(samples: list[dict[str, Any]], cost_samples: list[dict[str, Any]]) -> list[Check]:
    ratio = median(sample["with_s"] / sample["without_s"] for sample in cost_samples)
    offloading = [sample for sample in samples if sample["k"] > 0]
    return [
        Check(
            name="step over T_bound, median over all k > 0",
            value=median(sample["over_bound"] for sample in offloading),
            target="<= 1.08",
        ),
        Check(
            name="error of the recurrence's prediction, median over all k > 0",
            value=median(sample["prediction_error"] for sample in offloading),
            target="<= 0.10",
        ),
        Check(name="executor at k = 0 over none, median of pairs", value=ratio, target="<= 1.01"),
    ]


def _print(samples: list[dict[str, Any]]) -> None:
    header = (
        "batch",
        "GB/s",
        "k",
        "S",
        "unloaded ms",
        "measured ms",
        "bound ms",
        "over bound",
        "predicted ms",
    )
    rows = [
        (
            s["batch"],
            s["link_gb_per_s"],
            s["k"],
            s["slots"],
            f"{s['unloaded_s'] * 1e3:.1f}",
            f"{s['measured_s'] * 1e3:.1f}",
            f"{s['bound_s'] * 1e3:.1f}",
            f"{s['over_bound']:.3f}",
            f"{s['predicted_s'] * 1e3:.1f}",
        )
        for s in samples
    ]
    print(table(header, rows))


if __name__ == "__main__":
    sys.exit(main())
