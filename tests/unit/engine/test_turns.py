"""Engines with a queue: in which turn requests begin, which memory they count on, and what one that waits changes."""

from __future__ import annotations

import pytest

from selectn_core.engine.engine import Engine
from selectn_core.memory.plan_memory import unmeasured_plan
from tests.support.engines import Batch, CheckedEngine, engine_config, greedy, make_prompts, memory_gib_for
from tests.support.tiny_models import tiny_model

NARROW: Batch = {"kv_tokens": 64, "max_requests": 1, "page_size": 16}


def test_a_long_request_that_only_waits_offloads_nothing() -> None:
    """The cache under no plan but a deep one holds it. There is one place, and a short one has it."""
    short, long = make_prompts([8, 150])
    engine = CheckedEngine(tiny_model(), engine_config(0, 1, memory_gib=memory_gib_for(5, **NARROW), **NARROW))
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    first = engine.submit(short, greedy(10))
    then = engine.submit(long, greedy(40))
    assert engine.batching.geometry.sectors_for_request(190) > engine.target.kv_sectors(engine.target.plan)
    engine.before_step = lambda each: seen[first.num_tokens < 10].add(each.executor.plan.num_offloaded)
    least: list[int] = []
    engine.before_schedule = lambda each: least.append(each.guarantee.num_offloaded)
    with engine:
        first.result()
        assert len(then.result()) == 40
    assert seen[True] == {0}
    assert min(seen[False]) > 0
    assert least[1] == 0 < least[-1]  # nor is more of the bus asked for it


def test_prompts_are_computed_while_those_who_decode_hold_nearly_all_of_the_cache() -> None:
    """The first holds 15 of 17 pages, and decodes 20 more tokens; the second's prompt of two pages is 2 chunks."""
    prompts = make_prompts([224, 20])
    engine = CheckedEngine(tiny_model(), engine_config(0, kv_tokens=272, max_batch_tokens=16, prefix_sharing=False))
    large, small = engine.submit(prompts[0], greedy(16)), engine.submit(prompts[1], greedy(4))
    order: list[str] = []
    with engine:
        for handle, name in ((small, "small"), (large, "large")):
            handle.result()
            order.append(name)
            if name == "small":
                assert large.num_tokens < 12
    assert engine.batching.swap.num_preemptions == 0


@pytest.mark.parametrize("kv_gib", [0.0, 1.0])
def test_a_preempted_request_is_served_before_those_that_came_after_it(kv_gib: float) -> None:
    """Its keys are in host memory, or are computed again: in line it is where it was."""
    prompts = make_prompts([6] * 6)
    config = engine_config(0, max_requests=2, kv_gib=kv_gib)
    engine = CheckedEngine(tiny_model(), config)
    ended: list[int] = []
    handles = [engine.submit(prompt, greedy(8)) for prompt in prompts]

    def preempt_once(each: Engine) -> None:
        if handles[1].num_tokens == 3 and not each.batching.swap.num_preemptions:
            assert each.batching.preempt_newest()
        ended.extend(i for i, handle in enumerate(handles) if handle.num_tokens == 8 and i not in ended)

    engine.before_schedule = preempt_once
    with engine:
        for handle in handles:
            assert len(handle.result()) == 8
    assert engine.batching.swap.num_preemptions == 1
    assert ended[:3] == [0, 1, 2]


def test_only_those_begin_that_were_named() -> None:
    """Memory was counted for them; the ones before them in line wait, and those that nobody waits for are dropped."""

    class Picky(CheckedEngine):
        def _before_schedule(self) -> list[str]:
            named = super()._before_schedule()
            return [ticket for ticket in named if ticket == last.ticket or last.num_tokens]

    engine = Picky(tiny_model(), engine_config(0))
    first, last = (engine.submit(prompt, greedy(4)) for prompt in make_prompts([5, 5]))
    gone = engine.submit(make_prompts([5])[0], greedy(4))
    engine.requests.remove(gone.ticket)
    with engine:
        last.result()
        assert len(first.result()) == 4
    first_ttft_s, last_ttft_s = first.timing.ttft_s, last.timing.ttft_s
    assert first_ttft_s is not None
    assert last_ttft_s is not None
    assert first_ttft_s > last_ttft_s
    engine.batching.check_integrity()


def test_what_no_plan_leaves_room_for_is_not_counted_on() -> None:
    """As many units stay on the device as the plan by hand says while the request that has begun fits beside them."""
    engine = CheckedEngine(tiny_model(), engine_config(0, 1, memory_gib=memory_gib_for(5, **NARROW), **NARROW))
    try:
        assert engine.offloading.served() == []
        handle = engine.submit(make_prompts([150])[0], greedy(40))
        assert engine.offloading.served() == []
        engine._before_schedule()
        assert engine.offloading.served() == [handle]
        assert engine.executor.plan.num_offloaded > 0
        assert engine.target.plan == unmeasured_plan(engine.units, 0, 1)
    finally:
        engine.close()
