"""What an operator does on purpose, under load: no answer is torn off, and each name goes to who has the model.

One application beside the others of this Serve. It has two replicas and two ingresses, then one of each; then another
name and a short grace; then its end.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.schema import ServeDeploySchema
from ray.util import list_named_actors

from deployments.commands.serving import base_urls
from deployments.config import REPLICA_NAME
from deployments.ray_private import start_serve
from tests.integration.conftest import application
from tests.support.load import Answer, Reference, http_client
from tests.support.tiny_checkpoint import NUM_LAYERS
from tests.support.waiting import wait_until

APP, INGRESS_NAME, OLD, NEW = "update", "SelectNIngress", "old", "new"
TIMEOUT_S = 120
# Steps take about 70 ms, every layer offloaded: a long answer takes longer than the short grace.
LONG_TOKENS, SHORT_TOKENS, SHORT_GRACE_S = 60, 6, 2.0


class Planned:
    """The application as it is declared, and what clients get of it."""

    def __init__(self, document: dict[str, Any], checkpoint: str) -> None:
        self._document = document
        self._application = application(
            APP,
            f"/{APP}",
            checkpoint,
            num_replicas=2,
            num_ingress_replicas=2,
            offload={"num_offloaded": NUM_LAYERS},
            model={"source": checkpoint, "served_name": OLD, "dtype": "float32"},
            shutdown_grace_s=60,
        )
        self.url = base_urls({**document, "applications": [self._application]})[0]

    def deploy(self, num_replicas: int | None = None, **args: Any) -> None:
        """With other `args`, and with so many replicas, and one ingress, in place of what they say."""
        self._application = copy.deepcopy(self._application)
        self._application["args"].update(args)
        if num_replicas is not None:
            self._application["deployments"] = [
                {"name": REPLICA_NAME, "num_replicas": num_replicas},
                {"name": INGRESS_NAME, "num_replicas": 1},
            ]
        self._submit([*self._document["applications"], self._application])

    def delete(self) -> None:
        self._submit(self._document["applications"])

    def _submit(self, applications: list[dict[str, Any]]) -> None:
        schema = ServeDeploySchema.model_validate({**self._document, "applications": applications})
        start_serve(schema).deploy_apps(schema)

    def wait_for(self, name: str, num_replicas: int) -> None:
        """Returns when so many replicas serve this name, and nothing else runs or is listed."""

        def states() -> dict[str, int]:
            application = serve.status().applications.get(APP)
            status = application.deployments.get(REPLICA_NAME) if application is not None else None
            return {str(state): number for state, number in status.replica_states.items()} if status else {}

        wait_until(lambda: states() == {"RUNNING": num_replicas}, TIMEOUT_S, "so many replicas")
        wait_until(lambda: self.names() == [name], TIMEOUT_S, f"the model's name to be {name}")

    def names(self) -> list[str]:
        with http_client(self.url) as client:
            response = client.get("/v1/models")
            return [each["id"] for each in response.json()["data"]] if response.status_code == 200 else []

    def ask(self, name: str, num_tokens: int, *, is_stream: bool) -> Answer:
        """One answer, however it ends."""
        answer = Answer(prompt="a request", is_stream=is_stream, model=name)
        with http_client(self.url) as client:
            self.read(answer, client, num_tokens)
        return answer

    @staticmethod
    def read(answer: Answer, client: httpx.Client, num_tokens: int) -> None:
        try:
            answer.read(client, num_tokens)
        except ValueError as error:
            answer.error = {"code": "no JSON", "message": repr(error)}


class Clients:
    """Four that ask again and again, each for a name, two of them for streams, until the block ends."""

    def __init__(self, planned: Planned, names: tuple[str, str, str, str], num_tokens: int) -> None:
        self._planned, self._num_tokens, self.answers = planned, num_tokens, list[Answer]()
        self._should_end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(name, bool(number % 2))) for number, name in enumerate(names)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._should_end.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str, is_stream: bool) -> None:
        while not self._should_end.is_set():
            with http_client(self._planned.url) as client:
                answer = Answer(prompt="a request", is_stream=is_stream, model=name)
                self.answers.append(answer)
                self._planned.read(answer, client, self._num_tokens)
            if not answer.is_complete:
                self._should_end.wait(0.2)

    @property
    def have_begun(self) -> bool:
        return any(answer.is_stream and answer.text and not answer.is_complete for answer in self.answers)


def is_orderly(answer: Answer) -> bool:
    """Whole; or an error event, or a 503 that says when to come again."""
    if answer.is_complete:
        return True
    if answer.error is None or answer.error["code"] not in ("unavailable", "replica_died"):
        return False
    return answer.status == 200 or (answer.status == 503 and answer.retry_after is not None)


@pytest.fixture(scope="module")
def planned(urls, document, checkpoint) -> Iterator[Planned]:
    planned = Planned(document, checkpoint)
    planned.deploy()
    planned.wait_for(OLD, 2)
    yield planned
    planned.delete()
    wait_until(lambda: APP not in serve.status().applications, TIMEOUT_S, "the application to be gone")


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[int, str]:
    reference = Reference(checkpoint)
    return {number: reference.text("a request", number) for number in (SHORT_TOKENS, LONG_TOKENS)}


def test_fewer_replicas_and_ingresses_by_an_override_lose_no_answer(planned, expected):
    actors = actor_names()
    answers = [Answer(prompt="a request", is_stream=True, model=OLD) for _ in range(4)]

    def read(answer: Answer) -> None:
        with http_client(planned.url) as client:
            planned.read(answer, client, LONG_TOKENS)

    threads = [threading.Thread(target=read, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(answer.text for answer in answers), TIMEOUT_S, "every stream to begin")
    planned.deploy(1)
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == [expected[LONG_TOKENS]] * 4
    planned.wait_for(OLD, 1)
    wait_until(lambda: len(actor_names()) == 2, TIMEOUT_S, "one replica and one ingress")
    assert actor_names() < actors, "nothing was replaced"


def test_changed_args_let_answers_end_and_the_name_follows_the_replicas(planned, expected):
    """The grace covers what was admitted; each name is answered by who has it, or told to come again."""
    assert planned.ask(NEW, SHORT_TOKENS, is_stream=False).status == 404
    model = {**planned._application["args"]["model"], "served_name": NEW}
    with Clients(planned, (OLD, OLD, NEW, NEW), SHORT_TOKENS) as clients:
        wait_until(lambda: clients.have_begun, TIMEOUT_S, "a stream to be under way")
        planned.deploy(2, model=model, shutdown_grace_s=SHORT_GRACE_S)  # the old one stays until a new one is there
        planned.wait_for(NEW, 2)
    for answer in clients.answers:
        assert is_orderly(answer) or answer.status == 404, answer
        assert not answer.is_complete or answer.text == expected[SHORT_TOKENS]
    assert all(answer.is_complete for answer in clients.answers if answer.status == 200), "the grace was long enough"
    # While an ingress has yet to hear of a replica it says "come again": on a busy machine that may last.
    wait_until(lambda: planned.ask(OLD, SHORT_TOKENS, is_stream=False).status == 404, TIMEOUT_S, "the name to be gone")
    assert planned.ask(NEW, SHORT_TOKENS, is_stream=True).text == expected[SHORT_TOKENS]


def test_what_outlasts_its_grace_ends_with_a_word(planned, expected):
    with Clients(planned, (NEW, NEW, NEW, NEW), LONG_TOKENS) as clients:
        wait_until(lambda: clients.have_begun, TIMEOUT_S, "a stream to be under way")
        planned.deploy(1, limits={"default_max_tokens": 100})
        wait_until(lambda: any(not is_whole(answer) for answer in clients.answers), TIMEOUT_S, "something broken off")
        planned.wait_for(NEW, 1)
    for answer in clients.answers:
        assert is_orderly(answer), answer
        assert expected[LONG_TOKENS].startswith(answer.text)


def test_a_deleted_application_ends_its_answers_with_a_word(planned):
    with Clients(planned, (NEW, NEW, NEW, NEW), LONG_TOKENS) as clients:
        wait_until(lambda: clients.have_begun, TIMEOUT_S, "a stream to be under way")
        under_way = [answer for answer in clients.answers if not answer.is_complete]
        planned.delete()
        wait_until(lambda: APP not in serve.status().applications, TIMEOUT_S, "the application to be gone")
    for answer in under_way:
        assert is_orderly(answer), answer


def is_whole(answer: Answer) -> bool:
    return answer.is_complete or answer.error is None


def actor_names() -> set[str]:
    """Serve's names for the actors of replicas and ingresses."""
    names = [each["name"] for each in list_named_actors(all_namespaces=True)]
    return {name for name in names if f"{APP}#SelectN" in name}
