"""Engines on tiny models, and runs of them in which every step is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch

from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, HostConfig, OffloadConfig
from selectn_core.engine.engine import Engine
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import StepShape
from selectn_core.requests.sampling import SamplingParams
from tests.support.tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model

# More tokens than `max_batch_tokens`: prefill is chunked and mixed with decoding.
PROMPT_LENGTHS = (3, 9, 17, 26, 5)
NUM_TOKENS = 12

# Of a GPU: all of a card would be millions of a tiny model's sectors, in Python's lists.
CUDA_MEMORY_GIB = 0.25

BeforeStep = Callable[[Engine], None]


class Batch(TypedDict, total=False):
    """The fields of `BatchConfig` that tests set."""

    max_batch_tokens: int
    max_requests: int
    max_waiting: int
    page_size: int
    kv_tokens: int
    prefix_sharing: bool


class CheckedEngine(Engine):
    """Calls `before_schedule` and `before_step` where a plan may change, and checks integrity around every step."""

    before_step: BeforeStep | None = None
    before_schedule: BeforeStep | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take = self.batching.pages.take

        def checked_take(sectors: range) -> bool:
            """Weights count on it: what a plan needs and what is there are compared before the first is taken."""
            before = self.batching.pages.num_in_use
            taken = take(sectors)
            assert self.batching.pages.num_in_use <= before, "taking sectors has spread requests over more of them"
            return taken

        self.batching.pages.take = checked_take  # type: ignore[method-assign]  # this one object's

    def _before_schedule(self) -> list[str]:
        if self.before_schedule is not None:
            self.before_schedule(self)
        beginning = super()._before_schedule()
        self.check_integrity()
        if self.target.is_urgent:
            assert self.executor.plan == self.executor.wanted or self.batching.num_active <= 1
        return beginning

    def _on_step_planned(self, shape: StepShape) -> None:
        if self.before_step is not None:
            self.before_step(self)
        super()._on_step_planned(shape)

    def _on_step_done(self, shape: StepShape, duration_s: float) -> None:
        super()._on_step_done(shape, duration_s)
        self.check_integrity()


def engine_config(
    num_offloaded: Any = 0,
    num_slots: int = 2,
    *,
    memory_gib: float | None = None,
    kind: str = "emulated",
    kv_gib: float = 1.0,
    unit: str = "layer",
    **batch: Unpack[Batch],
) -> EngineConfig:
    if kind == "cuda" and memory_gib is None:
        memory_gib = CUDA_MEMORY_GIB
    return EngineConfig(
        device=DeviceConfig(kind=kind, link_gb_per_s=50, memory_gib=memory_gib),
        batch=replace(BatchConfig(max_batch_tokens=16, max_requests=8, kv_tokens=512), **batch),
        offload=OffloadConfig(unit=unit, num_offloaded=num_offloaded, num_slots=num_slots),
        host=HostConfig(kv_gib=kv_gib),
    )


def memory_gib_for(num_homes: int, **batch: Unpack[Batch]) -> float:
    """A device with room for so many layers and slots, and half of one, beside what stays and the least KV cache."""
    engine = CheckedEngine(tiny_model(), engine_config(0, memory_gib=1 / 1024, **batch))
    beside = engine.device.allocated_bytes - engine.arena.reachable_bytes(0)
    engine.close()
    homes = round((num_homes + 0.5) * engine.arena.round_up(engine.units[0].num_bytes))
    return (beside + homes + engine.workspace.bytes_for((beside + homes) // engine.arena.sector_bytes)) / (1 << 30)


def random_plans(seed: int, num_units: int = NUM_LAYERS) -> BeforeStep:
    """A new k, S and set of units, now and then, in the middle of everything."""
    rng = random.Random(seed)

    def change(engine: Engine) -> None:
        if rng.random() < 0.6:
            offloaded = sorted(rng.sample(range(num_units), rng.randint(0, num_units)))
            plan = OffloadPlan(offloaded=tuple(offloaded), num_slots=rng.randint(1, 4), num_units=num_units)
            engine.set_plan(plan, urgent=rng.random() < 0.5)

    return change


def make_prompts(lengths: Sequence[int] = PROMPT_LENGTHS, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def generate(
    family: str,
    config: EngineConfig,
    *,
    dtype: torch.dtype = torch.float32,
    prompts: Sequence[Sequence[int]] | None = None,
    before_step: BeforeStep | None = None,
    **engine_kwargs: Any,
) -> list[list[int]]:
    """Greedy tokens of every prompt; all are submitted before the engine starts, so equal runs batch equally."""
    engine = CheckedEngine(tiny_model(family, dtype), config, **engine_kwargs)
    engine.before_step = before_step
    handles = [engine.submit(prompt, greedy()) for prompt in (prompts or make_prompts())]
    with engine:
        tokens = [handle.result() for handle in handles]
    engine.batching.check_integrity()
    return tokens
