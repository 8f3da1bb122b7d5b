"""Four processes of one model: the host memory they hold, how soon later ones have their weights, the builder's peak.

Every process is a fresh one that has imported all it needs. In each round the first builds the store and the others
attach to it; times are from the call to a model whose every tensor is in place, without the tokenizer. The checkpoint
is in the page cache, which favours the first. In the first round there are four, which also generate with every layer
offloaded, so that each has read the whole store, and the kernel's accounts (/proc/self/smaps) say what they hold.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from benchmarks.common import Check, finish, parse_arguments, random_prompts, table
from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, HostConfig, ModelConfig, OffloadConfig
from selectn_core.engine.engine import Engine
from selectn_core.requests.sampling import SamplingParams
from selectn_core.weights.checkpoint import LoadedModel, load_weights, resolve_source
from selectn_core.weights.shared_model import open_shared
from selectn_core.weights.shared_store import SharedStore
from selectn_core.weights.units import find_units

NUM_PROCESSES = 4
NUM_ROUNDS, NUM_ROUNDS_QUICK = 9, 2
HOST = HostConfig()
_SPAWN = multiprocessing.get_context("spawn")


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    resolve_source(ModelConfig(source=arguments.model))  # the embedded model is converted on first use
    samples: list[dict[str, Any]] = []
    for round_number in range(NUM_ROUNDS_QUICK if arguments.quick else NUM_ROUNDS):
        samples += _round(arguments.model, round_number)
    _print(samples)
    return finish(arguments, "measured", samples, _checks(samples))


def _round(source: str, round_number: int) -> list[dict[str, Any]]:
    """The samples of one round, one per process, in the order in which they came."""
    processes = [_Process(source) for _ in range(NUM_PROCESSES if round_number == 0 else 2)]
    samples = [
        {"round": round_number, "order": order, **process.ask("load")} for order, process in enumerate(processes)
    ]
    if round_number == 0:
        for process in processes:
            process.ask("serve")
        for sample, process in zip(samples, processes, strict=True):
            sample.update(process.ask("account"))
    for process in reversed(processes):
        process.ask("close")
    return samples


class _Process:
    """A process that does what it is asked."""

    def __init__(self, source: str) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs, source))
        self._process.start()
        self.ask("warm up")

    def ask(self, command: str) -> dict[str, Any]:
        self._pipe.send(command)
        result = self._pipe.recv()
        if command == "close":
            self._process.join()
        return result


def _work(pipe: Connection, source: str) -> None:
    resolved = resolve_source(ModelConfig(source=source))
    model: PreTrainedModel | None = None
    store: SharedStore | None = None
    engine: Engine | None = None
    for command in iter(pipe.recv, "close"):
        result: dict[str, Any] = {}
        if command == "warm up":
            load_weights(resolved)  # maps the checkpoint and imports the model's code; reads next to nothing
        elif command == "load":
            model, store, result = _load(resolved)
        elif command == "serve":
            assert model is not None
            engine = _serve(LoadedModel(model=model, tokenizer=None, name="bench", store=store))
        elif command == "account":
            assert engine is not None
            assert store is not None
            result = _account(engine, store)
        pipe.send(result)
    if engine is not None:
        engine.close()
    elif store is not None:
        store.close()
    pipe.send({})


def _load(resolved: ModelConfig) -> tuple[PreTrainedModel, SharedStore, dict[str, Any]]:
    before_bytes = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    started_s = time.perf_counter()
    model, store = open_shared(resolved, HOST)
    seconds = time.perf_counter() - started_s
    grown_bytes = _status_bytes("VmHWM") - before_bytes
    return (
        model,
        store,
        {
            "seconds": seconds,
            "peak_rss_growth_bytes": grown_bytes,
            "store_bytes": store.path.stat().st_blocks * 512,
            "model_bytes": sum(tensor.nbytes for _, tensor in store.tensors()),
            "offloaded_bytes": sum(unit.num_bytes for unit in find_units(model)),
        },
    )


def _serve(loaded: LoadedModel) -> Engine:
    """An engine with every layer offloaded that has run a few steps: all weights have gone over the link."""
    engine = Engine(
        loaded,
        EngineConfig(
            device=DeviceConfig(link_gb_per_s=50),
            batch=BatchConfig(kv_tokens=256),
            offload=OffloadConfig(num_offloaded=len(find_units(loaded.model))),
            host=HOST,
        ),
    )
    engine.start()
    engine.submit(random_prompts(1, 8, 1000)[0], SamplingParams(max_tokens=4, ignore_eos=True)).result()
    return engine


def _account(engine: Engine, store: SharedStore) -> dict[str, Any]:
    """What the kernel says this process holds of the store, and host copies of offloaded units outside of it."""
    first, last = store.memory.data_ptr(), store.memory.data_ptr() + store.memory.nbytes
    buffers = [engine.store.buffer(engine.units[index]) for index in engine.executor.plan.offloaded]
    private = [buffer.nbytes for buffer in buffers if not first <= buffer.data_ptr() < last]
    return {"store_pss_bytes": _pss_bytes(store.path.name), "private_copies_bytes": sum(private)}


def _pss_bytes(name: str) -> int:
    """Proportional share of this process in its mappings of the file."""
    total_kib, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_it = name in line
        elif is_it and line.startswith("Pss:"):
            total_kib += int(line.split()[1])
    return total_kib << 10


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


def _held_bytes(samples: list[dict[str, Any]]) -> int:
    return sum(s["store_pss_bytes"] + s["private_copies_bytes"] for s in samples if "store_pss_bytes" in s)


def _start_ratios(samples: list[dict[str, Any]], order: int) -> list[float]:
    """Per round: seconds of the process that came as number `order`, over the first's."""
    seconds = {(s["round"], s["order"]): s["seconds"] for s in samples}
    return [value / seconds[number, 0] for (number, which), value in seconds.items() if which == order]


def _peaks(samples: list[dict[str, Any]]) -> list[float]:
    # The builder does not map what it writes, so the store's pages come on top; counting all of them is pessimistic.
    builders = [s for s in samples if s["order"] == 0]
    return [(s["peak_rss_growth_bytes"] + s["store_bytes"]) / s["model_bytes"] for s in builders]


def _checks(samples: list[dict[str, Any]]) -> list[Check]:
    return [
        Check(
            name="host weight bytes held by four processes over one process's",
            value=_held_bytes(samples) / samples[0]["store_bytes"],
            target="<= 1.1",
        ),
        Check(
            name="seconds until the second process has its weights over the first's (median of rounds)",
            value=median(_start_ratios(samples, 1)),
            target="<= 0.2",
        ),
        Check(
            name="builder's peak memory, store included, over the model's bytes (worst round)",
            value=max(_peaks(samples)),
            target="<= 1.2",
        ),
    ]


def _print(samples: list[dict[str, Any]]) -> None:
    rows = []
    for order in range(NUM_PROCESSES):
        seconds = [s["seconds"] for s in samples if s["order"] == order]
        ratios = _start_ratios(samples, order)
        rows.append(
            (
                order + 1,
                f"{median(seconds):.3f}",
                f"{min(seconds):.3f}..{max(seconds):.3f}",
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f}..{max(ratios):.3f}",
            )
        )
    print(table(("process", "seconds", "range", "over the first", "range"), rows))
    one, mib = samples[0], 1 << 20
    print(
        f"\nmodel {one['model_bytes'] / mib:.0f} MiB, of which layers {one['offloaded_bytes'] / mib:.0f}; "
        f"store {one['store_bytes'] / mib:.0f}; four processes hold {_held_bytes(samples) / mib:.0f} "
        f"({_held_bytes(samples) / one['offloaded_bytes']:.2f} x the layers of one)"
    )
    print(f"builder's peak over the model: {min(_peaks(samples)):.3f}..{max(_peaks(samples)):.3f}")


if __name__ == "__main__":
    sys.exit(main())
