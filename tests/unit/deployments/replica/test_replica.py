"""What a replica says of itself, its engine being a real one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from deployments.replica.door import Door
from deployments.replica.replica import require_replica
from deployments.replica.report import replica_report
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.prefixes import RecentPrefixes
from selectn_core.config import SloConfig
from selectn_core.engine.engine import Engine
from selectn_core.errors import ConfigError, EngineUnavailable, RequestError
from tests.support.engines import engine_config, greedy, make_prompts
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model

PROMPT = make_prompts([5])[0]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(tiny_model(), engine_config(0)) as engine:
        yield engine


def report_of(engine: Engine) -> HeadroomReport:
    door = Door(engine.reachable_kv_tokens, max_requests=4, max_waiting=4)
    report = replica_report("a", engine, door, RecentPrefixes())
    assert HeadroomReport.from_json(report.to_json()) == report
    return report


def test_one_whose_engine_has_failed_wants_no_requests(engine: Engine) -> None:
    assert not report_of(engine).is_draining

    def fail(*_: object) -> None:
        raise ValueError("injected into a layer")

    engine.units[1].module.register_forward_pre_hook(fail)
    while engine.is_healthy():
        try:
            list(engine.submit(PROMPT, greedy()))
        except EngineUnavailable:  # between a failure and the restart
            continue
    assert report_of(engine).is_draining


def test_one_whose_door_is_closed_wants_no_requests(engine: Engine) -> None:
    door = Door(engine.reachable_kv_tokens, max_requests=4, max_waiting=4)
    door.close()
    assert replica_report("a", engine, door, RecentPrefixes()).is_draining


def test_its_objective_is_the_one_that_it_has_now(engine: Engine) -> None:
    assert report_of(engine).ttft_s is None
    engine.set_objectives(SloConfig(ttft_ms=500.0, tpot_ms=100.0, tightest=0.5, loosest=4.0))
    report = report_of(engine)
    assert (report.tightest_ttft_s, report.ttft_s, report.loosest_ttft_s) == (0.25, 0.5, 2.0)
    for own_ms in (250.0, 2000.0):
        engine.objectives_for(ttft_ms=own_ms, tpot_ms=None)
    for own_ms in (249.0, 2001.0):
        with pytest.raises(RequestError):
            engine.objectives_for(ttft_ms=own_ms, tpot_ms=None)


def test_a_call_for_another_replica_is_told_so() -> None:
    require_replica(None, "mine")
    require_replica("mine", "mine")
    with pytest.raises(ConfigError, match="replica_id='gone'.*'mine'"):
        require_replica("gone", "mine")


NOT_CLOSED = """
from deployments.replica.replica import close_at_exit
from selectn_core.engine.engine import Engine
from tests.support.tiny_models import tiny_model
from tests.support.engines import engine_config, greedy

engine = Engine(tiny_model(), engine_config(2))
engine.start()
close_at_exit(engine)
endless = engine.submit([5, 6, 7], greedy(200))
next(iter(endless))
print("leaving")
"""


def test_a_process_that_ends_without_closing_its_engine_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NOT_CLOSED], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "leaving\n"), ended.stderr
