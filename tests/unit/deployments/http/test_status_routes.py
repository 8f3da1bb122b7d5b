"""The status over HTTP: who may see it, what it is made of, and what a browser is allowed to do with it."""

from __future__ import annotations

import re
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from deployments import status
from deployments.config import RequestLimits
from deployments.http.api_keys import load_api_keys
from deployments.http.ingress import Service, build_api
from deployments.http.status_routes import MAX_ID_CHARS, PAGE
from deployments.status.collect import Collector
from deployments.status.schema import Explanation, Status
from deployments.status.words import explanation
from tests.support.statuses import HOSTILE, a_status, interval_decision

KEY = "a-key-of-the-tests-0"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


class Gathered:
    """In place of a collector: it has gathered this."""

    async def status(self) -> Status:
        return a_status()

    async def explain(self, decision_id: str) -> Explanation | None:
        assert len(decision_id) <= MAX_ID_CHARS, "such an id goes no further"
        if decision_id == "i-slow-1":
            raise TimeoutError
        return explanation(interval_decision()) if decision_id == "i-r1-7" else None


def client_of(keys: str | None = None) -> TestClient:
    service = cast(Service, SimpleNamespace(longest_tokens=None))
    api = build_api(service, RequestLimits(), load_api_keys(None, keys), cast(Collector, Gathered()))
    return TestClient(api, raise_server_exceptions=False)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Of a server that is closed to who has no key."""
    monkeypatch.setenv("SOME_KEYS", f"tests {KEY}")
    return client_of("SOME_KEYS")


@pytest.mark.parametrize("path", ["/status.json", "/decisions/i-r1-7"])
def test_data_is_for_who_has_the_key(client: TestClient, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another-key-of-the-tests"}, {"Cookie": f"key={KEY}"}):
        refusal = client.get(path, headers=headers)
        assert refusal.status_code == 401
        assert refusal.json()["error"]["code"] == "invalid_api_key"
        assert client.head(path, headers=headers).status_code == 401
    assert client.get(f"{path}?key={KEY}").status_code == 401, "a URL is kept in logs"
    assert client.get(path, headers=WITH_KEY).status_code == 200
    assert client_of().get(path).status_code == 200


def test_the_json_is_of_the_schema_and_kept_by_nobody(client: TestClient) -> None:
    answer = client.get("/status.json", headers=WITH_KEY)
    assert TypeAdapter(Status).validate_python(answer.json()) == a_status()
    assert answer.headers["cache-control"] == "no-store"
    assert KEY not in answer.text


def test_the_schema_is_in_openapi_where_that_is_open() -> None:
    api = client_of().get("/openapi.json").json()
    assert "/status.json" in api["paths"]
    assert "ReplicaFacts" in api["components"]["schemas"]


@pytest.mark.parametrize("path", PAGE)
def test_the_page_itself_is_for_all_and_knows_nothing(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == client.head(path).status_code == 200
    assert answer.headers["content-type"] == PAGE[path][1]
    assert "onerror" not in answer.text
    assert "r1" not in re.findall(r"[\w-]+", answer.text)
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", [*PAGE, "/status.json"])
def test_it_is_read_only(client: TestClient, path: str) -> None:
    assert client.post(path, headers=WITH_KEY).status_code == 405


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_from_data() -> None:
    texts = {name: files(status).joinpath("page", name).read_text(encoding="utf-8") for name, _ in PAGE.values()}
    html, script = texts["status.html"], texts["status.js"]
    for name, text in texts.items():
        outside = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text))
        assert outside <= {"http://www.w3.org/2000/svg"}, name
    assert not re.search(r"\son\w+=|style=|<style|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "cookie"):
        assert sink not in script, sink


def test_a_decision_is_explained_or_not_found_or_silent(client: TestClient) -> None:
    said = client.get("/decisions/i-r1-7", headers=WITH_KEY)
    assert TypeAdapter(Explanation).validate_python(said.json()).decision.id == "i-r1-7"
    gone = client.get("/decisions/i-r1-9", headers=WITH_KEY)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "decision_not_found")
    assert "i-r1-9" in gone.json()["error"]["message"]
    assert client.get("/decisions/i-slow-1", headers=WITH_KEY).status_code == 503
    long = client.get(f"/decisions/{'x' * 5000}", headers=WITH_KEY)
    assert long.status_code == 404
    assert len(long.text) < 500


def test_names_from_elsewhere_are_data(client: TestClient) -> None:
    facts: Any = client.get("/status.json", headers=WITH_KEY).json()["replicas"][0]["facts"]
    assert facts["model"] == HOSTILE
