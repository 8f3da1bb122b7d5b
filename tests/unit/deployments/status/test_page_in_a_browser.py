"""The page in a real browser: it shows what there is, runs nothing of it, and axe-core finds no fault in it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn

from deployments.config import RequestLimits
from deployments.http.api_keys import load_api_keys
from deployments.http.ingress import Service, build_api
from deployments.status.collect import Collector
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.unit.deployments.http.test_status_routes import Gathered

KEY = "a-key-of-the-tests-0"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MODULES = Path(os.environ.get("SELECTN_NODE_MODULES", ROOT / "node_modules"))


def missing() -> str | None:
    """What this machine lacks for these tests."""
    if shutil.which("node") is None or not Path(CHROMIUM).is_file():
        return "no node, or no browser at $CHROMIUM"
    if not all((MODULES / name).is_dir() for name in ("puppeteer-core", "axe-core")):
        return "no puppeteer-core and axe-core in $SELECTN_NODE_MODULES (docs/operations.md, Looking at it)"
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server that shows a status with hostile names; with a key where the parameter says so."""
    monkeypatch.setenv("SOME_KEYS", f"tests {KEY}")
    keys = load_api_keys(None, "SOME_KEYS" if request.param else None)
    service = cast(Service, SimpleNamespace(longest_tokens=None))
    api = build_api(service, RequestLimits(), keys, cast(Collector, Gathered()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started, 20, "the server")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("url", [False, True], indirect=True, ids=["open", "with a key"])
def test_light_and_dark_on_a_desk_and_on_a_phone(request: pytest.FixtureRequest, url: str) -> None:
    has_key = request.node.callspec.params["url"]
    environment = {**os.environ, "SELECTN_NODE_MODULES": str(MODULES), "CHROMIUM": CHROMIUM}
    environment.pop("SELECTN_API_KEY", None)
    done = subprocess.run(
        ["node", str(ROOT / "docs" / "screenshots.mjs"), "--url", url],
        env=environment | ({"SELECTN_API_KEY": KEY} if has_key else {}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    looks = json.loads(done.stdout or "[]")
    assert len(looks) == 4, done.stderr
    for look in looks:
        assert look["violations"] == {"form": [], "page": []}
        assert look["errors"] == []
        assert look["fits"], "nothing is wider than the screen"
        assert look["injected"] == 0
        assert look["refreshes"] >= 1
        assert look["whilePaused"] == 0
        assert look["state"] == "1 of 2 replicas serve"
    assert done.returncode == 0
