"""A real Prometheus that scrapes a test's cluster, and what is asked of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from deployments.commands.serving import free_port
from deployments.dashboards.rules import rules_file
from tests.support.waiting import wait_until

PROMETHEUS = shutil.which("prometheus")
WINDOW = "30s"


def scraped(port: int) -> str:
    """What a node's agent exports, as text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


class Prometheus:
    """Asks the server at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def series(self, expr: str) -> list[float]:
        """The value of each series now. Raises AssertionError for what is no PromQL."""
        asked = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                result = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error
        return [float(each["value"][1]) for each in result]


@contextmanager
def prometheus(directory: Path, ports: Sequence[int]) -> Iterator[Prometheus]:
    """A server with our rules that scrapes these ports every second while the block lasts."""
    assert PROMETHEUS is not None
    (directory / "rules.yml").write_text(rules_file())
    targets = [f"127.0.0.1:{each}" for each in ports]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with (directory / "log").open("w") as log:
        command = [PROMETHEUS, f"--config.file={directory / 'prometheus.yml'}"]
        options = [f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={url.removeprefix('http://')}"]
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    try:
        asked = Prometheus(url)
        wait_until(lambda: _answers(url), 60, "Prometheus")
        yield asked
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return True
    except OSError:
        return False


def panels_of_serve_llm() -> Iterator[tuple[str, str]]:
    """Title and PromQL of every query of Ray's own Serve LLM dashboard, its variables filled in."""
    from ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels import serve_llm_dashboard_config as board

    every = [*board.panels, *(panel for row in board.rows or () for panel in row.panels)]
    for panel in every:
        for target in panel.targets:
            expr = target.expr.format(global_filters="")
            for variable in ("vllm_model_name", "workerid", "deployment", "replica"):
                expr = expr.replace(f"${variable}", ".*")
            yield panel.title, re.sub(r"\$(interval|__rate_interval|__interval|__range)", WINDOW, expr)
