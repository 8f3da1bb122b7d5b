"""Routing, admission, draining and retry, on real replicas: who gets where, who waits, who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client  # deploys a config, as `serve deploy` does
from ray.serve.schema import ServeDeploySchema

from deployments.config import REPLICA_NAME, AppArgs
from deployments.routing.admission import Admission
from deployments.routing.board import DOOR_REQUESTS
from deployments.routing.headroom_report import HeadroomReport
from deployments.routing.shared_board import board_of
from tests.integration.conftest import (
    NUM_PAIR_INGRESSES,
    PAIR_KEY,
    PAIR_MAX_QUEUED,
    PAIR_MAX_REQUESTS,
    SMALL_MAX_REQUESTS,
)
from tests.integration.test_running_requests import body
from tests.support.waiting import wait_until

NUM_REPLICAS, HEADROOM_PERIOD_S = 2, AppArgs().headroom_period_s
KEY = {"Authorization": f"Bearer {PAIR_KEY}"}


@pytest.fixture(scope="module")
def pair_url(urls) -> str:
    return urls[2]


@pytest.fixture
def pair(pair_url) -> Iterator[httpx.Client]:
    """A client of two idle replicas."""
    limits = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=pair_url, timeout=90, trust_env=False, headers=KEY, limits=limits) as client:
        wait_until(lambda: list(in_flight().values()) == [0] * NUM_REPLICAS, 60, "two idle replicas")
        yield client


def replica_actors(deployment: str = REPLICA_NAME) -> list[ray.actor.ActorHandle]:
    """The pair's replicas, of engine or ingress, one by one: calls through Serve's handle go to any."""
    names = [each for each in ray.util.list_named_actors(all_namespaces=True) if f"pair#{deployment}#" in each["name"]]
    actors = []
    for each in names:
        with contextlib.suppress(ValueError):  # just gone
            actors.append(ray.get_actor(each["name"], namespace=each["namespace"]))
    return actors


def report_of(actor: ray.actor.ActorHandle) -> HeadroomReport | None:
    """None for one that is starting or gone."""
    try:
        return HeadroomReport.from_json(ray.get(actor.record_routing_stats.remote(), timeout=20))
    except (ray.exceptions.RayError, TypeError):
        return None


def reports() -> dict[str, HeadroomReport]:
    """Each running replica's report."""
    found = [report_of(actor) for actor in replica_actors()]
    return {each.replica_id: each for each in found if each is not None}


def in_flight() -> dict[str, int]:
    """Requests in each replica."""
    return {name: sum(each.requests for each in report.promises) for name, report in reports().items()}


def has_more_than(before: dict[str, int]) -> list[str]:
    """Replicas that have more requests than before."""
    return [name for name, count in in_flight().items() if count > before[name]]


def process_of(replica_id: str) -> psutil.Process:
    (actor,) = [actor for actor in replica_actors() if (report := report_of(actor)) and report.replica_id == replica_id]
    return process_of_actor(actor)


def process_of_actor(actor: ray.actor.ActorHandle) -> psutil.Process:
    return psutil.Process(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


class Streaming:
    """A streamed completion, read by a thread of its own, to its end or until the connection breaks."""

    def __init__(self, client: httpx.Client, request: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(client, request))
        self._thread.start()

    def _read(self, client: httpx.Client, request: dict[str, Any]) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/completions", json={**request, "stream": True}) as response,
        ):
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                    self._begun.set()
        self._begun.set()

    def wait_until_begun(self) -> None:
        assert self._begun.wait(60)

    def result(self) -> tuple[str, dict[str, Any] | None]:
        """Text and error; the stream must be complete."""
        events = self._events()
        error = next((event["error"] for event in events if "error" in event), None)
        assert (error is None) == (self.lines[-1] == "[DONE]")
        return _text(events), error

    def text(self) -> str:
        """What came, complete or not."""
        return _text(self._events())

    def _events(self) -> list[dict[str, Any]]:
        self._thread.join(90)
        assert not self._thread.is_alive()
        return [json.loads(line) for line in self.lines if line != "[DONE]"]


def _text(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if "error" not in event)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_requests_need_a_key(pair_url):
    for headers in ({}, {"Authorization": "Bearer not-the-key-of-the-tests"}):
        for response in (
            httpx.post(f"{pair_url}/v1/completions", json=body(max_tokens=1), headers=headers, trust_env=False),
            httpx.get(f"{pair_url}/v1/models", headers=headers, trust_env=False),
        ):
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert httpx.get(f"{pair_url}/health", trust_env=False).status_code == 200


def test_an_unknown_priority_is_refused(pair):
    response = pair.post("/v1/completions", json=body(max_tokens=1, priority="now"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
    assert pair.post("/v1/completions", json=body(max_tokens=1, priority="high")).status_code == 200


def test_a_request_goes_where_there_is_more_room(pair):
    """One long request is on one replica: short ones, each done before the next comes, all go to the other."""
    streaming = Streaming(pair, body(max_tokens=120))
    streaming.wait_until_begun()
    (busy,) = [name for name, count in in_flight().items() if count]
    before = prefixes_of(busy)
    for number in range(3):
        time.sleep(2 * HEADROOM_PERIOD_S)  # the other ingress learns by a report what began and ended
        text_of(pair.post("/v1/completions", json=body(prompt=f"{number}" * 200, max_tokens=2)))
    assert prefixes_of(busy) == before
    text, error = streaming.result()
    assert text
    assert error is None


def prefixes_of(replica_id: str) -> tuple[int, ...]:
    return reports()[replica_id].prefixes


def test_what_no_replica_can_hold_is_a_400_that_says_the_limit(pair):
    longest = max(report.longest_request_tokens for report in reports().values())
    response = pair.post("/v1/completions", json=body(max_tokens=longest))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert str(longest) in response.json()["error"]["message"]
    assert "Retry-After" not in response.headers
    prompt = [5] * (longest - 5)
    response = pair.post("/v1/completions", json=body(prompt=prompt, max_tokens=6))
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_the_rest_waits_in_bounded_queues_and_what_is_more_gets_429(pair):
    at_once, num_clients = NUM_REPLICAS * PAIR_MAX_REQUESTS, 48
    tracked = []
    with ThreadPoolExecutor(num_clients) as pool:
        posts = [pool.submit(pair.post, "/v1/completions", json=body(max_tokens=24)) for _ in range(num_clients)]
        while not all(post.done() for post in posts):
            tracked += tracked_by_ingresses()
    responses = [post.result() for post in posts]
    # Each ingress may think at first that all is its own; what they send too much waits at the doors. Of one that has
    # ended a replica's report may tell before its answer does.
    assert max(each["sent"] for each in tracked) <= 2 * at_once + NUM_REPLICAS * DOOR_REQUESTS
    assert max(each["waiting"] for each in tracked) == PAIR_MAX_QUEUED
    taken = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code != 200]
    assert len(taken) > at_once
    assert refused
    assert len({text_of(response) for response in taken}) == 1
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["type"] == "rate_limit_error"
    handle = serve.get_deployment_handle(REPLICA_NAME, "pair")
    assert handle.snapshot.remote().result()["preemptions"] == 0


def tracked_by_ingresses() -> list[dict[str, int]]:
    """What each ingress keeps of requests: how many it has sent, how many wait, and how many flows it remembers."""

    def count(_: Any) -> dict[str, int]:
        listeners = board_of("pair")._listeners
        if not listeners:
            return {"sent": 0, "waiting": 0, "flows": 0}  # no request has come yet
        (listener,) = listeners
        assert inspect.ismethod(listener)
        admission = listener.__self__
        assert isinstance(admission, Admission)
        with board_of("pair").locked() as board:
            num_sent = len(board._sent)
        return {"sent": num_sent, "waiting": admission.num_waiting, "flows": len(admission._arrivals)}

    return ray.get([actor.__ray_call__.remote(count) for actor in replica_actors("SelectNIngress")], timeout=30)


async def offer(url: str, requests_per_s: float, seconds: float) -> list[httpx.Response | None]:
    """Whole and streamed answers, of all priorities; None for a client that has gone after a second."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=60, trust_env=False, limits=limits) as client:

        async def one(number: int) -> httpx.Response | None:
            priority = ("normal", "high", "normal", "low")[number % 4]
            request = body(max_tokens=24, stream=number % 2 == 0, priority=priority)
            post = asyncio.create_task(client.post("/v1/completions", json=request))
            if number % 10 == 0:
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(post, timeout=1)
                return None
            return await post

        tasks = []
        for number in range(round(requests_per_s * seconds)):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(1 / requests_per_s)
        return await asyncio.gather(*tasks)


def test_ten_times_too_many_are_all_answered_and_leave_nothing_behind(pair, pair_url):
    """A request of 24 tokens takes 1.7 s or more, and four run at once: two and a half a second is what is possible."""
    responses = [each for each in asyncio.run(offer(pair_url, requests_per_s=25, seconds=10)) if each is not None]
    served = [each for each in responses if each.status_code == 200]
    refused = [each for each in responses if each.status_code != 200]
    assert len(served) >= 2 * NUM_REPLICAS * PAIR_MAX_REQUESTS
    assert len(refused) > len(served)
    for response in refused:
        assert response.status_code == 429, response.text
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for response in served:
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("data: [DONE]\n\n") if is_stream else text_of(response)
    wait_until(lambda: list(in_flight().values()) == [0] * NUM_REPLICAS, 60, "nothing runs or waits at a door")
    tracked = tracked_by_ingresses()
    assert len(tracked) == NUM_PAIR_INGRESSES
    assert all((each["sent"], each["waiting"]) == (0, 0) for each in tracked)
    assert all(each["flows"] <= 3 for each in tracked)  # one key, three priorities
    assert text_of(pair.post("/v1/completions", json=body(max_tokens=2)))


def test_one_that_would_miss_its_first_token_is_refused_not_served_late(small_url):
    with httpx.Client(base_url=small_url, timeout=60, trust_env=False) as client:
        small = serve.get_deployment_handle(REPLICA_NAME, "small")
        small.set_num_offloaded.remote(4).result()
        request = body(max_tokens=300)  # 20 s, and the objective is 6 s
        running = [client.stream("POST", "/v1/completions", json={**request, "stream": True}) for _ in range(2)]
        assert len(running) == SMALL_MAX_REQUESTS
        with running[0] as first, running[1] as second:
            assert (first.status_code, second.status_code) == (200, 200)
            response = client.post("/v1/completions", json=body(max_tokens=2))
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "objective_unreachable"
        assert int(response.headers["Retry-After"]) >= 1
        wait_until(lambda: small.snapshot.remote().result()["running"] == 0, 10, "the streams are cancelled")


def test_a_killed_replica_costs_only_what_it_had_begun_to_send(pair):
    whole = body(prompt="once more, from the beginning. " * 10, max_tokens=40)
    whole_reference = text_of(pair.post("/v1/completions", json=whole))
    reference = text_of(pair.post("/v1/completions", json=body(max_tokens=80)))
    streams = []
    while not all(in_flight().values()):  # ingresses do not know at once of each other: at last one is on each replica
        streams.append(Streaming(pair, body(max_tokens=80)))
        streams[-1].wait_until_begun()
    with ThreadPoolExecutor(1) as pool:
        before = in_flight()
        post = pool.submit(pair.post, "/v1/completions", json=whole)
        wait_until(lambda: has_more_than(before), 10, "a whole response is on its way")
        (victim,) = has_more_than(before)
        process_of(victim).kill()
        assert text_of(post.result()) == whole_reference  # it was run again, from its beginning
    results = [stream.result() for stream in streams]
    failed = [error for _, error in results if error is not None]
    assert 1 <= len(failed) <= before[victim]  # the others, if any, had just ended
    assert {(error["code"], error["type"]) for error in failed} == {("replica_died", "server_error")}
    assert {text for text, error in results if error is None} == {reference}
    assert all(reference.startswith(text) for text, _ in results)
    wait_until(lambda: len(reports()) == NUM_REPLICAS, 60, "the replica is replaced")


def test_a_killed_ingress_costs_its_own_requests_only(pair):
    """Serve's proxy answers for it: 500 where nothing was sent yet. The replicas run to the end what nobody reads."""
    request = body(max_tokens=60)
    reference = text_of(pair.post("/v1/completions", json=request))
    ingresses = replica_actors("SelectNIngress")
    assert len(ingresses) == NUM_PAIR_INGRESSES
    with ThreadPoolExecutor(2) as pool:
        streams = [Streaming(pair, request) for _ in range(2)]
        posts = [pool.submit(pair.post, "/v1/completions", json=request) for _ in range(2)]
        for stream in streams:
            stream.wait_until_begun()
        wait_until(lambda: sum(in_flight().values()) == 4, 10, "all are being answered")
        sent = [each["sent"] for each in tracked_by_ingresses()]
        process_of_actor(ingresses[sent.index(max(sent))]).kill()
        responses = [post.result() for post in posts]
    texts = [stream.text() for stream in streams]
    lost = [each for each in responses if each.status_code == 500]
    assert {text_of(each) for each in responses if each not in lost} <= {reference}
    assert all(each.text == "Internal Server Error" for each in lost)
    assert len(lost) + sum(text != reference for text in texts) == max(sent)
    assert all(reference.startswith(text) for text in texts)
    wait_until(lambda: list(in_flight().values()) == [0] * NUM_REPLICAS, 60, "what was lost has run to its end")
    wait_until(lambda: len(replica_actors("SelectNIngress")) == NUM_PAIR_INGRESSES, 60, "the ingress is replaced")
    assert text_of(pair.post("/v1/completions", json=request)) == reference


def test_a_replica_told_to_drain_finishes_what_it_has_and_takes_nothing_more(pair):
    streams = [Streaming(pair, body(max_tokens=40))]
    while not all(in_flight().values()):
        streams.append(Streaming(pair, body(max_tokens=40)))
        streams[-1].wait_until_begun()
    replicas = serve.get_deployment_handle(REPLICA_NAME, "pair")
    ids = serve.get_deployment_handle("SelectNIngress", "pair").snapshot.remote().result()["replica_ids"]
    assert ids == sorted(reports())
    assert [replicas.snapshot.remote(replica_id=each).result()["replica_id"] for each in ids] == ids
    replicas.drain.remote(replica_id=ids[-1]).result()
    (drained,) = [name for name, report in reports().items() if report.is_draining]
    assert drained == ids[-1]
    before = prefixes_of(drained)
    for number in range(3):  # the first may find the door closed, and is sent elsewhere
        text_of(pair.post("/v1/completions", json=body(prompt=f"{number}" * 200, max_tokens=2)))
    assert prefixes_of(drained) == before
    results = [stream.result() for stream in streams]
    assert len(set(results)) == 1
    assert results[0][1] is None


def test_a_redeploy_drains_and_drops_nothing(pair, document, pair_url):
    reference = text_of(pair.post("/v1/completions", json=body(max_tokens=40)))
    before = set(reports())
    streams = [Streaming(pair, body(max_tokens=40)) for _ in range(NUM_REPLICAS)]
    for stream in streams:
        stream.wait_until_begun()
    changed = copy.deepcopy(document)
    (app,) = [each for each in changed["applications"] if each["name"] == "pair"]
    app["args"]["headroom_period_s"] = 0.4
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(changed))
    statuses = []

    def is_replaced() -> bool:
        response = httpx.post(
            f"{pair_url}/v1/completions", json=body(max_tokens=2), headers=KEY, timeout=60, trust_env=False
        )
        statuses.append(response.status_code)
        now = set(reports())
        return len(now) == NUM_REPLICAS and not now & before

    wait_until(is_replaced, 90, "new replicas")
    assert set(statuses) == {200}
    assert [stream.result() for stream in streams] == [(reference, None)] * NUM_REPLICAS
