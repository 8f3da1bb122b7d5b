"""Weights and KV pages share device memory: whatever moves between them, tokens stay and no byte is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.config import OFFLOAD_UNITS
from selectn_core.engine.engine import Engine
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.plan_memory import unmeasured_plan
from selectn_core.requests.handle import RequestHandle
from selectn_core.weights.units import Unit
from tests.support.engines import Batch, CheckedEngine, engine_config, greedy, make_prompts
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, SEVERAL_BLOCKS, tiny_model

PROMPTS = make_prompts((3, 9, 17, 26, 33, 41))
MOST_TOKENS = 24
GIB = 1 << 30


@cache
def reference(family: str, prompt: int) -> list[int]:
    """What transformers' own `generate` gives."""
    model = tiny_model(family).model
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPTS[prompt]])
    tokens = model.generate(ids, max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=0)
    return tokens[0, ids.shape[1] :].tolist()


def build(family: str = "llama", num_offloaded: Any = 0, **batch: Any) -> CheckedEngine:
    """Resident layers leave 48 tokens to the KV cache: fewer than two of the longer requests want."""
    settings = {"kv_tokens": 48, "page_size": 4, "max_requests": 6, **batch}
    return CheckedEngine(tiny_model(family), engine_config(num_offloaded, 1, **settings))


def plan_of(units: Sequence[Unit], first: int, second: int) -> OffloadPlan:
    """Any number of the units, or of those of one kind, through one to three slots."""
    kinds = [None, *sorted({unit.kind for unit in units})]
    kind = kinds[second // 3 % len(kinds)]
    among = [unit.index for unit in units if kind in (None, unit.kind)]
    return unmeasured_plan(units, first % (len(among) + 1), 1 + second % 3, among=among)


class Script:
    """One action before each step is scheduled; the rest when nothing is left to schedule."""

    def __init__(self, engine: CheckedEngine, actions: list[tuple[str, int, int]]) -> None:
        self.requests: list[tuple[int, int, RequestHandle]] = []  # (prompt, number of tokens, handle)
        self._actions = iter(actions)
        self._engine = engine
        engine.before_schedule = self._before_schedule

    def _before_schedule(self, _: Engine) -> None:
        self.act()

    def act(self) -> bool:
        """Carries out the next action; False after the last."""
        kind, first, second = next(self._actions, ("end", 0, 0))
        if kind == "submit":
            prompt, num_tokens = first % len(PROMPTS), 1 + second % MOST_TOKENS
            self.requests.append((prompt, num_tokens, self._engine.submit(PROMPTS[prompt], greedy(num_tokens))))
        elif kind == "plan":
            self._engine.set_plan(plan_of(self._engine.units, first, second))
        elif kind == "urgent":
            self._engine.set_plan(plan_of(self._engine.units, first, second), urgent=True)
        elif kind == "cancel" and self.requests:
            self.requests[first % len(self.requests)][2].cancel()
        return kind != "end"

    def run(self) -> Iterator[tuple[int, int, list[int], str]]:
        """(prompt, number of tokens, tokens, finish reason) of every request."""
        position = 0
        while position < len(self.requests) or self.act():
            for prompt, num_tokens, handle in self.requests[position:]:
                events = list(handle)
                tokens = [token for event in events for token in event.token_ids]
                yield prompt, num_tokens, tokens, str(events[-1].finish_reason)
                position += 1


KINDS = ("submit", "submit", "submit", "plan", "plan", "urgent", "cancel", "wait")
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), min_size=5, max_size=40)


# Nothing, six sectors of llama, and enough for every request that is preempted.
HOST_KV_GIB = (0.0, 12288 / GIB, 1.0)
ALL_FAMILIES = [*FAMILIES, *SEVERAL_BLOCKS]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@settings(max_examples=20)
@given(
    actions=ACTIONS,
    prefix_sharing=st.booleans(),
    kv_gib=st.sampled_from(HOST_KV_GIB),
    unit=st.sampled_from(OFFLOAD_UNITS),
)
def test_any_sequence_of_plans_requests_and_cancellations(
    family: str, actions: Any, prefix_sharing: bool, kv_gib: float, unit: str
) -> None:
    engine = build(family, prefix_sharing=prefix_sharing, kv_gib=kv_gib, unit=unit)
    script = Script(engine, [("submit", 5, MOST_TOKENS - 1), *actions])
    script.act()
    with engine:
        for prompt, num_tokens, tokens, reason in script.run():
            assert tokens == reference(family, prompt)[: len(tokens)]
            assert reason == "cancelled" or (reason, len(tokens)) == ("length", num_tokens)
    engine.batching.check_integrity()
    assert engine.arena.weight_bytes == 0


@pytest.mark.parametrize("late", [False, True])
def test_one_that_is_cancelled_as_a_step_is_planned_has_room_for_that_step(late: bool, monkeypatch: Any) -> None:
    """Layers that were away for its sake came home at once, and the next page that it needed was theirs.

    `late`: its client goes when requests have been looked at, as from another thread.
    """
    engine = build("phi3", prefix_sharing=False, kv_gib=0.0)
    submits = [("submit", 5, MOST_TOKENS - 1), *[("submit", 0, 0)] * 10]
    script = Script(engine, [*submits, ("wait" if late else "cancel", 0, 0)])
    script.act()
    control = engine.offloading.control
    admit = control.admit

    def admit_and_cancel(*args: Any) -> Any:
        step = admit(*args)
        if engine.steps.num_steps == 10:  # a page of four tokens is full
            script.requests[0][2].cancel()
        return step

    if late:
        monkeypatch.setattr(control, "admit", admit_and_cancel)
    with engine:
        reasons = [reason for *_, reason in script.run()]
    assert reasons == ["cancelled", *["length"] * 10]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_go_to_host_and_back_under_load_without_a_failed_request(family: str) -> None:
    engine = build(family, kv_tokens=80)
    plans = iter([*range(NUM_LAYERS + 1), *reversed(range(NUM_LAYERS))])
    reached = []

    def next_plan(_: object) -> None:
        reached.append(engine.executor.plan.num_offloaded)
        if engine.steps.num_steps % 8 == 0:
            engine.set_num_offloaded(next(plans, 0), 1)

    engine.before_schedule = next_plan
    requests = [(i % len(PROMPTS), engine.submit(PROMPTS[i % len(PROMPTS)], greedy(MOST_TOKENS))) for i in range(24)]
    with engine:
        for prompt, handle in requests:
            assert handle.result() == reference(family, prompt)
    assert next(plans, None) is None, "there were too few steps for this test"
    assert (min(reached), max(reached), reached[-1]) == (0, NUM_LAYERS, 0)


CROWDED: Batch = {"kv_tokens": 80, "max_requests": 24, "max_batch_tokens": 32}


def come_home_under_load(engine: CheckedEngine, family: str, *, urgent: bool) -> list[tuple[int, int]]:
    """Asks for all layers when requests hold more than that leaves; (running, offloaded) before and a step later."""
    at_home = unmeasured_plan(engine.units, 0, 1)
    seen: list[tuple[int, int]] = []

    def watch(_: object) -> None:
        if seen or engine.batching.pages.num_in_use > engine.target.kv_sectors(at_home):
            seen.append((engine.batching.num_active, engine.executor.plan.num_offloaded))
            if len(seen) == 1:
                engine.set_plan(at_home, urgent=urgent)

    engine.before_schedule = watch
    prompts = 4 * [*range(len(PROMPTS))]
    requests = [(prompt, engine.submit(PROMPTS[prompt], greedy(MOST_TOKENS))) for prompt in prompts]
    with engine:
        for prompt, handle in requests:
            assert handle.result() == reference(family, prompt)
    engine.batching.check_integrity()
    assert engine.executor.plan.num_offloaded == engine.executor.wanted.num_offloaded == 0
    return seen[:2]


@pytest.mark.parametrize("kv_gib", [0.0, 1.0])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_urgent_plan_is_there_before_the_next_step(family: str, kv_gib: float) -> None:
    """The requests whose memory it takes go on when others have finished."""
    engine = build(family, num_offloaded=NUM_LAYERS, kv_gib=kv_gib, **CROWDED)
    (num_running, away), (num_left, still_away) = come_home_under_load(engine, family, urgent=True)
    assert (away, still_away) == (NUM_LAYERS, 0)
    assert 1 <= num_left < num_running
    swap = engine.batching.swap
    assert swap.num_swapped == (swap.num_preemptions if kv_gib else 0)


def test_a_plan_that_is_not_urgent_takes_memory_from_nobody() -> None:
    engine = build(num_offloaded=NUM_LAYERS, **CROWDED)
    (num_running, away), (num_left, still_away) = come_home_under_load(engine, "llama", urgent=False)
    assert num_left == num_running
    assert 0 < still_away < away


def test_the_last_running_request_is_not_preempted() -> None:
    """Where one request needs more than an urgent plan leaves, layers stay away for it."""
    engine = build(num_offloaded=NUM_LAYERS)
    engine.before_schedule = lambda _: engine.set_plan(unmeasured_plan(engine.units, 0, 1), urgent=True)
    (long,) = make_prompts([60], seed=3)
    with engine:
        handle = engine.submit(long, greedy(20))
        assert len(handle.result()) == 20
    assert engine.batching.swap.num_preemptions == 0


def test_a_layer_comes_back_into_memory_that_running_requests_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are copied elsewhere, and they go on as if nothing had happened."""
    engine = build(num_offloaded=NUM_LAYERS)
    pages, num_moved = engine.batching.pages, 0
    move_blocks = pages._move_blocks

    def counted(move: Any, wanted: range) -> None:
        nonlocal num_moved
        num_moved += len(move.blocks)
        move_blocks(move, wanted)

    monkeypatch.setattr(pages, "_move_blocks", counted)
    # Each step lends all layers' memory, fills it with keys, and takes a part of it back.
    engine.before_step = lambda _: engine.set_num_offloaded(NUM_LAYERS - engine.steps.num_steps % 3, 1)
    requests = [(i, engine.submit(prompt, greedy(MOST_TOKENS))) for i, prompt in enumerate(PROMPTS)]
    with engine:
        for prompt, handle in requests:
            assert handle.result() == reference("llama", prompt)
    assert num_moved > 0


@pytest.mark.parametrize("kept", ["LlamaAttention", "LlamaMLP"])
def test_blocks_stay_in_host_memory_while_requests_hold_what_their_homes_would_take(kept: str) -> None:
    """All are to come back but two of a kind, whose slot is of another size than those of what waits for memory."""
    engine = build(num_offloaded=2 * NUM_LAYERS, unit="block")
    two = tuple(unit.index for unit in engine.units if unit.kind == kept)[:2]
    nearly = OffloadPlan(offloaded=two, num_slots=1, num_units=len(engine.units))
    seen = []

    def change(_: object) -> None:
        if engine.steps.num_steps == 15:
            engine.set_plan(nearly)
        seen.append((engine.executor.wanted, engine.executor.plan))

    engine.before_step = change
    requests = [(i % len(PROMPTS), engine.submit(PROMPTS[i % len(PROMPTS)], greedy(MOST_TOKENS))) for i in range(12)]
    with engine:
        for prompt, handle in requests:
            assert handle.result() == reference("llama", prompt)
    assert any(wanted == nearly != plan for wanted, plan in seen), "memory was never short"
    assert seen[-1] == (nearly, nearly)


def test_a_request_too_long_for_the_plan_gets_the_memory_of_more_layers_while_it_runs() -> None:
    engine = build(num_offloaded=0)
    (prompt,) = make_prompts([30], seed=7)
    assert engine.kv_capacity_tokens < 100 <= engine.max_model_len
    with engine:
        assert len(engine.submit(prompt, greedy(70)).result()) == 70
        assert engine.executor.plan.num_offloaded > 0
        engine.submit(prompt, greedy(2)).result()
        assert engine.executor.plan.num_offloaded == 0


def test_every_byte_has_one_owner() -> None:
    engine = CheckedEngine(tiny_model(), engine_config(3, 2, memory_gib=4 / 1024, kv_tokens=48))
    with engine:
        engine.submit(PROMPTS[3], greedy()).result()
        for num_offloaded in (0, NUM_LAYERS, 2):
            engine.set_num_offloaded(num_offloaded)
            engine.submit(PROMPTS[0], greedy(2)).result()
            account = engine.snapshot()["memory"]
            device = account["device"]
            assert all(held >= 0 for held in device.values())
            assert sum(device.values()) == engine.device.capacity_bytes
            not_allocated = device["workspace_bytes"] + device["unused_bytes"]
            assert engine.device.allocated_bytes == engine.device.capacity_bytes - not_allocated
            assert device["homes_bytes"] == sum(
                engine.arena.round_up(engine.units[i].num_bytes)
                for i in range(NUM_LAYERS)
                if i not in engine.executor.plan.offloaded
            )
            assert device["unused_bytes"] < 2 * engine.arena.sector_bytes + 1024
            assert account["host"]["weights_bytes"] == sum(unit.num_bytes for unit in engine.units)


@pytest.mark.parametrize("unit", OFFLOAD_UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_full_step_fit_what_is_left_to_them(family: str, unit: str) -> None:
    engine = CheckedEngine(tiny_model(family), engine_config(2, 1, unit=unit, memory_gib=1 / 1024, kv_tokens=48))
    limit = engine.config.batch.max_batch_tokens
    peak = engine.device.peak_bytes(lambda: engine.batching.run_step([(limit - 7, 100), *[(1, 60)] * 7]))
    engine.close()
    assert 0 < peak <= engine.workspace_bytes


def test_what_must_be_offloaded_for_the_requests_in_flight() -> None:
    """With that many units offloaded all have room to their end, and some to come; with fewer they do not."""
    engine = build(kv_tokens=48)
    sectors_for = engine.batching.geometry.sectors_for_request
    wanted = [engine.guarantee.wanted_offloaded]
    for prompt in PROMPTS:
        engine.submit(prompt, greedy(MOST_TOKENS))
        wanted.append(engine.guarantee.wanted_offloaded)
    engine.close()
    lengths = [len(prompt) + MOST_TOKENS for prompt in PROMPTS]
    for num_requests, num_offloaded in enumerate(wanted[1:], 1):
        sectors = [sectors_for(length) for length in lengths[:num_requests]]
        num_more = min(num_requests // 4 + 1, 6 - num_requests)
        needed = sum(sectors) + num_more * max(sectors)
        have = [engine.target.kv_sectors(unmeasured_plan(engine.units, k, 1)) for k in range(NUM_LAYERS + 1)]
        assert have[num_offloaded] >= needed or num_offloaded == NUM_LAYERS
        assert all(fewer < needed for fewer in have[:num_offloaded])
    assert wanted[0] == 0
    assert wanted == sorted(wanted)
    assert 0 < wanted[2] < NUM_LAYERS
