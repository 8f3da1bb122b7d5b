"""What is declared is `args` patched by `user_config`: from these two alone, and the whole of it or nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.declared import apply_declared, declared
from deployments.replica.replica import SelectNReplica
from selectn_core.config import EngineConfig, OffloadConfig, SloConfig
from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError
from selectn_core.latency.placement import OffloadPlan
from selectn_core.profiling.record_cache import performance_record
from selectn_core.requests.objectives import Objectives
from tests.support.engines import engine_config
from tests.support.tiny_models import tiny_model

ARGS = EngineConfig(slo=SloConfig(ttft_ms=900.0, tightest=0.9, loosest=4.0))

milliseconds = st.one_of(st.just("auto"), st.floats(1, 1e6))
slo_values = {
    "ttft_ms": milliseconds,
    "tpot_ms": milliseconds,
    "percentile": st.floats(1, 100),
    "tightest": st.floats(0.1, 1),
    "loosest": st.floats(1, 100),
}
offload_values = {"num_offloaded": st.integers(0, 9), "num_slots": st.integers(1, 8)}
patches = st.fixed_dictionaries(
    {},
    optional={
        "slo": st.one_of(st.none(), st.fixed_dictionaries({}, optional=slo_values)),
        "offload": st.one_of(st.none(), st.fixed_dictionaries({}, optional=offload_values)),
    },
)
all_args = st.builds(
    EngineConfig,
    slo=st.builds(SloConfig, **slo_values),
    offload=st.builds(OffloadConfig, num_offloaded=st.just("auto"), num_slots=st.integers(1, 8)),
)
wrong = st.sampled_from(
    [
        {"slo": {"tpot_ms": math.inf}},
        {"slo": {"tpot_ms": None}},
        {"slo": {"tightest": True}},
        {"slo": 3},
        {"ofload": {}},
        {"offload": {"policy": "all"}},
        {"offload": {"num_slots": 9}},
        {"offload": {"num_offloaded": "many"}},
        [],
        "slo",
    ]
)


def values_of(config: EngineConfig) -> dict[tuple[str, str], object]:
    return {
        (section, name): value
        for section in ("slo", "offload")
        for name, value in asdict(getattr(config, section)).items()
    }


@given(all_args, patches)
def test_what_is_named_counts_and_all_else_is_as_in_args(args, patch):
    named = {(section, name): value for section in patch for name, value in (patch[section] or {}).items()}
    assert values_of(declared(args, patch)) == {**values_of(args), **named}


@given(all_args, patches, patches)
def test_it_depends_on_nothing_that_was_declared_before(args, earlier, patch):
    """One that is reconfigured gets what one that is restarted gets; and what is removed goes back."""
    declared(args, earlier)
    assert declared(args, patch) == declared(args, patch)
    assert declared(args, {}) == declared(args, None) == args
    assert replace(declared(args, patch), slo=args.slo, offload=args.offload) == args


@given(all_args, patches, wrong)
def test_one_wrong_key_refuses_the_whole(args, patch, mistake):
    merged = {**patch, **mistake} if isinstance(mistake, dict) else mistake
    with pytest.raises(ConfigError, match="^user_config"):
        declared(args, merged)


def test_a_new_objective_leaves_the_others_alone():
    wanted = declared(ARGS, {"slo": {"tpot_ms": 200}}).slo
    assert wanted == replace(ARGS.slo, tpot_ms=200.0)


def test_a_policy_needs_what_was_measured_at_the_start():
    args = replace(ARGS, offload=OffloadConfig(num_offloaded=3))
    with pytest.raises(ConfigError, match=r"num_offloaded='auto' is not allowed: expected a number of units"):
        declared(args, {"offload": {"num_offloaded": "auto"}})
    assert declared(args, {"offload": {"num_slots": 1}}).offload == OffloadConfig(num_offloaded=3, num_slots=1)


# -- an engine, and the replica that owns it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(record_cache) -> Iterator[Engine]:
    engine = Engine(tiny_model(), replace(engine_config("auto"), slo=ARGS.slo))
    engine.steer(performance_record(engine, budget_s=1.0))
    with engine:
        yield engine


# The objectives as configured and as they are, and the plan by hand, if there is one.
State = tuple[SloConfig, Objectives | None, OffloadPlan | None]


class Replica:
    """A replica without Serve: its engine is there already."""

    def __init__(self, engine: Engine, args: EngineConfig) -> None:
        self._engine, self._args, self._declared, self._member = engine, args, args, None
        self._is_configured, self._user_config_problem, self._replica_id = False, None, "replica"

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        await SelectNReplica.reconfigure(cast(SelectNReplica, self), user_config)

    async def snapshot(self) -> dict[str, Any]:
        return {"user_config_problem": self._user_config_problem}


def state_of(engine: Engine) -> State:
    plan = engine.target.plan if engine.offloading.control.is_manual else None
    return engine.config.slo, engine.objectives, plan


def reconfigured(engine: Engine, *user_configs: dict[str, Any] | None) -> State:
    """What the engine does after these were declared in turn, by a replica that starts with the first."""
    replica = Replica(engine, replace(engine.config, slo=ARGS.slo))
    apply_declared(engine, replica._args)
    for user_config in user_configs:
        asyncio.run(replica.reconfigure(user_config))
    return state_of(engine)


BY_HAND = {"offload": {"num_offloaded": 2, "num_slots": 1}}


@pytest.mark.parametrize("last", [None, {}, {"slo": {"tpot_ms": 200}}, BY_HAND, {**BY_HAND, "slo": {"ttft_ms": 700}}])
def test_a_replica_that_restarts_does_what_one_does_that_was_reconfigured(engine, last):
    changes = [BY_HAND, {"slo": {"ttft_ms": 70, "tpot_ms": 7}}, {"offload": {"num_offloaded": 4}}, None]
    alone = reconfigured(engine, last)
    for before in changes:
        assert reconfigured(engine, before, last) == alone


def test_objectives_stay_with_a_plan_by_hand(engine):
    reconfigured(engine, None)
    objectives = engine.objectives
    assert objectives is not None
    assert objectives.ttft_s == 0.9  # tpot_ms is "auto", which the record says
    reconfigured(engine, BY_HAND)
    assert engine.offloading.control.is_manual
    assert engine.objectives == objectives
    _, changed, plan = reconfigured(engine, {**BY_HAND, "slo": {"tpot_ms": 200}})
    assert changed is not None
    assert plan is not None
    assert (changed.ttft_s, changed.tpot_s, plan.num_offloaded) == (0.9, 0.2, 2)


@pytest.mark.parametrize(
    "mistake",
    [
        {"slo": {"tpot_ms": 55}, "offload": {"num_offloaded": 9999}},
        {"slo": {"tpot_ms": 55}, "offload": {"num_offloaded": -1}},
        {"slo": {"tpot_ms": 55, "ttft": 3}},
        "slo",
    ],
)
def test_a_wrong_user_config_changes_nothing_and_says_so(engine, mistake):
    before = reconfigured(engine, {"slo": {"tpot_ms": 200}})
    replica = Replica(engine, replace(engine.config, slo=ARGS.slo))
    asyncio.run(replica.reconfigure({"slo": {"tpot_ms": 200}}))
    asyncio.run(replica.reconfigure(mistake))
    assert state_of(engine) == before
    assert "user_config" in asyncio.run(replica.snapshot())["user_config_problem"]
    asyncio.run(replica.reconfigure({"slo": {"tpot_ms": 300}}))
    assert asyncio.run(replica.snapshot())["user_config_problem"] is None
    assert engine.objectives.tpot_s == 0.3


def test_a_replica_does_not_start_with_a_wrong_one(engine):
    with pytest.raises(ConfigError, match="user_config"):
        reconfigured(engine, {"slo": {"tpot_ms": -1}})
