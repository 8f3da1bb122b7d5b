"""The status of a running server: the key, the schema, and decisions of all places that stay bounded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from deployments.cli import main
from deployments.status.collect import MOST_SHOWN
from deployments.status.schema import Status
from tests.integration.conftest import MODEL, NUM_PAIR_INGRESSES, PAIR_KEY
from tests.support.tiny_checkpoint import NUM_LAYERS
from tests.support.waiting import wait_until

SECRET = "xyzzy-the-secret-prompt"


def status_of(url: str, **headers: str) -> Status:
    answer = httpx.get(f"{url}/status.json", timeout=60, trust_env=False, headers=headers)
    assert answer.status_code == 200, answer.text
    return TypeAdapter(Status).validate_python(answer.json())


def test_what_the_replica_decides_is_there_with_the_reason(base_url, http, replica, capsys):
    replica.set_num_offloaded.remote(NUM_LAYERS).result()
    body = {"model": MODEL, "prompt": SECRET, "max_tokens": 4}
    try:
        assert http.post("/v1/completions", json=body).status_code == 200

        def changed() -> list[Any]:
            return [each for each in status_of(base_url).decisions if each.verdict == "offload_more"]

        wait_until(lambda: bool(changed()), 30, "the decision")
        decision = changed()[0]
        (part,) = status_of(base_url).replicas
        assert part.facts is not None
        assert part.facts.k == NUM_LAYERS
        assert part.facts.k_history[-1][1] == NUM_LAYERS
        assert decision.id.startswith(f"i-{part.id}-")
        assert decision.reason == "by_hand"
        assert main(["explain", decision.id, "--url", base_url]) == 0
        assert "the number was set by hand" in capsys.readouterr().out
        assert main(["explain", f"i-{part.id}-999999", "--url", base_url]) == 2
        assert main(["status", "--url", base_url]) == 0
        assert f"{NUM_LAYERS}/{NUM_LAYERS}" in capsys.readouterr().out
    finally:
        replica.set_num_offloaded.remote(0).result()
    assert SECRET not in json.dumps(httpx.get(f"{base_url}/status.json", trust_env=False, timeout=60).json())


def test_a_node_and_a_coordinator_that_are_not_there_are_said_to_be_missing(base_url):
    status = status_of(base_url)
    assert len(status.nodes) == 1, "Ray's node"
    assert (status.coordinator.problem is None) == (status.coordinator.num_nodes is not None)
    assert all((node.facts is None) == (node.problem is not None) for node in status.nodes)
    assert status.problems == ()


def test_with_a_key_all_ingresses_are_seen_through_any(urls, tmp_path, capsys):
    url = urls[2]
    assert httpx.get(f"{url}/status.json", trust_env=False).status_code == 401
    page = httpx.get(f"{url}/status", trust_env=False)
    assert page.status_code == 200
    assert 'src="status.js"' in page.text, "relative: this application is served below /pair"
    status = status_of(url, Authorization=f"Bearer {PAIR_KEY}")
    assert len(status.ingresses) == NUM_PAIR_INGRESSES
    assert len(status.replicas) == 2
    assert all(each.facts is not None for each in status.replicas)
    (tmp_path / "key").write_text(PAIR_KEY, encoding="utf-8")
    assert main(["status", "--json", "--url", url, "--api-key-file", str(tmp_path / "key")]) == 0
    assert PAIR_KEY not in capsys.readouterr().out


def test_refusals_are_bounded_and_found_by_their_ids(small_url, capsys):
    """Nobody may wait there: of many at once most are refused."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 32, "ignore_eos": True}

    def send(_: int) -> int:
        return httpx.post(f"{small_url}/v1/completions", json=body, timeout=90, trust_env=False).status_code

    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(send, range(120)))
    assert statuses.count(429) > MOST_SHOWN
    wait_until(lambda: len(status_of(small_url).decisions) >= 30, 30, "the refusals")
    status = status_of(small_url)
    refused = [each for each in status.decisions if each.kind == "admission"]
    assert len(status.decisions) <= MOST_SHOWN
    assert {each.reason for each in refused} <= {"queue_full", "late", "deadline"}
    assert all(each.request_id for each in refused)
    assert main(["explain", refused[-1].id, "--url", small_url]) == 0
    assert "what would have changed it:" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["post", "put", "delete"])
def test_it_is_read_only(base_url, method):
    assert getattr(httpx, method)(f"{base_url}/status.json", trust_env=False).status_code == 405
