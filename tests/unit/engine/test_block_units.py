"""Attention and MLP blocks as units: the same tokens as with layers, in every plan and from one to the next."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from torch import nn

from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.latency.placement import OffloadPlan
from selectn_core.memory.plan_memory import fewest_offloaded, plan_bytes
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.offload.synchronous import SynchronousExecutor
from selectn_core.weights.units import Unit
from tests.support.engines import BeforeStep, CheckedEngine, engine_config, generate, greedy, make_prompts
from tests.support.tiny_models import FAMILIES, NUM_LAYERS, tiny_model
from tests.unit.engine.test_engine_identity import DTYPES, FAMILY_DTYPES, flaky_engine, unloaded_tokens

BOTH_EXECUTORS = pytest.mark.parametrize("executor_class", [OverlappedExecutor, SynchronousExecutor])


def is_attention(unit: Unit) -> bool:
    return "Attention" in unit.kind


def is_not_attention(unit: Unit) -> bool:
    return not is_attention(unit)


def anything(_: Unit) -> bool:
    return True


def plan_among(units: Sequence[Unit], allowed: Callable[[Unit], bool], rng: random.Random) -> OffloadPlan:
    """Some of the allowed units, or all, through one to four slots."""
    among = [unit.index for unit in units if allowed(unit)]
    offloaded = sorted(rng.sample(among, rng.randint(0, len(among))))
    return OffloadPlan(offloaded=tuple(offloaded), num_slots=rng.randint(1, 4), num_units=len(units))


def random_plans(seed: int, *kinds: Callable[[Unit], bool]) -> BeforeStep:
    """Now and then another plan, of any of the kinds."""
    rng = random.Random(seed)

    def change(engine: Engine) -> None:
        if rng.random() < 0.6:
            engine.set_plan(plan_among(engine.units, rng.choice(kinds), rng))

    return change


@BOTH_EXECUTORS
@pytest.mark.parametrize(("family", "dtype"), FAMILY_DTYPES)
def test_tokens_with_random_plans_in_mid_generation(family: str, dtype: str, executor_class: type[Executor]) -> None:
    """Slots change size from step to step, as attention alone, MLPs alone, or both are offloaded."""
    tokens = generate(
        family,
        engine_config(3, 1, unit="block"),
        dtype=DTYPES[dtype],
        before_step=random_plans(11, is_attention, is_not_attention, anything),
        executor_class=executor_class,
    )
    assert tokens == unloaded_tokens(family, dtype)


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("kind", [is_attention, is_not_attention])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_one_kind_of_block_in_host_memory(
    family: str, kind: Callable[[Unit], bool], num_slots: int
) -> None:
    def offload_all(engine: Engine) -> None:
        away = tuple(unit.index for unit in engine.units if kind(unit))
        engine.set_plan(OffloadPlan(offloaded=away, num_slots=num_slots, num_units=len(engine.units)))

    tokens = generate(family, engine_config(0, unit="block"), before_step=offload_all)
    assert tokens == unloaded_tokens(family)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_with_many_sequences_of_plans(seed: int) -> None:
    config = engine_config(2 * NUM_LAYERS, 2, unit="block")
    assert generate("opt", config, before_step=random_plans(seed, anything)) == unloaded_tokens("opt")


@BOTH_EXECUTORS
@pytest.mark.parametrize("seed", range(3))
def test_tokens_with_copies_that_fail_now_and_then(
    monkeypatch: pytest.MonkeyPatch, executor_class: type[Executor], seed: int
) -> None:
    engine, device = flaky_engine(monkeypatch, 3, executor_class=executor_class, seed=seed, unit="block")
    engine.before_step = random_plans(seed, is_attention, is_not_attention, anything)
    device.failure_rate = 0.1
    handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        assert [handle.result() for handle in handles] == unloaded_tokens("llama")
    assert device.num_failures >= 2


# -- memory -------------------------------------------------------------------------------------------------------


def test_slots_for_attention_take_less_than_slots_for_mlps() -> None:
    engine = CheckedEngine(tiny_model(), engine_config(0, unit="block"))
    sizes = {}
    with engine:
        for kind in (is_attention, is_not_attention, anything):
            away = tuple(unit.index for unit in engine.units if kind(unit))
            engine.set_plan(OffloadPlan(offloaded=away, num_slots=2, num_units=len(engine.units)))
            engine.submit([3, 4, 5], greedy(1)).result()
            engine.check_integrity()
            device = engine.snapshot()["memory"]["device"]
            assert device["homes_bytes"] + device["slots_bytes"] == engine.executor.held_bytes
            assert engine.executor.held_bytes == plan_bytes(engine.units, engine.executor.plan, engine.arena.round_up)
            sizes[kind] = device["slots_bytes"]
    attention, mlp = engine.units[:2]
    assert sizes[is_attention] == 2 * engine.arena.round_up(attention.num_bytes)
    assert sizes[is_not_attention] == sizes[anything] == 2 * engine.arena.round_up(mlp.num_bytes)


def test_a_snapshot_tells_layers_from_units() -> None:
    with CheckedEngine(tiny_model("opt"), engine_config(4, 1, unit="block")) as engine:
        snapshot = engine.snapshot()
    assert (snapshot["num_layers"], snapshot["num_units"], snapshot["unit"]) == (NUM_LAYERS, 3 * NUM_LAYERS, "block")
    assert snapshot["num_offloaded"] == 4
    assert snapshot["host_bytes"] == sum(unit.num_bytes for unit in engine.units)


def test_more_blocks_than_there_are_cannot_be_offloaded() -> None:
    with (
        CheckedEngine(tiny_model(), engine_config(2, unit="block")) as engine,
        pytest.raises(ConfigError, match=f"num_offloaded={2 * NUM_LAYERS + 1}.*0 to {2 * NUM_LAYERS}, the blocks"),
    ):
        engine.set_num_offloaded(2 * NUM_LAYERS + 1)


def test_a_model_that_does_not_fit_has_its_blocks_offloaded() -> None:
    roomy = CheckedEngine(tiny_model(), engine_config(0, unit="block", kv_tokens=64, memory_gib=1 / 1024))
    sizes = [roomy.arena.round_up(unit.num_bytes) for unit in roomy.units]
    beside = roomy.device.allocated_bytes - roomy.arena.reachable_bytes(0)
    roomy.close()
    budget = sum(sizes) - 2 * max(sizes)
    workspace = roomy.workspace.bytes_for((beside + budget) // roomy.arena.sector_bytes)
    memory_gib = (beside + budget + workspace) / 2**30
    engine = CheckedEngine(tiny_model(), engine_config("auto", 1, unit="block", kv_tokens=64, memory_gib=memory_gib))
    handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        tokens = [handle.result() for handle in handles]
    budget = engine.arena.reachable_bytes(0)
    assert engine.executor.wanted == fewest_offloaded(engine.units, 1, budget, round_up=engine.arena.round_up)
    assert engine.executor.wanted.num_offloaded >= 3
    assert tokens == unloaded_tokens("llama")


def test_a_plan_of_layers_is_refused_by_an_engine_of_blocks() -> None:
    with (
        CheckedEngine(tiny_model(), engine_config(2, unit="block")) as engine,
        pytest.raises(ConfigError, match=f"plan.num_units={NUM_LAYERS} .* {2 * NUM_LAYERS}, the model's blocks"),
    ):
        engine.set_plan(OffloadPlan(offloaded=(1, 3), num_slots=1, num_units=NUM_LAYERS))


# -- what blocks take for granted ---------------------------------------------------------------------------------


class _MlpFirst(nn.Module):
    """A layer that runs its blocks in another order than the one in which they are registered."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.mlp, self.self_attn = layer.get_submodule("mlp"), layer.get_submodule("self_attn")

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return hidden_states + self.mlp(hidden_states + attended)


class _PartOfAnMlp(_MlpFirst):
    """A layer that runs a part of its MLP itself, past the hooks of the whole."""

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(hidden_states, position_embeddings=position_embeddings, **kwargs)
        up, down = self.mlp.get_submodule("up_proj"), self.mlp.get_submodule("down_proj")
        return hidden_states + down(up(hidden_states + attended))


@pytest.mark.parametrize("num_offloaded", [0, 10])
@pytest.mark.parametrize("layer_class", [_MlpFirst, _PartOfAnMlp])
def test_blocks_that_do_not_run_as_they_are_registered_are_refused(
    layer_class: type[nn.Module], num_offloaded: int
) -> None:
    loaded = tiny_model()
    layers = loaded.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = layer_class(layer)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn runs where .*mlp should.*granularity 'layer'"):
        CheckedEngine(loaded, engine_config(num_offloaded, unit="block"))
    layers_engine = CheckedEngine(loaded, engine_config(num_offloaded // 2))
    layers_engine.close()
