"""The whole engine on logical streams: no two accesses to the same bytes without an order, and every order is needed.

`make test ARGS='tests/contract/test_streams.py'`; docs/gpu.md says what this can show and what it cannot.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError, DeviceMemoryExceeded, EngineUnavailable
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.steps import StepShape
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.sampling import SamplingParams
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.units import find_units
from tests.standins.logical_cuda import LogicalDevice, logical_cuda
from tests.support.engines import engine_config, make_prompts
from tests.support.mutants import Mutant, modules_of, mutants_of, source_of
from tests.support.streams import Checker, Event, Race, Stream
from tests.support.tiny_models import NUM_LAYERS, tiny_model
from tests.support.waiting import wait_until

# Modules whose waits order nothing on a device's streams, and why.
OTHER_WAITS = {
    "selectn_core.device.emulated": "for threads",
    "selectn_core.profiling.profiler": "to take times",
    "selectn_core.profiling.sampling_times": "to take times",
    "selectn_core.profiling.unit_timer": "to take times",
    "selectn_core.requests.handle": "for tokens",
}
# Orders that nothing would miss, and why.
EQUIVALENT = {
    "device.cuda.CudaDevice.peak_bytes: synchronize": "no order: what is still in use could not be given back",
}
PROMPTS = make_prompts((3, 9, 17, 26, 33, 41))
NUM_ACTIONS = 40
FAILING_FORWARD = 3  # after it the plan changes before anything else
MOVES, SWAPS, COMPACTS = "_move_blocks", "_copy", "_compact"
CHANGES, HOST_WAITS = "changes of plan", "host waits in a change of plan"

Act = Callable[["ActingEngine"], None]


class ActingEngine(Engine):
    """Calls `act` before a step is scheduled and when it is planned, and `act_late` when pages have moved for it."""

    act: Act | None = None
    act_late: Act | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.happened: Counter[str] = Counter()
        super().__init__(*args, **kwargs)
        for owner, name in ((self.batching.pages, MOVES), (self.batching.swap, SWAPS), (self.executor, COMPACTS)):
            self._count_calls(owner, name)

        self._note_host_waits()

    def _note_host_waits(self) -> None:
        """Counts those in a change of plan, KV pages that make way for it and homes that move together included."""
        assert isinstance(self.device, LogicalDevice)
        checker, apply_plan = self.device.checker, self.executor.apply_plan

        def noted() -> None:
            before, num_changes = checker.num_host_waits, self.executor.stats.num_plan_changes
            apply_plan()
            self.happened[CHANGES] += self.executor.stats.num_plan_changes - num_changes
            self.happened[HOST_WAITS] += checker.num_host_waits - before

        setattr(self.executor, "apply_plan", noted)  # noqa: B010

    def _count_calls(self, owner: object, name: str) -> None:
        method: Callable[..., object] = getattr(owner, name)

        def counted(*args: Any) -> object:
            self.happened[name] += name != MOVES or bool(args[1])  # blocks: there may be none
            return method(*args)

        setattr(owner, name, counted)

    def _before_schedule(self) -> list[str]:
        if self.act is not None:
            self.act(self)
        beginning = super()._before_schedule()
        if self.act_late is not None:
            self.act_late(self)
        return beginning

    def _on_step_planned(self, shape: StepShape) -> None:
        if self.act is not None:
            self.act(self)
        super()._on_step_planned(shape)

    def _swap_is_cheaper(self, num_tokens: int, num_bytes: int) -> bool:
        return True  # whatever this machine's times say


def any_plan(engine: Engine, rng: random.Random, *, at_least: int = 0, num_slots: int | None = None) -> OffloadPlan:
    num_units = len(engine.units)
    offloaded = sorted(rng.sample(range(num_units), rng.randint(at_least, num_units)))
    return OffloadPlan(offloaded=tuple(offloaded), num_slots=num_slots or rng.randint(1, 3), num_units=num_units)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests, plans, preemptions and cancellations by chance; methods in `happens` must be called on the way."""

    family: str
    happens: Sequence[str]
    seed: int = 0
    memory_share: float = 1.0  # of what everything would take
    kv_tokens: int = 48
    unit: str = "layer"
    prefix_sharing: bool = False
    executor_class: type[Executor] = OverlappedExecutor
    fails: bool = False  # one step does, halfway through
    is_crowded: bool = False  # requests fill what units leave, and a few of these come back at every step

    def __str__(self) -> str:
        return f"{self.family}{'-crowded' * self.is_crowded}{'-fails' * self.fails}"


SCENARIOS = [  # what finds most comes first
    Scenario(family="llama", happens=[MOVES, SWAPS], is_crowded=True),
    Scenario(family="qwen2_moe", happens=[MOVES, SWAPS], is_crowded=True),
    Scenario(family="llama", happens=[], fails=True),
    Scenario(family="llama_small_blocks", happens=[SWAPS], unit="block", prefix_sharing=True, is_crowded=True),
    Scenario(family="qwen2_mixed", happens=[MOVES, SWAPS], is_crowded=True, executor_class=SynchronousExecutor),
    Scenario(family="gemma2", happens=[SWAPS, "cancelled"], unit="block"),
]


class Serving:
    """A scenario, carried out once by a running engine."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario, self._random = scenario, random.Random(scenario.seed)
        self._loaded = tiny_model(scenario.family)
        self._handles: list[RequestHandle] = []
        self._num_actions = 0
        self.memory_share = scenario.memory_share
        self.happened: Counter[str] = Counter()

    def __call__(self, checker: Checker) -> None:
        it = self._scenario
        config = engine_config(
            "auto",
            1,
            kv_tokens=it.kv_tokens,
            page_size=4,
            max_requests=24 if it.is_crowded else 6,
            max_batch_tokens=32,
            prefix_sharing=it.prefix_sharing,
            unit=it.unit,
        )
        engine = ActingEngine(self._loaded, config, executor_class=it.executor_class)
        engine.act, engine.act_late, self.happened = self._act, self._act_late, engine.happened
        if it.fails:
            engine.units[len(engine.units) // 2].module.register_forward_hook(self._fail_once)
        for _ in range(12 if it.is_crowded else 5):
            self._submit(engine)
        with engine:
            position = 0
            while not checker.races and (position < len(self._handles) or self._num_actions < NUM_ACTIONS):
                if position == len(self._handles):
                    wait_until(lambda: self._is_taken(engine), 30, "an engine that has failed takes requests again")
                for event in self._handles[position]:
                    self.happened[event.finish_reason or "token"] += 1
                position += 1
        self.happened["computed"] = len(checker.streams[-1].operations)

    def _act(self, engine: ActingEngine) -> None:
        rng = self._random
        self._num_actions += 1
        if self._num_actions > NUM_ACTIONS:
            return
        has_just_failed = self._scenario.fails and self.happened["forward"] == FAILING_FORWARD
        action = 0.5 if has_just_failed else rng.random()
        if self._scenario.is_crowded:
            num_slots = 1 + self._num_actions % 3
            engine.set_plan(any_plan(engine, rng, at_least=len(engine.units) - 3, num_slots=num_slots))
        elif action < 0.2:
            self._submit(engine)
        elif action < 0.25:
            rng.choice(self._handles).cancel()
        elif action < 0.75:
            with suppress(ConfigError):  # more than the device's memory
                engine.set_plan(any_plan(engine, rng), urgent=rng.random() < 0.5)

    def _fail_once(self, *_: object) -> None:
        self.happened["forward"] += 1
        if self.happened["forward"] == FAILING_FORWARD:
            raise RuntimeError("a step that fails")

    def _is_taken(self, engine: ActingEngine) -> bool:
        with suppress(EngineUnavailable):
            self._submit(engine)
            return True
        return False

    def _act_late(self, engine: ActingEngine) -> None:
        """The newest is preempted when its pages have moved: weights took what KV can spare, and gave it back."""
        if self._random.random() < 0.2 and engine.batching.num_active > 1:
            with suppress(DeviceMemoryExceeded):  # there is enough, in pieces
                engine.arena.free(engine.arena.allocate(engine.arena.available_bytes(0), "pages that move"))
            engine.batching.preempt_newest()

    def _submit(self, engine: ActingEngine) -> None:
        rng = self._random
        params = SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=True, temperature=rng.choice([0.0, 0.0, 1.0]))
        self._handles.append(engine.submit(rng.choice(PROMPTS), params))


class Churn:
    """Several changes of plan between two steps, and steps that fill the KV cache, on the calling thread."""

    memory_share = 0.8

    def __init__(self, family: str, *, num_steps: int, most_changes: int, unit: str = "layer") -> None:
        self._loaded, self._unit = tiny_model(family), unit
        self._num_steps, self._most_changes = num_steps, most_changes
        self.happened: Counter[str] = Counter()

    def __call__(self, checker: Checker) -> None:
        config = engine_config("auto", 1, kv_tokens=16, page_size=4, max_requests=6, unit=self._unit)
        engine, rng = ActingEngine(self._loaded, config), random.Random(0)
        self.happened = engine.happened
        for _ in range(self._num_steps):
            for _ in range(rng.randint(1, self._most_changes)):
                with suppress(ConfigError):  # more than the device's memory
                    engine.set_plan(any_plan(engine, rng))
                engine.offloading.before_schedule(drops_unknown=False)
            room = engine.batching.pages.num_sectors // engine.batching.geometry.sectors_for_request(4)
            engine.batching.run_step([(3, max(0, 4 * room - 7))])
        engine.close()


class DeviceAlone:
    """What the contract of a device promises and an engine does not count on."""

    memory_share = 1.0

    def __call__(self, checker: Checker) -> None:
        device = LogicalDevice(1 << 20)
        host, computed = device.allocate_host(1 << 10), torch.zeros(1 << 10)
        self._is_over_when_measured(checker, device)
        kept = device.allocate(1 << 10, "memory that the stream may have used until now")
        device.copy_async(host, kept).synchronize()
        host.zero_()
        device.copy_async(host, kept)
        given_up = device.allocate(1 << 10, "memory that is given up during a copy")
        device.copy_async(host, given_up)
        del given_up
        computed = computed + 1  # perhaps there
        device.copy_async(host, kept)
        device.close()
        host.zero_()

    def _is_over_when_measured(self, checker: Checker, device: LogicalDevice) -> None:
        numbers, other = torch.zeros(8), Stream(checker, "stream of its own")
        other.wait_stream(checker.default)

        def compute() -> None:
            numbers.add_(1)

        with checker.on(other):
            device.peak_bytes(compute)
        numbers.zero_()


class ExecutorAlone:
    """A model without continuous batching. When it is detached its host memory may be another's, or unmapped."""

    memory_share = 1.0

    def __init__(self) -> None:
        self._model = tiny_model().model

    def __call__(self, checker: Checker) -> None:
        device = LogicalDevice(1 << 20)
        store = HostStore(find_units(self._model, "layer"), device)
        everything = OffloadPlan(offloaded=tuple(range(NUM_LAYERS)), num_slots=2, num_units=NUM_LAYERS)
        with OverlappedExecutor(self._model, store, device, everything):
            self._model(torch.tensor([[3, 4, 5]]), use_cache=False)
        for unit in store.units:
            store.buffer(unit).zero_()


def race_in(run: Any) -> str | None:
    """The first race while `run` runs, if there is one, whatever becomes of its error."""
    with logical_cuda(run.memory_share) as checker:
        try:
            run(checker)
        except Exception:
            if not checker.races:
                raise
    return checker.races[0] if checker.races else None


QUICK: dict[str, Callable[[], Any]] = {
    "device": DeviceAlone,
    "executor": ExecutorAlone,
    "changes": lambda: Churn("llama", num_steps=6, most_changes=3, unit="block"),
}
KILLERS: dict[str, Callable[[], Any]] = {
    **QUICK,
    **{str(scenario): partial(Serving, scenario) for scenario in SCENARIOS},
}
MUTANTS = mutants_of([module for module in modules_of("selectn_core") if module not in OTHER_WAITS])


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_no_two_accesses_of_a_serving_engine_are_unordered(scenario: Scenario) -> None:
    run = Serving(scenario)
    assert race_in(run) is None
    assert bool(run.happened["error"]) == scenario.fails
    assert all(run.happened[name] for name in [*scenario.happens, "token", "length"]), run.happened
    assert run.happened["computed"] > 1000, "the compute stream is not transformers' any more"
    assert run.happened[CHANGES] > 0
    assert run.happened[HOST_WAITS] == 0


@pytest.mark.parametrize("make", QUICK.values(), ids=QUICK)
def test_no_two_accesses_are_unordered(make: Callable[[], Any]) -> None:
    assert race_in(make()) is None


def test_no_two_accesses_are_unordered_where_homes_move_together() -> None:
    run = Churn("qwen2_moe", num_steps=4, most_changes=40)
    assert race_in(run) is None
    assert run.happened[COMPACTS]
    assert run.happened[CHANGES] > 50
    assert run.happened[HOST_WAITS] == 0


def test_a_host_that_waits_for_the_device_when_a_plan_changes_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(Executor, "_await_copies", lambda executor: executor.device.synchronize())
    run = Churn("llama", num_steps=6, most_changes=3, unit="block")
    assert race_in(run) is None
    assert run.happened[HOST_WAITS] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [it for it in MUTANTS if it.name not in EQUIVALENT], ids=lambda mutant: mutant.name)
def test_every_order_is_missed(mutant: Mutant) -> None:
    with mutant.applied():
        assert any(race_in(make()) for make in KILLERS.values())


def test_every_order_in_the_source_is_a_mutant() -> None:
    order = re.compile(r"\.(?:wait|wait_event|wait_stream|record|record_stream|copies_issued|synchronize)\(|\bafter=")
    modules = modules_of("selectn_core")
    written = {module: len(order.findall(source_of(module))) for module in modules}
    assert {module: len(mutants_of([module])) for module in modules} == written


def test_those_that_nothing_misses_are_known() -> None:
    equivalent = {mutant.name: mutant for mutant in MUTANTS if mutant.name in EQUIVALENT}
    assert equivalent.keys() == EQUIVALENT.keys()
    assert all(mutants_of([module]) for module in OTHER_WAITS)
    with ExitStack() as applied:
        for mutant in equivalent.values():
            applied.enter_context(mutant.applied())
        assert not any(race_in(make()) for make in QUICK.values())


def test_a_forward_that_does_not_wait_for_the_default_stream_reads_inputs_too_early() -> None:
    """As transformers has it: inputs are laid out on one stream and read on another."""
    name = "batching.batch_inputs.BatchInputs._get_model_kwargs: wait"
    (mutant,) = (each for each in MUTANTS if each.name == name)
    with mutant.applied():
        race = race_in(Churn("llama", num_steps=1, most_changes=1))
    assert race is not None
    assert re.search(
        r"embedding.* on the compute stream .* reads bytes of aten.copy_.* default stream .*batch_inputs.py", race
    )


# -- the checker itself -------------------------------------------------------------------------------------------


@pytest.fixture
def checker() -> Iterator[Checker]:
    with logical_cuda() as checker:
        yield checker


def test_accesses_of_two_streams_are_ordered_by_an_event(checker: Checker) -> None:
    other, event = Stream(checker, "other"), Event(checker)
    numbers = torch.zeros(8)
    with (
        pytest.raises(Race, match=r"add_.* on the other writes bytes of aten.zeros.* on the default stream"),
        checker.on(other),
    ):
        numbers.add_(1)
    checker.races.clear()
    event.record(checker.default)
    other.wait_event(event)
    with checker.on(other):
        numbers.add_(1)


def test_reads_need_no_order_and_neither_do_other_bytes(checker: Checker) -> None:
    other = Stream(checker, "other")
    numbers = torch.zeros(8, 2)
    other.wait_stream(checker.default)
    with checker.on(other):
        numbers[:4].add_(1)
        numbers[4:].sum()
    numbers[4:].sum()
    numbers.index_select(0, torch.tensor([5, 7]))
    with pytest.raises(Race, match="index_select"):
        numbers.index_select(0, torch.tensor([5, 3]))


@pytest.mark.parametrize(
    "wait", [lambda tensor: tensor.tolist(), lambda tensor: tensor[0].item()], ids=["tolist", "item"]
)
def test_whoever_reads_a_value_has_waited_for_its_stream(checker: Checker, wait: Callable[[torch.Tensor], Any]) -> None:
    other = Stream(checker, "other")
    with checker.on(other):
        numbers = torch.zeros(8)
        wait(numbers)
    numbers.add_(1)


def test_a_copy_that_the_host_has_seen_done_is_over(checker: Checker) -> None:
    device = LogicalDevice(1 << 20)
    host = device.allocate_host(64)
    done = device.copy_async(host, device.allocate(64, "a target"))
    assert not done.is_done()
    with pytest.raises(Race, match=r"on the host writes bytes of .* on the copy stream"):
        host.zero_()
    checker.races.clear()
    done.synchronize()
    assert done.is_done()
    host.zero_()
