"""An engine and its policy together: who may begin, who comes back, what is promised, what is refused at the start."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from selectn_core.config import SloConfig
from selectn_core.control.controller import Controller
from selectn_core.control.steering import Steering, load_of
from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import Chunk, StepLog, StepShape
from selectn_core.memory.plan_memory import unmeasured_plan
from selectn_core.offload.control import Decision, LinkShare
from selectn_core.profiling.record_cache import performance_record
from selectn_core.requests.handle import RequestHandle, TokenEvent
from selectn_core.requests.objectives import Objectives
from selectn_core.requests.sampling import SamplingParams
from tests.support.engines import CheckedEngine, engine_config, generate, greedy, make_prompts, memory_gib_for
from tests.support.tiny_models import tiny_model

LOOSE = SloConfig(ttft_ms=60_000.0, tpot_ms=60_000.0)
OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.2)


pytestmark = pytest.mark.usefixtures("record_cache")


def steered(
    slo: SloConfig = LOOSE, *, policy: str = "select-n", interval: int | None = None, **config
) -> CheckedEngine:
    made = engine_config("auto", **config)
    offload = replace(made.offload, policy=policy, interval=interval)
    engine = CheckedEngine(tiny_model(), replace(made, slo=slo, offload=offload))
    try:
        engine.steer(performance_record(engine, budget_s=1.0))
    except BaseException:
        engine.close()
        raise
    return engine


def controller_of(engine: Engine) -> Controller:
    control = engine.offloading.control
    assert isinstance(control, Steering)
    return control.controller


def controller_share(engine: Engine) -> float:
    snapshot = engine.offloading.control.snapshot()
    assert snapshot is not None
    return snapshot["controller_share"]


def a_handle(num_tokens: int, tpot_s: float | None = None) -> RequestHandle:
    handle = RequestHandle("r", 10, cancel=lambda ticket: None)
    handle.max_total_tokens += 50
    if num_tokens:
        handle.push(TokenEvent(token_ids=(1,) * num_tokens))
    if tpot_s is not None:
        handle.objectives = replace(OBJECTIVES, tpot_s=tpot_s)
    return handle


# -- who is in flight -----------------------------------------------------------------------------------------------


def test_nobody_is_left_out_of_the_load() -> None:
    """One decodes, one computes its prompt; of the preempted one is computed again, two wait, one of them swapped."""
    handles = {"decodes": a_handle(3), "swapped": a_handle(4), "dropped": a_handle(4), "again": a_handle(4)}
    handles |= {"prefills": a_handle(0), "new": a_handle(0)}
    progress = {"prefills": Chunk(7, 3), "decodes": Chunk(0, 13), "again": Chunk(6, 8)}
    backlog = {"swapped": Chunk(1, 13), "dropped": Chunk(14, 0), "new": Chunk(10, 0)}
    load = load_of(handles, progress, backlog, OBJECTIVES)
    assert len(load.decoding) == 1
    assert [each.prefill_tokens for each in load.waiting] == [7, 6, 1, 14, 10]
    assert [each.num_past for each in load.waiting] == [3, 8, 13, 0, 0]
    assert [each.ticket for each in load.waiting] == ["prefills", "again", "swapped", "dropped", "new"]
    assert load.num_begun == 2
    assert [each.deadline_s < 1e9 for each in load.waiting] == [True, False, False, False, True]


def test_of_those_that_cannot_begin_anyway_no_more_are_looked_at() -> None:
    """A step's work must not grow with a queue of thousands. Those that hold KV are all there."""
    asked = []

    def kv_bytes(handle: RequestHandle) -> int:
        asked.append(handle)
        return 0

    handles = {f"new{i}": a_handle(0) for i in range(1000)} | {"decodes": a_handle(3), "prefills": a_handle(0)}
    progress = {"decodes": Chunk(0, 13), "prefills": Chunk(7, 3)}
    load = load_of(handles, progress, {}, OBJECTIVES, kv_bytes, most_new=3)
    assert [each.ticket for each in load.waiting] == ["prefills", "new0", "new1", "new2"]
    assert len(load.decoding) == 1
    assert asked == [handles["new0"], handles["new1"], handles["new2"]]


def test_the_load_says_how_many_draw_their_tokens() -> None:
    """Of those who hold KV. Where nobody is in flight all do: it is the default of those who come."""
    handles = {name: a_handle(num_tokens) for name, num_tokens in (("a", 3), ("b", 3), ("c", 0), ("d", 0))}
    for handle in handles.values():
        handle.params = SamplingParams()
    handles["a"].params = SamplingParams(temperature=1.0)
    handles["c"].params = SamplingParams(temperature=1.0, top_p=0.5)
    load = load_of(handles, {"a": Chunk(0, 4), "b": Chunk(0, 4)}, {}, OBJECTIVES)
    assert load.sampling_in(StepShape.decode(4, 10)) == StepShape.decode(4, 10).sampling(2, 0)
    assert load.joined_by(load.waiting[:1]).decode_step(3, 10) == StepShape.decode(3, 10).sampling(2, 1)
    assert load.joined_by(load.waiting).decode_step(4, 10) == StepShape.decode(4, 10).sampling(2, 1)
    waiting = load_of(handles, {}, {}, OBJECTIVES)  # nobody runs: all who wait
    assert waiting.sampling_in(StepShape.decode(4, 10)) == StepShape.decode(4, 10).sampling(2, 1)
    assert waiting.joined_by(waiting.waiting[1:2]).decode_step(1, 10) == StepShape.decode(1, 10).sampling(0)
    assert load_of({}, {}, {}, OBJECTIVES).sampling_in(StepShape.decode(3, 10)) == StepShape.decode(3, 10).sampling()


@pytest.mark.parametrize("kv_gib", [0.0, 1.0])
def test_a_preempted_request_goes_on_while_others_decode(kv_gib: float) -> None:
    """It waits until one of those that run has ended, as after every preemption, and not for all of them."""
    prompts = make_prompts([4, 5, 26])
    (expected,) = generate("llama", engine_config(0), prompts=prompts[2:])
    engine = steered(kv_gib=kv_gib)
    long, short = engine.submit(prompts[0], greedy(120)), engine.submit(prompts[1], greedy(16))
    preempted = engine.submit(prompts[2], greedy())

    def preempt_once(_: Engine) -> None:
        if preempted.num_tokens == 3 and not engine.batching.swap.num_preemptions:
            assert engine.batching.preempt_newest()

    engine.before_schedule = preempt_once
    with engine:
        assert preempted.result() == expected
        assert short.num_tokens == 16
        assert long.num_tokens < 60
        long.cancel()
    assert engine.batching.swap.num_preemptions == 1
    assert engine.batching.swap.num_swapped == (1 if kv_gib else 0)


def test_a_preempted_request_that_is_alone_is_not_computed_again_token_by_token() -> None:
    engine = steered(kv_gib=0.0)
    prompts = make_prompts([4, 26])
    short, preempted = engine.submit(prompts[0], greedy(24)), engine.submit(prompts[1], greedy())

    def preempt_once(_: Engine) -> None:
        if preempted.num_tokens == 3 and not engine.batching.swap.num_preemptions:
            assert engine.batching.preempt_newest()

    engine.before_schedule = preempt_once
    with engine:
        short.result()
        steps = engine.steps.num_steps
        preempted.result()
    assert engine.batching.swap.num_preemptions == 1
    assert engine.steps.num_steps - steps <= 2 + 12  # 29 tokens, 16 in a step, and those that were still to come


def test_no_more_begin_in_a_step_than_may() -> None:
    """Whatever the budget of tokens: the prompts are equal, and all but the last token of each is in the cache."""

    class OneByOne(CheckedEngine):
        def _before_schedule(self) -> list[str]:
            return super()._before_schedule()[:1]

    engine = OneByOne(tiny_model(), engine_config(0))
    (prompt,) = make_prompts([33])
    active: list[int] = []
    engine.before_step = lambda each: active.append(each.batching.num_active)
    with engine:
        engine.submit(prompt, greedy(1)).result()
        active.clear()
        for handle in [engine.submit(prompt, greedy()) for _ in range(6)]:
            handle.result()
    assert max(active) == 6
    assert all(after - before <= 1 for before, after in zip([0, *active], active, strict=False))


# -- what is promised -----------------------------------------------------------------------------------------------


def test_tighter_objectives_lower_what_an_idle_engine_promises() -> None:
    engine = steered(kv_tokens=64)
    try:
        before = engine.reachable_kv_tokens()
        engine.set_objectives(SloConfig(ttft_ms=60_000.0, tpot_ms=1e-3))
        assert engine.reachable_kv_tokens() < before
        assert controller_of(engine).percentile == 99.0
        engine.set_objectives(replace(LOOSE, percentile=50.0))
        assert engine.reachable_kv_tokens() == before
        assert controller_of(engine).percentile == 50.0
        assert controller_of(engine).ttft_s == 60.0
    finally:
        engine.close()


def test_objectives_that_the_policy_refuses_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = steered(kv_tokens=64)

    def refuses(objectives: object) -> None:
        raise ConfigError("refused")

    try:
        before = engine.objectives, engine.config.slo
        monkeypatch.setattr(engine.offloading.control, "_policy", refuses)
        with pytest.raises(ConfigError, match="refused"):
            engine.set_objectives(SloConfig(ttft_ms=1.0, tpot_ms=1.0))
        assert (engine.objectives, engine.config.slo) == before
    finally:
        engine.close()


def test_one_that_asks_for_little_promises_nothing_to_those_who_come_after_it() -> None:
    engine = steered(SloConfig(ttft_ms=60_000.0, tpot_ms=1e-3, loosest=1e9), kv_tokens=64)
    try:
        before = engine.reachable_kv_tokens()
        slow = a_handle(3, tpot_s=1e3)
        engine.offloading.control.admit({slow.ticket: slow}, {slow.ticket: Chunk(0, 13)}, {})
        assert engine.reachable_kv_tokens() == before
    finally:
        engine.close()


def test_one_that_waits_takes_nothing_from_what_is_promised() -> None:
    """However tight its objective is: only those that hold KV count, and of them those whose objective can be kept."""
    engine = steered(kv_tokens=64)
    try:
        before = engine.reachable_kv_tokens()
        alone_s = controller_of(engine).times.expected_s(StepShape.decode(1, 16))
        for tpot_s in (2 * alone_s, 1e-9):
            tight = a_handle(0, tpot_s=tpot_s)
            slow = a_handle(3, tpot_s=60.0)
            handles = {slow.ticket: slow, tight.ticket: tight}
            engine.offloading.control.admit(handles, {slow.ticket: Chunk(0, 13)}, {tight.ticket: Chunk(10, 0)})
            assert engine.reachable_kv_tokens() == before
        engine.offloading.control.admit(handles, {slow.ticket: Chunk(0, 13), tight.ticket: Chunk(10, 0)}, {})
        assert engine.reachable_kv_tokens() == before  # it is missed in any case
    finally:
        engine.close()


def test_the_longest_request_that_is_taken_fits_whatever_the_policy_plans() -> None:
    engine = steered(memory_gib=1 / 1024, kv_tokens=64, max_batch_tokens=16)
    try:
        most = engine.target.most_kv_sectors
        for num_slots in range(1, 5):
            engine.target.aim_at(unmeasured_plan(engine.units, 4, num_slots))
            assert engine.target.most_kv_sectors == most
            plan = engine.target.with_kv(most)
            assert engine.target.kv_sectors(plan) >= most
    finally:
        engine.close()


def test_a_plan_that_frees_too_little_is_followed_with_more() -> None:
    engine = steered(memory_gib=memory_gib_for(3))
    try:
        assert engine.target.fewest(1).num_offloaded > 0
        engine.target.aim_at(OffloadPlan(offloaded=(), num_slots=1, num_units=len(engine.units)))
        assert engine.target.with_kv(0) == engine.target.fewest(1)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("policy", "interval", "num_homes", "message"),
    [
        ("group", 5, 3, r"offload\.policy=group and offload\.interval=5 is not possible.*at least 3 must be offloaded"),
        ("all", None, 1, r"offload\.policy=all is not possible.*no number of them would fit"),
    ],
)
def test_a_policy_by_name_that_leaves_too_much_on_the_device_is_refused_at_the_start(
    policy, interval, num_homes, message
) -> None:
    with pytest.raises(ConfigError, match=message):
        steered(policy=policy, interval=interval, memory_gib=memory_gib_for(num_homes), num_slots=1)


# -- what is said and learned ---------------------------------------------------------------------------------------


def test_the_share_of_deciding_is_of_all_steps_and_not_of_the_last() -> None:
    with steered() as engine:
        engine.submit(make_prompts()[0], greedy()).result()
    before = controller_share(engine)
    engine.steps = StepLog()
    assert 0 < controller_share(engine) == before


def test_what_nothing_has_changed_for_is_not_decided_again_and_new_orders_are_followed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with steered() as engine:
        decide = Mock(wraps=controller_of(engine).decide)
        monkeypatch.setattr(controller_of(engine), "decide", decide)
        engine.submit(make_prompts()[0], greedy(60)).result()
        num_steps = engine.steps.num_steps
        assert 1 <= decide.call_count < 0.8 * num_steps
        engine.offloading.control.set_link_share(
            LinkShare(bytes_per_s=1e9, guaranteed_bytes_per_s=1e9, max_offloaded_bytes=0)
        )
        engine.submit(make_prompts()[0], greedy(5)).result()
        assert {record.num_offloaded for record in list(engine.steps.records)[num_steps + 1 :]} == {0}


@pytest.mark.parametrize("is_late", [False, True])
def test_orders_that_come_while_a_step_is_decided_are_followed_in_the_next(
    monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Between the looks at the requests and at the step; and, late, from another thread while the plan is chosen."""
    none_at_all = LinkShare(bytes_per_s=1e9, guaranteed_bytes_per_s=1e9, max_offloaded_bytes=0)
    with steered() as engine:
        control = engine.offloading.control
        asked_of: Any = controller_of(engine) if is_late else control
        decide, ordered_at = asked_of.decide, list[int]()

        def decide_meanwhile(*asked: Any) -> Decision:
            if engine.steps.num_steps >= 12 and not ordered_at:
                ordered_at.append(engine.steps.num_steps)
                thread = threading.Thread(target=control.set_link_share, args=(none_at_all,))
                thread.start()
                thread.join(0.1)
            return decide(*asked)

        monkeypatch.setattr(asked_of, "decide", decide_meanwhile)
        engine.submit(make_prompts()[0], greedy(30)).result()
        offloaded = [record.num_offloaded for record in engine.steps.records]
        assert offloaded[ordered_at[0] - 1] > 0
        assert set(offloaded[ordered_at[0] + 1 :]) == {0}


def test_a_better_plan_is_looked_for_on_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with steered() as engine:
        controller = controller_of(engine)
        look, threads = controller._seen, list[str]()

        def seen(*asked: Any) -> OffloadPlan | None:
            threads.append(threading.current_thread().name)
            return look(*asked)

        monkeypatch.setattr(controller, "_seen", seen)
        engine.submit(make_prompts()[0], greedy(30)).result()
        assert any(name.startswith("look-for-a-better-plan") for name in threads)


def test_a_look_that_fails_is_said_once_and_requests_are_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with steered() as engine:
        control = engine.offloading.control

        def fail() -> None:
            raise ValueError("injected")

        assert isinstance(control, Steering)
        monkeypatch.setattr(control.controller, "look", fail)
        for _ in range(3):
            control._look()
        assert sum("looking for a better plan has failed" in each.message for each in caplog.records) == 1
        monkeypatch.undo()
        assert len(engine.submit(make_prompts()[0], greedy(5)).result()) == 5


def test_a_link_that_has_become_slow_is_not_thought_good_for_swapping() -> None:
    with steered() as engine:
        engine.submit(make_prompts()[3], greedy()).result()
        assert engine._swap_is_cheaper(64, 1)
        engine.set_link_share(LinkShare(bytes_per_s=1.0, guaranteed_bytes_per_s=1.0))
        assert not engine._swap_is_cheaper(64, 1 << 20)
