"""Log lines about a request: its id is in all of them, and nothing that its client wrote, at any level."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError

from deployments.config import RequestLimits
from deployments.http.api_keys import load_api_keys
from deployments.http.ingress import Service, build_api
from deployments.http.write_budget import WriteBudget
from deployments.messages import Accepted, Delta, Finished, Refused
from deployments.routing.replica_client import ReplicaClient
from deployments.routing.sizing import PromptSizes
from tests.support.admissions import FULL, Case
from tests.unit.deployments.routing.test_replica_client import ANSWER, Handle, Stream

SECRET = "xyzzy-the-secret-prompt"
FAILED = (
    Accepted(num_prompt_tokens=3),
    Delta(text="a"),
    Finished(reason="error", num_output_tokens=1, error="a step failed"),
)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Of all loggers, at every level."""
    with caplog.at_level(logging.DEBUG):
        yield caplog


def send(case: Case, *answers: Stream | Exception, **fields: Any) -> int:
    """The status of a completion whose prompt is secret, of a replica that answers like this."""
    client = ReplicaClient(Handle(*answers), case.admission, PromptSizes(256), ttft_s=None, timeout_s=0.2)
    api = build_api(Service(client, WriteBudget(None)), RequestLimits(), load_api_keys(None, None))
    with TestClient(api, raise_server_exceptions=False) as http:
        body = {"model": "m", "prompt": SECRET, "max_tokens": 10, **fields}
        return http.post("/v1/completions", json=body).status_code


def about_requests(log: pytest.LogCaptureFixture) -> list[Any]:
    return [each for each in log.records if hasattr(each, "request_id")]


@pytest.mark.parametrize(
    ("answers", "status", "levels"),
    [
        ([Stream(*ANSWER)], 200, ["DEBUG", "DEBUG"]),
        ([Stream(*FAILED)], 500, ["DEBUG", "ERROR"]),
        ([Stream(ActorDiedError()), Stream(*ANSWER)], 429, ["WARNING", "WARNING", "INFO"]),
        ([Stream(RuntimeError("of Serve's own"))], 500, ["ERROR"]),
        ([Stream(Refused(kind="invalid", message="no", field="prompt"))], 400, []),
    ],
    ids=["served", "failed", "died", "broken", "refused by the replica"],
)
def test_the_id_is_in_every_line_and_the_prompt_in_none(log, answers, status, levels):
    case = Case(timeout_s=0.2)
    case.report(model="m", max_model_len=1000)
    assert send(case, *answers) == status
    lines = about_requests(log)
    assert [each.levelname for each in lines] == levels
    assert all(f"request {each.request_id}: " in each.getMessage() for each in lines)
    assert len({each.request_id for each in lines}) <= 1
    assert not any(SECRET in f"{each.getMessage()}{each.exc_text}{each.args}" for each in log.records)


def test_a_refusal_names_its_decision(log):
    case = Case(max_queued_requests=0)
    case.report(promises=FULL, model="m", max_model_len=1000)
    with case.shared.locked() as board:
        assert board.place(case.request(5, model="m")) == "a"  # at the door, and smaller than what comes
    assert send(case) == 429
    (line,) = about_requests(log)
    assert line.levelname == "INFO"
    (decision,) = case.admission.decisions.latest("in")
    assert line.request_id == decision.request_id
    assert line.getMessage().endswith("refused, queue_full (decision 1)")
    assert SECRET not in json.dumps(dict(decision.inputs))


def test_a_wrong_body_is_not_in_the_log(log):
    case = Case()
    case.report(model="m", max_model_len=1000)
    assert send(case, temperature=9) == 400
    assert send(case, model=SECRET) == 404
    assert not any(SECRET in each.getMessage() for each in log.records)
