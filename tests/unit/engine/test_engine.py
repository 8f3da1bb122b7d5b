"""The engine's life: requests in and out, failures and recovery, memory, and what it refuses."""

from __future__ import annotations

import gc
import json
import math
import threading
import weakref
from typing import Any

import pytest
import torch

from selectn_core.config import MAX_SLOTS, SloConfig
from selectn_core.engine.engine import Engine
from selectn_core.errors import (
    ConfigError,
    DeviceMemoryExceeded,
    EngineOverloaded,
    EngineUnavailable,
    RequestError,
)
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.sampling import SamplingParams
from tests.support.engines import CheckedEngine, engine_config, generate, greedy, make_prompts, memory_gib_for
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, VOCAB_SIZE, tiny_model
from tests.support.waiting import wait_until

PROMPT = make_prompts([5])[0]
GIB = 1 << 30
TIMEOUT_S = 120


def tiny_engine(num_offloaded: Any = 2, num_slots: int = 1, **settings: Any) -> CheckedEngine:
    return CheckedEngine(tiny_model(), engine_config(num_offloaded, num_slots, **settings))


class FailingLayer:
    """Raises in the forward of one layer while it has failures left."""

    def __init__(self, engine: Engine, layer: int, num_failures: int) -> None:
        self.num_failures = num_failures
        engine.units[layer].module.register_forward_pre_hook(self._maybe_fail)

    def _maybe_fail(self, *_: object) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise ValueError("injected into a layer")


# -- supervision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_offloaded", [0, 2, 5])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_error_fails_the_requests_in_flight_and_no_later_one(num_offloaded: int, layer: int) -> None:
    expected = generate("llama", engine_config(0), prompts=[PROMPT])
    engine = tiny_engine(num_offloaded)
    FailingLayer(engine, layer, num_failures=1)
    in_flight = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        for handle in in_flight:
            events = list(handle)
            assert events[-1].finish_reason == "error"
            assert "injected into a layer" in (events[-1].error or "")
        wait_until(lambda: engine.batching.fatal_error is None, TIMEOUT_S, "it has restarted")
        assert [engine.submit(PROMPT, greedy()).result()] == expected
        assert engine.is_healthy()
    engine.batching.check_integrity()


def test_an_error_in_mid_generation_leaves_no_wrong_kv_behind() -> None:
    """A step that failed has written part of its keys; the prefix cache must not offer them."""
    (prompt,) = make_prompts([32])
    expected = generate("llama", engine_config(0), prompts=[prompt])
    engine = tiny_engine(3)
    steps_left = 5

    def fail_in_the_fifth_step(*_: object) -> None:
        nonlocal steps_left
        steps_left -= 1
        if steps_left == 0:
            raise ValueError("injected into a layer")

    engine.units[3].module.register_forward_pre_hook(fail_in_the_fifth_step)
    with engine:
        with pytest.raises(RuntimeError, match="injected"):
            engine.submit(prompt, greedy()).result()
        wait_until(lambda: engine.batching.fatal_error is None, TIMEOUT_S, "it has restarted")
        assert [engine.submit(prompt, greedy()).result()] == expected


def test_an_engine_that_keeps_failing_gives_up() -> None:
    with tiny_engine() as engine:
        FailingLayer(engine, 1, num_failures=1000)
        num_submitted = 0
        while engine.is_healthy():
            try:
                handle = engine.submit(PROMPT, greedy())
            except EngineUnavailable:  # between a failure and the restart
                continue
            num_submitted += 1
            assert list(handle)[-1].finish_reason == "error"
        assert num_submitted > 1
        assert engine.snapshot()["state"] == "failed"
        with pytest.raises(EngineUnavailable, match="failed"):
            engine.submit(PROMPT, greedy())


# -- cancelling and closing -------------------------------------------------------------------------------------


def test_cancelling_in_mid_generation_frees_the_kv_cache() -> None:
    engine = tiny_engine()
    with engine:
        handle = engine.submit(PROMPT, greedy(200))
        events = iter(handle)
        assert next(events).finish_reason is None
        handle.cancel()
        handle.cancel()
        assert [event.finish_reason for event in events][-1] == "cancelled"
        wait_until(
            lambda: engine.snapshot()["running"] == 0 and engine.batching.num_active == 0, TIMEOUT_S, "nothing runs"
        )
        assert engine.submit(PROMPT, greedy(1)).result()
    engine.batching.check_integrity()


def test_cancelling_one_request_leaves_the_others_alone() -> None:
    prompts = make_prompts()
    expected = generate("llama", engine_config(0), prompts=prompts)
    with tiny_engine() as engine:
        handles = [engine.submit(prompt, greedy()) for prompt in prompts]
        doomed = engine.submit(PROMPT, greedy(200))
        next(iter(doomed))
        doomed.cancel()
        assert [handle.result() for handle in handles] == expected


def test_cancelling_before_the_start() -> None:
    engine = tiny_engine()
    handle = engine.submit(PROMPT, greedy())
    handle.cancel()
    assert [event.finish_reason for event in handle] == ["cancelled"]
    with engine:
        assert engine.submit(PROMPT, greedy(3)).result()
    engine.batching.check_integrity()


def test_an_id_may_be_used_again_at_once_after_cancelling() -> None:
    expected = generate("llama", engine_config(0), prompts=[PROMPT])
    engine = tiny_engine()
    engine.submit(PROMPT, greedy(), request_id="again").cancel()
    handle = engine.submit(PROMPT, greedy(), request_id="again")
    other = engine.submit(PROMPT, greedy(), request_id="other")
    with engine:
        assert [handle.result()] == expected
        assert [other.result()] == expected


def test_closing_fails_what_is_left() -> None:
    engine = tiny_engine()
    engine.start()
    handles = [engine.submit(PROMPT, greedy(200)) for _ in range(12)]
    engine.close()
    engine.close()
    for handle in handles:
        assert list(handle)[-1].finish_reason == "error"
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.submit(PROMPT, greedy())
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.start()
    assert not engine.is_healthy()


def test_closing_without_a_start_fails_what_was_submitted() -> None:
    engine = tiny_engine()
    handle = engine.submit(PROMPT, greedy())
    engine.close()
    assert list(handle)[-1].finish_reason == "error"


@pytest.mark.parametrize("start", [True, False])
def test_no_thread_is_left_after_closing(start: bool) -> None:
    before = set(threading.enumerate())
    engine = tiny_engine()
    if start:
        with engine:
            engine.submit(PROMPT, greedy()).result()
    else:
        engine.close()
    assert set(threading.enumerate()) <= before


def test_no_thread_is_left_after_an_engine_that_could_not_be_built() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError):
        tiny_engine(NUM_LAYERS + 1)
    assert set(threading.enumerate()) <= before


def test_closing_while_generation_fails_does_not_hang() -> None:
    """The supervisor must not start a new generation thread behind the back of close()."""
    for _ in range(5):
        engine = tiny_engine()
        FailingLayer(engine, 1, num_failures=1000)
        engine.start()
        engine.submit(PROMPT, greedy())
        engine.close()
        assert not engine.is_healthy()


def test_closing_between_a_failure_and_the_restart_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """close() comes when the supervisor has seen the failure and not yet started the next thread."""
    closers: list[threading.Thread] = []
    engine = CheckedEngine(tiny_model(), engine_config(2, 1))
    remove_all = engine.requests.remove_all

    def closes_before_restart() -> list[RequestHandle]:
        handles = remove_all()
        if threading.current_thread().name == "selectn-supervisor":
            closer = threading.Thread(target=engine.close)
            closer.start()
            closers.append(closer)  # then: it is joined as soon as it is here
            # Its second look at the state: it has found nothing to stop, and waits for the supervisor.
            wait_until(
                lambda: not engine.is_healthy() and engine.model.config._attn_implementation == "sdpa",
                TIMEOUT_S,
                "the other one is closing",
            )
        return handles

    monkeypatch.setattr(engine.requests, "remove_all", closes_before_restart)
    FailingLayer(engine, 1, num_failures=1)
    engine.start()
    with pytest.raises(RuntimeError, match="injected"):
        engine.submit(PROMPT, greedy()).result()
    wait_until(lambda: closers, TIMEOUT_S, "it is being closed")
    closers[0].join()
    assert "selectn-supervisor" not in {thread.name for thread in threading.enumerate()}


def test_an_engine_starts_once() -> None:
    with tiny_engine() as engine, pytest.raises(EngineUnavailable, match="running"):
        engine.start()


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [
        ([], 1, "prompt"),
        ([VOCAB_SIZE], 1, "prompt"),
        ([3, -1], 1, "prompt"),
        ([3] * 600, 1, "prompt"),
        ([3] * 10, 600, "max_tokens"),
    ],
)
def test_prompts_that_cannot_be_served(prompt: list[int], max_tokens: int, field: str) -> None:
    with tiny_engine() as engine:
        with pytest.raises(RequestError) as refused:
            engine.submit(prompt, greedy(max_tokens))
        assert refused.value.field == field
        assert engine.snapshot()["waiting"] == 0


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    with tiny_engine() as engine:
        handle = engine.submit(PROMPT, greedy(100), request_id="mine")
        with pytest.raises(RequestError) as refused:
            engine.submit(PROMPT, greedy(), request_id="mine")
        assert refused.value.field == "request_id"
        handle.result()
        assert len(engine.submit(PROMPT, greedy(), request_id="mine").result()) == 12


def test_a_full_queue_is_refused() -> None:
    engine = tiny_engine(max_requests=2, max_waiting=3)
    handles = [engine.submit(PROMPT, greedy(3)) for _ in range(5)]
    with pytest.raises(EngineOverloaded, match=r"batch\.max_waiting=3"):
        engine.submit(PROMPT, greedy(3))
    with engine:
        assert all(len(handle.result()) == 3 for handle in handles)
        engine.submit(PROMPT, greedy(3)).result()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_tokens", [48, 200])
def test_the_longest_request_that_is_taken_is_served(family: str, kv_tokens: int) -> None:
    engine = CheckedEngine(tiny_model(family), engine_config(2, 1, kv_tokens=kv_tokens))
    limit = engine.max_model_len
    (prompt,) = make_prompts([limit // 2])
    with pytest.raises(RequestError):
        engine.submit(prompt, greedy(limit - len(prompt) + 1))
    assert limit >= min(kv_tokens, 256)
    with engine:
        # Twice: the second finds the cache full of blocks that the first has left behind.
        handles = [engine.submit(prompt, greedy(limit - len(prompt))) for _ in range(2)]
        assert [len(handle.result()) for handle in handles] == [limit - len(prompt)] * 2
    engine.batching.check_integrity()


def test_requests_that_outgrow_the_cache_together_are_all_served() -> None:
    """They are preempted and come back; their tokens stay those of an engine with room."""
    prompts = make_prompts([20, 24, 18, 22])
    roomy = generate("llama", engine_config(0, kv_tokens=1024, prefix_sharing=False), prompts=prompts)
    tight = engine_config(2, 1, kv_tokens=64, prefix_sharing=False)
    assert generate("llama", tight, prompts=prompts) == roomy


# -- finishing --------------------------------------------------------------------------------------------------


def test_generation_ends_at_a_stop_token_or_the_length() -> None:
    ((*_, third),) = ((tokens[0], tokens[1], tokens[2]) for tokens in [generated_tokens()])
    with tiny_engine() as engine:
        stopped = list(engine.submit(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(third,))))
        full = list(engine.submit(PROMPT, greedy()))
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].token_ids[-1] == third
    assert full[-1].finish_reason == "length"
    assert sum(len(event.token_ids) for event in full) == 12


def test_the_models_end_token_ends_generation_unless_it_is_ignored() -> None:
    tokens = generated_tokens()
    loaded = tiny_model()
    loaded.model.generation_config.eos_token_id = [tokens[4], 130]
    with CheckedEngine(loaded, engine_config(2, 1)) as engine:
        assert engine.default_eos_ids == (tokens[4], 130)
        assert engine.submit(PROMPT, SamplingParams(max_tokens=12)).result() == tokens[: tokens.index(tokens[4]) + 1]
        assert engine.submit(PROMPT, greedy()).result() == tokens


def generated_tokens() -> list[int]:
    (tokens,) = generate("llama", engine_config(0), prompts=[PROMPT])
    return tokens


def test_sampled_and_greedy_requests_share_a_batch() -> None:
    prompts = make_prompts()
    sampled = SamplingParams(max_tokens=12, temperature=1.5, seed=3, ignore_eos=True)
    with tiny_engine() as engine:
        alone = engine.submit(prompts[0], sampled).result()
    engine = tiny_engine()
    handles: list[RequestHandle] = [engine.submit(prompts[0], sampled)]
    handles += [engine.submit(prompt, greedy()) for prompt in prompts]
    with engine:
        results = [handle.result() for handle in handles]
    assert results[0] == alone
    assert results[0] != results[1], "sampling at 1.5 would hardly be greedy"
    assert results[1:] == generate("llama", engine_config(0), prompts=prompts)


def test_sampled_text_is_the_same_with_offloading_and_its_rows_are_counted() -> None:
    sampled = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=-4, ignore_eos=True)
    texts = []
    for num_offloaded in (0, 4):
        engine = CheckedEngine(tiny_model(), engine_config(num_offloaded, 1))
        handles = [engine.submit(prompt, sampled) for prompt in make_prompts((4, 5))]
        handles.append(engine.submit(PROMPT, greedy()))
        with engine:
            texts.append([handle.result() for handle in handles])
        last = engine.steps.records[-1].shape
        assert (last.num_requests, last.num_sampled, last.num_truncated) == (3, 2, 2)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_whose_logits_are_not_finite_fails_with_a_word_and_no_other_does(temperature: float) -> None:
    """A damaged row of the embedding: whoever uses that token gets an error, not the token 0 for ever."""
    loaded, damaged = tiny_model(), VOCAB_SIZE - 2
    loaded.model.get_input_embeddings().weight[damaged] = math.nan
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=1, ignore_eos=True)
    prompts = [prompt for prompt in make_prompts() if damaged not in prompt]
    with CheckedEngine(loaded, engine_config(2, 1)) as engine:
        expected = engine.submit(prompts[0], params).result()
        handles = [engine.submit(prompts[0], params), engine.submit([*prompts[1], damaged, 7], params)]
        assert handles[0].result() == expected
        events = list(handles[1])
        with pytest.raises(RuntimeError, match="not finite"):  # nothing of the first one was kept for its prefix
            engine.submit([*prompts[1], damaged, 7], params).result()
        assert engine.submit(prompts[1], params).result()
    assert [event.finish_reason for event in events] == ["error"]
    assert events[0].token_ids == ()
    assert "model.dtype" in (events[0].error or "")
    engine.batching.check_integrity()


# -- interval and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_offloaded", "num_slots"), [(-1, 1), (NUM_LAYERS + 1, 1), (2, 0), (2, MAX_SLOTS + 1)])
def test_intervals_out_of_range_are_refused(num_offloaded: int, num_slots: int) -> None:
    with tiny_engine() as engine:
        with pytest.raises(ConfigError, match="not allowed"):
            engine.set_num_offloaded(num_offloaded, num_slots)
        assert engine.executor.plan.num_offloaded == 2


def test_the_interval_changes_with_the_next_step() -> None:
    with tiny_engine(2, 1) as engine:
        engine.submit(PROMPT, greedy(2)).result()
        engine.set_num_offloaded(4, 2)
        engine.submit(PROMPT, greedy(2)).result()
        snapshot = engine.snapshot()
    assert (snapshot["num_offloaded"], snapshot["num_slots"]) == (4, 2)
    assert [change[1] for change in snapshot["interval_history"]] == [2, 4]


@pytest.mark.parametrize("num_homes", [2, 3, 4, 5])
def test_auto_offloads_the_fewest_layers_that_fit(num_homes: int) -> None:
    engine = tiny_engine("auto", 1, memory_gib=memory_gib_for(num_homes))
    plan = engine.executor.plan
    assert plan.num_offloaded == (0 if num_homes == NUM_LAYERS else NUM_LAYERS - num_homes + 1)
    with engine:
        assert engine.submit(PROMPT, greedy()).result() == generated_tokens()
        if plan.num_offloaded:
            with pytest.raises(ConfigError, match="num_offloaded=0"):
                engine.set_num_offloaded(0)
        assert engine.device.allocated_bytes <= engine.device.capacity_bytes


def test_a_device_on_which_nothing_fits_names_what_to_change() -> None:
    memory_gib = memory_gib_for(0)
    with pytest.raises(DeviceMemoryExceeded, match=r"device\.memory_gib.*batch\.kv_tokens.*offload\.num_slots"):
        tiny_engine("auto", 1, memory_gib=memory_gib)


def test_a_number_of_layers_that_does_not_fit_is_not_made_to_fit() -> None:
    memory_gib = memory_gib_for(3)
    with pytest.raises((ConfigError, DeviceMemoryExceeded), match=r"num_offloaded=1|1 of 5"):
        tiny_engine(1, 1, memory_gib=memory_gib)


def test_a_kv_cache_that_does_not_fit_says_so() -> None:
    with pytest.raises(DeviceMemoryExceeded, match="KV cache"):
        tiny_engine("auto", 1, memory_gib=3e-4)


def test_layers_on_the_host_leave_their_memory_to_the_kv_cache() -> None:
    sizes, allocated = {}, set()
    for num_offloaded in (0, 3, 5):
        engine = tiny_engine(num_offloaded, 1)
        sizes[num_offloaded] = engine.snapshot()["kv_bytes"]
        allocated.add(engine.device.allocated_bytes)
        engine.close()
    layer = engine.arena.round_up(engine.units[0].num_bytes)
    assert sizes[3] - sizes[0] == 2 * layer, "three away, one slot"
    assert sizes[5] - sizes[0] == 4 * layer
    assert len(allocated) == 1, "one allocation, whatever the interval"


def test_closing_gives_the_layers_memory_back_and_leaves_the_model_usable() -> None:
    engine = tiny_engine(2)
    with engine:
        engine.submit(PROMPT, greedy()).result()
    assert engine.arena.weight_bytes == 0
    expected = tiny_model().model(torch.tensor([PROMPT])).logits
    assert torch.equal(engine.model(torch.tensor([PROMPT])).logits, expected)


def test_snapshot_is_json_and_adds_up() -> None:
    with tiny_engine(3, 2) as engine:
        engine.submit(PROMPT, greedy()).result()
        snapshot = json.loads(json.dumps(engine.snapshot(), allow_nan=False))
    assert snapshot["state"] == "running"
    assert snapshot["provenance"] == "emulated"
    assert (snapshot["num_layers"], snapshot["num_offloaded"], snapshot["num_slots"]) == (NUM_LAYERS, 3, 2)
    assert snapshot["host_bytes"] == sum(unit.num_bytes for unit in engine.units)
    assert snapshot["offloaded_bytes"] == 3 * engine.units[0].num_bytes
    assert 0 < snapshot["device_bytes"] <= snapshot["device_capacity_bytes"]
    assert snapshot["link_bytes"] > 3 * engine.units[0].num_bytes * snapshot["num_steps"] / 2
    assert (snapshot["running"], snapshot["waiting"]) == (0, 0)


def test_snapshot_before_the_first_step_is_json() -> None:
    engine = tiny_engine(0)
    json.dumps(engine.snapshot(), allow_nan=False)
    engine.submit(PROMPT, greedy())
    assert engine.snapshot()["waiting"] == 1
    engine.close()


def test_the_slo_is_part_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"slo\.ttft_ms"):
        SloConfig(ttft_ms=0)


def test_memory_of_a_closed_engine_can_be_collected() -> None:
    engine = tiny_engine()
    with engine:
        engine.submit(PROMPT, greedy()).result()
    closed = weakref.ref(engine)
    del engine
    gc.collect()
    assert closed() is None
