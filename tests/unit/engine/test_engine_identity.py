"""The correctness bar: greedy tokens with offloading are those of the same model without it, always."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from selectn_core.device import Event
from selectn_core.device.emulated import EmulatedDevice, EmulatedEvent
from selectn_core.engine.engine import Engine
from selectn_core.errors import LinkError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from tests.support.engines import (
    Batch,
    CheckedEngine,
    engine_config,
    generate,
    greedy,
    make_prompts,
    random_plans,
)
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, tiny_model

# Every k and every S at least once.
PLANS = [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (5, 1)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILY_DTYPES = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")] + [("llama", "float16")]


@cache
def unloaded_tokens(family: str, dtype: str = "float32", prefix_sharing: bool = True) -> list[list[int]]:
    """Tokens with nothing offloaded; the prompts share prefixes where the cache is asked to share them."""
    tokens = generate(family, engine_config(0, prefix_sharing=prefix_sharing), dtype=DTYPES[dtype])
    assert len({token for row in tokens for token in row}) > 10, "a model this dull would hide any error"
    return tokens


@pytest.mark.parametrize(("num_offloaded", "num_slots"), PLANS)
@pytest.mark.parametrize(("family", "dtype"), FAMILY_DTYPES)
def test_tokens_at_every_interval(family: str, dtype: str, num_offloaded: int, num_slots: int) -> None:
    tokens = generate(family, engine_config(num_offloaded, num_slots), dtype=DTYPES[dtype])
    assert tokens == unloaded_tokens(family, dtype)


@pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])
@pytest.mark.parametrize(("family", "dtype"), FAMILY_DTYPES)
def test_tokens_with_random_plans_in_mid_generation(family: str, dtype: str, executor_class: type[Executor]) -> None:
    tokens = generate(
        family,
        engine_config(2, 1),
        dtype=DTYPES[dtype],
        before_step=random_plans(seed=7),
        executor_class=executor_class,
    )
    assert tokens == unloaded_tokens(family, dtype)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_with_many_sequences_of_plans(seed: int) -> None:
    assert generate("llama", engine_config(5, 2), before_step=random_plans(seed)) == unloaded_tokens("llama")


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize(("num_offloaded", "num_slots"), [(0, 1), (3, 1), (5, 2)])
def test_synchronous_executor_gives_the_same_tokens(family: str, num_offloaded: int, num_slots: int) -> None:
    config = engine_config(num_offloaded, num_slots)
    assert generate(family, config, executor_class=SynchronousExecutor) == unloaded_tokens(family)


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_of_requests_that_share_a_prefix(family: str, prefix_sharing: bool) -> None:
    (prefix,) = make_prompts([33], seed=1)
    # One after the other through a narrow batch, so that later ones find the prefix in the cache.
    prompts = [[*prefix, *tail] for tail in make_prompts([1, 4, 9, 2], seed=2)]
    narrow: Batch = {"prefix_sharing": prefix_sharing, "max_requests": 2}
    expected = generate(family, engine_config(0, **narrow), prompts=prompts)
    tokens = generate(family, engine_config(3, 1, **narrow), prompts=prompts, before_step=random_plans(3))
    assert tokens == expected


def test_shared_prefixes_are_not_computed_again() -> None:
    (prompt,) = make_prompts([40])
    steps = {}
    for sharing in (True, False):
        engine = Engine(tiny_model(), engine_config(2, 1, prefix_sharing=sharing, max_requests=1))
        with engine:
            results = [engine.submit(prompt, greedy()).result() for _ in range(2)]
        assert results[0] == results[1]
        steps[sharing] = engine.steps.num_steps
    assert steps[True] < steps[False]


def test_prefill_chunks_are_mixed_with_decoding() -> None:
    """What the other tests rely on: their batches have both."""
    shapes = []
    engine = CheckedEngine(tiny_model(), engine_config(2, 1))
    handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        for handle in handles:
            handle.result()
    shapes = [record.shape for record in engine.steps.records]
    assert any(0 < shape.num_decodes < shape.num_requests for shape in shapes)
    assert any(shape.is_decode_only for shape in shapes)
    assert max(shape.num_tokens for shape in shapes) == engine.config.batch.max_batch_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers_generate(family: str) -> None:
    """One request at a time against the stock attention and cache."""
    prompts = make_prompts()
    stock = tiny_model(family).model
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = stock.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=-1
        )
        expected.append(output[0, len(prompt) :].tolist())
    with CheckedEngine(tiny_model(family), engine_config(2, 1)) as engine:
        assert [engine.submit(prompt, greedy()).result() for prompt in prompts] == expected


class FlakyDevice(EmulatedDevice):
    """A link some of whose copies fail, in place of hardware that does. The bytes of such a copy are garbage."""

    def __init__(self, capacity_bytes: int, seed: int, failure_rate: float) -> None:
        super().__init__(capacity_bytes, bytes_per_s=50e9)
        self.failure_rate = failure_rate
        self.num_failures = 0
        self._rng = random.Random(seed)

    def copy_async(self, source: torch.Tensor, target: torch.Tensor, *, after: Event | None = None) -> Event:
        if self._rng.random() >= self.failure_rate:
            return super().copy_async(source, target, after=after)
        self.num_failures += 1
        garbage = torch.full_like(source, 0x7B)
        event = super().copy_async(garbage, target, after=after)
        event.synchronize()
        failed = EmulatedEvent()
        failed.finish(LinkError("injected"))
        return failed


def flaky_engine(
    monkeypatch: pytest.MonkeyPatch,
    num_offloaded: int,
    *,
    executor_class: type[Executor],
    seed: int = 0,
    unit: str = "layer",
) -> tuple[CheckedEngine, FlakyDevice]:
    device = FlakyDevice(8 << 20, seed, failure_rate=0.0)
    monkeypatch.setattr("selectn_core.engine.engine.open_device", lambda *_, **__: device)
    config = engine_config(num_offloaded, 1, unit=unit)
    engine = CheckedEngine(tiny_model(), config, executor_class=executor_class)
    return engine, device


BOTH_EXECUTORS = pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])


@BOTH_EXECUTORS
@pytest.mark.parametrize("seed", range(3))
def test_tokens_with_copies_that_fail_now_and_then(
    monkeypatch: pytest.MonkeyPatch, executor_class: type[Executor], seed: int
) -> None:
    expected = unloaded_tokens("llama")
    engine, device = flaky_engine(monkeypatch, 3, executor_class=executor_class, seed=seed)
    engine.before_step = random_plans(seed)
    device.failure_rate = 0.1
    handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        assert [handle.result() for handle in handles] == expected
    assert device.num_failures >= 2


@BOTH_EXECUTORS
@pytest.mark.parametrize("num_offloaded", [1, 3, 5])
def test_engine_recovers_from_a_link_that_failed_for_good(
    monkeypatch: pytest.MonkeyPatch, executor_class: type[Executor], num_offloaded: int
) -> None:
    prompts = make_prompts()
    expected = generate("llama", engine_config(0), prompts=prompts[:1])
    engine, device = flaky_engine(monkeypatch, num_offloaded, executor_class=executor_class)
    with engine:
        assert [engine.submit(prompts[0], greedy()).result()] == expected
        device.failure_rate = 1.0
        engine.set_plan(
            # All come home, to homes that must not be trusted now.
            OffloadPlan(offloaded=(), num_slots=1, num_units=NUM_LAYERS)
        )
        broken = [engine.submit(prompt, greedy()) for prompt in prompts]
        for handle in broken:
            with pytest.raises(RuntimeError, match="copies in a row failed"):
                handle.result()
        device.failure_rate = 0.0
        wait_until_restarted(engine)
        assert [engine.submit(prompts[0], greedy()).result()] == expected


@BOTH_EXECUTORS
def test_a_promotion_that_failed_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, executor_class: type[Executor]
) -> None:
    """Copies into homes fail while a plan is replaced by the next before any step has waited for them."""
    expected = generate("llama", engine_config(0), prompts=make_prompts([5]))
    engine, device = flaky_engine(monkeypatch, 5, executor_class=executor_class)
    everything = OffloadPlan(offloaded=tuple(range(NUM_LAYERS)), num_slots=1, num_units=NUM_LAYERS)
    nothing = OffloadPlan(offloaded=(), num_slots=1, num_units=NUM_LAYERS)
    device.failure_rate = 1.0
    for plan in (nothing, everything, nothing):
        engine.set_plan(plan)
        engine.executor.begin_step()
    device.failure_rate = 0.0
    with engine:
        assert [engine.submit(prompt, greedy()).result() for prompt in make_prompts([5])] == expected


def wait_until_restarted(engine: Engine) -> None:
    """Blocks until the supervisor has replaced a generation thread that an error ended."""
    while engine.batching.fatal_error is not None:
        pass
