"""What happens to requests while they run: clients leave, layers move, queues fill, a replica dies."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from ray.serve.context import _get_global_client  # deploys a config, as `serve deploy` does
from ray.serve.schema import ServeDeploySchema

from deployments.config import REPLICA_NAME
from tests.integration.conftest import MODEL, SMALL_MAX_REQUESTS, SMALL_MAX_WAITING
from tests.support.tiny_checkpoint import NUM_LAYERS
from tests.support.waiting import wait_until

PROMPT = "いろはにほへと"


def body(**fields: object) -> dict:
    return {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}


def num_running(replica) -> int:
    state = replica.snapshot.remote().result()
    return state["running"] + state["waiting"]


def stream_lines(client: httpx.Client, request: dict):
    with client.stream("POST", "/v1/completions", json={**request, "stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                yield line.removeprefix("data: ")


def test_moving_layers_during_a_stream_does_not_change_the_answer(http, replica):
    request = body(max_tokens=80)
    reference = http.post("/v1/completions", json=request).json()["choices"][0]["text"]
    before = replica.snapshot.remote().result()["interval_history"]
    plans = iter([1, NUM_LAYERS, 2, 3, 0])
    text = ""
    for num_chunks, line in enumerate(stream_lines(http, request), start=1):
        if line == "[DONE]":
            break
        text += json.loads(line)["choices"][0]["text"]
        if num_chunks % 8 == 0 and (plan := next(plans, None)) is not None:
            replica.set_num_offloaded.remote(plan).result()
    replica.set_num_offloaded.remote(0).result()
    assert text == reference
    history = replica.snapshot.remote().result()["interval_history"]
    assert len(history) - len(before) >= 4


def test_an_impossible_plan_is_refused_and_nothing_else_happens(http, replica):
    with pytest.raises(Exception, match=f"expected 0 to {NUM_LAYERS}"):
        replica.set_num_offloaded.remote(NUM_LAYERS + 1).result()
    assert http.get("/health").status_code == 200


@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_a_stream_ends_its_generation(http, replica):
    lines = stream_lines(http, body(max_tokens=900))
    for _ in range(3):
        next(lines)
    assert num_running(replica) == 1
    lines.close()
    wait_until(lambda: num_running(replica) == 0, 5, "the generation is cancelled")


@pytest.mark.usefixtures("slow")
def test_a_client_that_gives_up_waiting_ends_its_generation(base_url, replica):
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=base_url, timeout=1.5, trust_env=False) as impatient,
    ):
        waiting = pool.submit(impatient.post, "/v1/completions", json=body(max_tokens=900))
        wait_until(lambda: num_running(replica) == 1, 1.4, "the request runs")
        assert isinstance(waiting.exception(), httpx.ReadTimeout)
    wait_until(lambda: num_running(replica) == 0, 5, "the generation is cancelled")


@pytest.mark.usefixtures("slow")
def test_a_stop_string_ends_the_generation_too(http, replica):
    whole = http.post("/v1/completions", json=body(max_tokens=12)).json()["choices"][0]["text"]
    answer = http.post("/v1/completions", json=body(max_tokens=900, stop=[whole[3:6]])).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 30
    wait_until(lambda: num_running(replica) == 0, 5, "the generation is cancelled")


def test_a_full_queue_is_a_429_that_says_when_to_come_back(small_url, small_replica):
    small_replica.set_num_offloaded.remote(NUM_LAYERS).result()
    capacity = SMALL_MAX_REQUESTS + SMALL_MAX_WAITING
    with (
        httpx.Client(base_url=small_url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(capacity + 3) as pool,
    ):
        request = body(max_tokens=20)
        posts = [pool.submit(client.post, "/v1/completions", json=request) for _ in range(capacity + 3)]
        responses = [post.result() for post in posts]
    taken = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 429]
    assert (len(taken), len(refused)) == (capacity, 3)
    assert len({response.json()["choices"][0]["text"] for response in taken}) == 1
    for response in refused:
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"


def test_user_config_moves_layers_and_objectives_without_a_restart(document, small_url, small_replica):
    before = small_replica.snapshot.remote().result()
    user_config = {"offload": {"num_offloaded": 3, "num_slots": 1}, "slo": {"ttft_ms": 1500, "tpot_ms": 150}}

    def deploy(**entry: object) -> None:
        changed = copy.deepcopy(document)
        changed["applications"][1]["deployments"] = [{"name": REPLICA_NAME, **entry}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(changed))

    deploy(user_config=user_config)

    def plan_of_the_next_step() -> tuple[int, int]:
        httpx.post(f"{small_url}/v1/completions", json=body(max_tokens=2), timeout=60, trust_env=False)
        state = small_replica.snapshot.remote().result()
        return state["num_offloaded"], state["num_slots"]

    wait_until(lambda: plan_of_the_next_step() == (3, 1), 30, "the plan of user_config")
    after = small_replica.snapshot.remote().result()
    assert after["num_steps"] > before["num_steps"]
    assert before["objectives"] == {"ttft_s": 6.0, "tpot_s": 10.0}
    assert after["objectives"] == {"ttft_s": 1.5, "tpot_s": 0.15}

    deploy(user_config={"offload": {"num_offloaded": 1}, "slo": {"tpot_ms": -1}})
    wait_until(lambda: small_replica.snapshot.remote().result()["user_config_problem"], 30, "a wrong one is noticed")
    assert plan_of_the_next_step() == (3, 1)
    assert small_replica.snapshot.remote().result()["objectives"] == after["objectives"]

    deploy(user_config={"slo": {"tpot_ms": 150}})
    wait_until(lambda: plan_of_the_next_step()[0] == 0, 30, "what is named no longer is as in args")
    assert small_replica.snapshot.remote().result()["objectives"] == {"ttft_s": 6.0, "tpot_s": 0.15}

    deploy()  # without a user_config
    restored = before["objectives"]
    wait_until(lambda: small_replica.snapshot.remote().result()["objectives"] == restored, 30, "all is as in args")
    assert small_replica.snapshot.remote().result()["num_steps"] > after["num_steps"]


def test_a_replica_that_dies_is_an_error_event_and_is_replaced(small_url, small_replica, urls):
    small_replica.set_num_offloaded.remote(NUM_LAYERS).result()
    with httpx.Client(base_url=small_url, timeout=60, trust_env=False) as client:
        lines = stream_lines(client, body(max_tokens=900))
        for _ in range(3):
            next(lines)
        kill_replica_of("small")
        rest = list(lines)
        assert json.loads(rest[-1])["error"]["type"] == "server_error"
        assert "[DONE]" not in rest
        wait_until(lambda: client.get("/health").status_code == 200, 60, "the replica is replaced")
        with openai.OpenAI(base_url=f"{small_url}/v1", api_key="none", timeout=60) as openai_client:
            answer = openai_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 3


def kill_replica_of(application: str) -> None:
    for process in psutil.Process().children(recursive=True):
        if f"ServeReplica:{application}:{REPLICA_NAME}" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError(f"{application} has no replica")
