"""The host work of a step on the way to the device, item by item, over what it was: at most a quarter is the target.

Sizes are those of a large card: 32 requests with 2,048 keys each, 200,000 sectors, 32 rows of 49,152 or 128,256 logits.
"Before" is the way of commit 7a89e6e, written again in `host_work_before.py`. Both sides take turns. Times are the
thread's processor time. What a change of plan makes the host wait is modelled: copies of 416 MB over 50 GB/s.
The decision of a controller is measured alone, over the step that it is for (`bench_deciding.py`). What it was
cannot be written in short: figures of both versions, taken in turn, are among the samples.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

from benchmarks import bench_deciding
from benchmarks.common import Check, finish, parse_arguments, table
from benchmarks.host_work_before import SortedPages, StoppingExecutor, listed_rows, sampled_row_by_row
from benchmarks.noise import NoiseWatch
from benchmarks.paced_device import PacedDevice
from selectn_core.batching import ContinuousBatching, kv_shapes
from selectn_core.batching.batch_inputs import PageRows, attended, step_positions
from selectn_core.batching.continuous_batching import Callbacks
from selectn_core.config import BatchConfig
from selectn_core.device.emulated import EmulatedDevice
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.arena import Arena
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.requests.sampling import SamplingParams, perturb_for_argmax
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.units import find_units

NUM_REQUESTS, NUM_KEYS, PAGE_SIZE = 32, 2048, 16
NUM_SECTORS, UNIT_SECTORS = 200_000, 64
VOCABULARIES = (49_152, 128_256)
NUM_UNITS, COPY_S = 32, 416e6 / 50e9
MOST = 0.25
CUTS = {
    "temperature": SamplingParams(temperature=1.0),
    "top-p": SamplingParams(temperature=1.0, top_p=0.9),
    "top-k": SamplingParams(temperature=1.0, top_k=50),
}
# Milliseconds of processor time of a step's decisions, without memory plans, of 7a89e6e and of the version in which
# this file was written: three runs of both in turn on one machine, by the number of units.
RECORDED_DECIDING_MS = {
    30: {"before": [0.17, 0.16, 0.15], "after": [0.22, 0.21, 0.19]},
    60: {"before": [0.25, 0.25, 0.22], "after": [0.24, 0.22, 0.23]},
    160: {"before": [0.18, 0.18, 0.16], "after": [0.28, 0.25, 0.28]},
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One piece of work, twice. A side returns what it took, in seconds."""

    name: str
    before: Callable[[], float]
    after: Callable[[], float]
    provenance: str = "measured"


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_rounds = 5 if arguments.quick else 41
    torch.set_num_threads(1)
    with NoiseWatch() as watch, torch.inference_mode():
        samples = [_sample(item, num_rounds) for items in ITEMS for item in items()]
        greedy = [_greedy_sample(vocab_size, num_rounds) for vocab_size in VOCABULARIES]
        deciding = [_deciding_sample(machine, arguments.quick) for machine in _machines()]
    header = ("item", "before, ms", "after, ms", "ratio", "quartiles")
    print(table(header, [_row(sample) for sample in samples]))
    checks = [
        *(Check(name=s["item"], value=s["ratio"], target=f"<= {MOST}", is_timed=True) for s in samples),
        *(Check(name=s["item"], value=s["share"], target="<= 0.01", is_timed=True) for s in greedy),
        *(
            Check(name=f"a decision at {s['num_units']} units, share of its step", value=s["share"], target="<= 0.005")
            for s in deciding
        ),
    ]
    return finish(arguments, "measured; waits are modelled", [*samples, *greedy, *deciding], checks, watch.report)


def _sample(item: Item, num_rounds: int) -> dict[str, Any]:
    """Both sides in turn, and which is first in turn too; each once before that."""
    item.before()
    item.after()
    pairs = []
    for i in range(num_rounds):
        if i % 2:
            after_s, before_s = item.after(), item.before()
        else:
            before_s, after_s = item.before(), item.after()
        pairs.append((before_s, after_s))
    ratios = [after_s / before_s for before_s, after_s in pairs]
    first, _, third = quantiles(ratios, n=4)
    return {
        "item": item.name,
        "provenance": item.provenance,
        "before_s": median(before_s for before_s, _ in pairs),
        "after_s": median(after_s for _, after_s in pairs),
        "ratio": median(ratios),
        "quartiles": [first, third],
        "pairs_s": pairs,
    }


def _row(sample: dict[str, Any]) -> tuple[str, ...]:
    first, third = sample["quartiles"]
    return (
        sample["item"],
        f"{1e3 * sample['before_s']:.2f}",
        f"{1e3 * sample['after_s']:.2f}",
        f"{sample['ratio']:.3f}",
        f"{first:.3f} to {third:.3f}",
    )


def _timed(function: Callable[[], Any], *, prepare: Callable[[], Any] = lambda: None) -> Callable[[], float]:
    def run() -> float:
        prepare()
        began_s = time.thread_time()
        function()
        return time.thread_time() - began_s

    return run


# -- rows of the cache ------------------------------------------------------------------------------------------------


def index_items() -> Iterator[Item]:
    """What a decode step reads and writes in one type of attention."""
    allocator = _allocator()
    pasts, blocks = [NUM_KEYS - 1] * NUM_REQUESTS, iter(range(2, NUM_SECTORS))
    for i in range(NUM_REQUESTS):
        allocator.block_table[str(i)] = [next(blocks) for _ in range(NUM_KEYS // PAGE_SIZE)]
    read, written = (torch.zeros(NUM_REQUESTS * NUM_KEYS * 2, dtype=torch.int64) for _ in range(2))
    ones, cpu = [1] * NUM_REQUESTS, torch.device("cpu")

    def laid_out() -> None:
        tables = [allocator.block_table[str(i)] for i in range(NUM_REQUESTS)]
        num_keys = [allocator.get_seqlen_k(past, 1) for past in pasts]
        attended(PageRows(allocator, tables, cpu), ones, pasts, num_keys, step_positions(ones, pasts, cpu))

    yield Item(
        name=f"rows of the cache, {NUM_REQUESTS} requests x {NUM_KEYS:,} keys",
        before=_timed(lambda: listed_rows(allocator, pasts, read, written)),
        after=_timed(laid_out),
    )


def _allocator() -> CacheAllocator:
    allocator = ATTN_TYPE_TO_ALLOCATOR["full_attention"](
        index=0,
        config=SimpleNamespace(head_dim=4),
        num_key_value_heads=1,
        cache_dtype=torch.bfloat16,
        page_size=PAGE_SIZE,
        layer_indices=[0],
        allow_block_sharing=False,
    )
    allocator.write_trash_index = 0
    return allocator


# -- pages ------------------------------------------------------------------------------------------------------------


def page_items() -> Iterator[Item]:
    """A unit's memory is taken from the cache and given back, where nothing and where keys are in the way."""
    with _batching() as batching:
        pages = batching.pages
        allocator = next(iter(batching._processor.cache.cache_allocators.values()))
        for i in range(NUM_REQUESTS):
            for _ in range(NUM_KEYS // PAGE_SIZE):
                pages._pool.allocate_sector(allocator.index)
            allocator.block_table[str(i)] = pages._pool.get_free_blocks(allocator.index, NUM_KEYS // PAGE_SIZE)
        allocator.copy_blocks = lambda source, target: None  # the device's work, on both sides
        numbered = {
            name: [block - pages.num_reserved for block in table] for name, table in allocator.block_table.items()
        }
        before, arena = SortedPages(NUM_SECTORS, numbered), Arena(pages, min_kv_sectors=1)
        unit_bytes = UNIT_SECTORS * pages.sector_bytes

        def in_lists() -> None:
            assert before.spare() >= UNIT_SECTORS
            before.take(range(UNIT_SECTORS))
            before.give(range(UNIT_SECTORS))

        def lowest() -> range:
            first = min(min(table) for table in allocator.block_table.values()) - pages.num_reserved
            return range(first, first + UNIT_SECTORS)

        def lowest_in_lists() -> range:
            first = min(map(min, before.tables.values()))
            return range(first, first + UNIT_SECTORS)

        def moved(side: Any, sectors: Callable[[], range]) -> float:
            where = sectors()
            began_s = time.thread_time()
            side.take(where)
            side.give(where)
            return time.thread_time() - began_s

        yield Item(
            name=f"a unit of {UNIT_SECTORS} sectors taken and given back, of {NUM_SECTORS:,}",
            before=_timed(in_lists),
            after=_timed(lambda: arena.free(arena.allocate(unit_bytes, "a unit"))),
        )
        yield Item(
            name="the same where keys have to move, without their copies",
            before=lambda: moved(before, lowest_in_lists),
            after=lambda: moved(pages, lowest),
        )


@contextmanager
def _batching() -> Iterator[ContinuousBatching]:
    model = _model(num_layers=1)
    units = find_units(model, "layer")
    nothing: Any = lambda *_: None  # noqa: E731
    callbacks = Callbacks(
        before_schedule=nothing,
        token_budget=lambda most: most,
        on_step_planned=nothing,
        on_step_done=nothing,
        on_outputs=nothing,
        swap_is_cheaper=lambda *_: False,
    )
    config = BatchConfig(page_size=PAGE_SIZE, kv_tokens=NUM_SECTORS * PAGE_SIZE)
    with EmulatedDevice(1 << 30, bytes_per_s=50e9) as device:
        batching = ContinuousBatching(
            model, config, device, callbacks, shapes=kv_shapes(model, units[-1].module), num_sectors=NUM_SECTORS
        )
        yield batching
        batching.close()
        batching.release()


def _model(num_layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


# -- changes of plan --------------------------------------------------------------------------------------------------


def plan_items() -> Iterator[Item]:
    """Two units go, come and go while copies are under way, and homes move together."""
    sides = []
    for executor_class in (StoppingExecutor, OverlappedExecutor):
        device = PacedDevice(1 << 40, COPY_S)
        model = _model(num_layers=NUM_UNITS)
        executor = executor_class(model, HostStore(find_units(model, "layer"), device), device, _plan(4, 2))
        executor.attach()
        sides.append((executor, device))
    (before, before_device), (after, after_device) = sides
    yield Item(
        name="a change of plan with more slots, and back, host wait included",
        provenance="waits modelled",
        before=_waiting(lambda: _change(before), before_device),
        after=_waiting(lambda: _change(after), after_device),
    )
    yield Item(
        name="homes moved together, host wait included",
        provenance="waits modelled",
        before=_waiting(lambda: _compact(before), before_device),
        after=_waiting(lambda: _compact(after), after_device),
    )


def _plan(num_offloaded: int, num_slots: int) -> OffloadPlan:
    return OffloadPlan(
        offloaded=tuple(range(0, NUM_UNITS, NUM_UNITS // num_offloaded))[:num_offloaded],
        num_slots=num_slots,
        num_units=NUM_UNITS,
    )


def _change(executor: Executor) -> None:
    for plan in (_plan(8, 3), _plan(4, 2)):
        executor.request_plan(plan)
        executor.apply_plan()


def _compact(executor: Executor) -> None:
    executor._resize_slots(0, 0)
    executor._compact()
    executor._place(executor.plan)
    executor._start_plan(())


def _waiting(function: Callable[[], None], device: PacedDevice) -> Callable[[], float]:
    """What the host takes, and what it waits; the step before has left two copies under way."""

    def run() -> float:
        device.synchronize()
        nothing = torch.empty(0, dtype=torch.uint8)
        for _ in range(2):
            device.copy_async(nothing, nothing)
        waited_s, began_s = device.waited_s, time.thread_time()
        function()
        return time.thread_time() - began_s + device.waited_s - waited_s

    return run


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling_items() -> Iterator[Item]:
    for vocab_size in VOCABULARIES:
        logits, work = _logits(vocab_size)
        positions = count()
        for name, params in CUTS.items():

            def sampled(
                sample: Callable[..., torch.Tensor], params: SamplingParams = params, work: torch.Tensor = work
            ) -> None:
                sample(work, [params] * NUM_REQUESTS, range(NUM_REQUESTS), [next(positions)] * NUM_REQUESTS)  # noqa: B023

            def fill(work: torch.Tensor = work, logits: torch.Tensor = logits) -> None:
                work.copy_(logits)

            yield Item(
                name=f"sampling with {name}, {NUM_REQUESTS} rows of {vocab_size:,}",
                before=_timed(lambda sampled=sampled: sampled(sampled_row_by_row), prepare=fill),  # type: ignore[misc]
                after=_timed(lambda sampled=sampled: sampled(perturb_for_argmax), prepare=fill),  # type: ignore[misc]
            )


def _logits(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As far apart as a model's, and memory of that size."""
    logits = torch.randn(NUM_REQUESTS, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    return logits, torch.empty_like(logits)


def _greedy_sample(vocab_size: int, num_rounds: int) -> dict[str, Any]:
    """Greedy rows are handed on as they are, now as before: over the argmax that follows."""
    logits, _ = _logits(vocab_size)
    params = [SamplingParams()] * NUM_REQUESTS
    sampling = _timed(lambda: perturb_for_argmax(logits, params, range(NUM_REQUESTS), [0] * NUM_REQUESTS))
    argmax = _timed(lambda: logits.argmax(-1))
    pairs = [(argmax(), sampling()) for _ in range(num_rounds)]
    return {
        "item": f"greedy sampling over the argmax, {NUM_REQUESTS} rows of {vocab_size:,}",
        "share": median(b / a for a, b in pairs),
        "pairs_s": pairs,
    }


# -- the controller ---------------------------------------------------------------------------------------------------


def _machines() -> tuple[bench_deciding.Machine, ...]:
    return bench_deciding.layers(), bench_deciding.blocks(), bench_deciding.large()


def _deciding_sample(machine: bench_deciding.Machine, quick: bool) -> dict[str, Any]:
    sample = bench_deciding.sample(machine, 1500 if quick else 4000)
    note = "recorded_ms: both versions in turn, without memory plans, when this benchmark was written"
    recorded_ms = RECORDED_DECIDING_MS[sample["num_units"]]
    return {**sample, "item": "a decision", "recorded_ms": recorded_ms, "note": note}


ITEMS = (index_items, page_items, plan_items, sampling_items)

if __name__ == "__main__":
    sys.exit(main())
