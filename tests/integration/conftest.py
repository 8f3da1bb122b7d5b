"""One Ray and one Serve for all tests here: real processes, real HTTP, a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.commands.local_cluster import ClusterConfig, local_cluster
from deployments.commands.serving import base_urls, deployed, free_port, wait_until_serving
from deployments.config import IMPORT_PATH, REPLICA_NAME
from tests.support.processes import alive
from tests.support.tiny_checkpoint import NUM_LAYERS, save_tiny_llama

MODEL = "tiny"
# A layer takes about 0.15 MB / 0.008 GB/s = 18 ms to arrive: slow enough to act during a generation.
SLOW_LINK_GB_PER_S = 0.008
SMALL_MAX_REQUESTS, SMALL_MAX_WAITING, SMALL_TTFT_MS = 2, 1, 6000
# Two replicas behind two ingresses, every layer offloaded, so that steps take about 70 ms.
PAIR_MAX_REQUESTS, PAIR_MAX_QUEUED, NUM_PAIR_INGRESSES = 2, 2, 2
PAIR_KEY = "the-key-of-the-tests"


def application(name: str, route_prefix: str, source: str, **args: Any) -> dict[str, Any]:
    """One Select-N application of a Serve config."""
    return {
        "name": name,
        "route_prefix": route_prefix,
        "import_path": IMPORT_PATH,
        "args": {
            "model": {"source": source, "served_name": MODEL, "dtype": "float32"},
            "device": {"kind": "emulated", "link_gb_per_s": SLOW_LINK_GB_PER_S, "compute_threads": 1},
            "offload": {"num_offloaded": 0},
            "shutdown_grace_s": 1,
            "slo": {"ttft_ms": 60_000, "tpot_ms": 10_000},  # on this link few others would be met
            "cluster": {"coordinator": False},  # test_cluster.py has one, and test_coordinator.py brings its own
            **args,
        },
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def api_keys_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"tests {PAIR_KEY}\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def document(checkpoint, api_keys_file) -> dict[str, Any]:
    """The application under test, one with room for few requests, and one of two replicas."""
    pair = {
        "num_replicas": 2,
        "num_ingress_replicas": NUM_PAIR_INGRESSES,
        "batch": {"max_requests": PAIR_MAX_REQUESTS, "max_waiting": 8, "kv_tokens": 256},
        "offload": {"num_offloaded": NUM_LAYERS},
        "limits": {"max_queued_requests": PAIR_MAX_QUEUED, "api_keys_file": api_keys_file},
        "shutdown_grace_s": 20,
    }
    small = {"max_requests": SMALL_MAX_REQUESTS, "max_waiting": SMALL_MAX_WAITING, "kv_tokens": 1024}
    return {
        "http_options": {"host": "127.0.0.1", "port": free_port("127.0.0.1")},
        "applications": [
            application("main", "/", checkpoint, limits={"max_body_bytes": 20_000}),
            application(
                "small",
                "/small",
                checkpoint,
                batch=small,
                limits={"max_queued_requests": 0},
                slo={"ttft_ms": SMALL_TTFT_MS, "tpot_ms": 10_000},
            ),
            application("pair", "/pair", checkpoint, **pair),
        ],
    }


@pytest.fixture(scope="session")
def cluster_processes() -> list[psutil.Process]:
    """Filled when the cluster has started."""
    return []


@pytest.fixture(scope="session")
def urls(document, cluster_processes) -> Iterator[list[str]]:
    """Base URLs of the running applications. Fails at the end if a process is left."""
    with local_cluster(ClusterConfig(address="local", num_cpus=2)), deployed(document):
        wait_until_serving(document, lambda elapsed_s: None)
        cluster_processes.extend(psutil.Process().children(recursive=True))
        yield base_urls(document)
    assert not alive(cluster_processes)


@pytest.fixture(scope="session")
def base_url(urls) -> str:
    return urls[0]


@pytest.fixture(scope="session")
def small_url(urls) -> str:
    return urls[1]


@pytest.fixture(scope="session")
def replica(urls) -> DeploymentHandle:
    return serve.get_deployment_handle(REPLICA_NAME, "main")


@pytest.fixture(scope="session")
def small_replica(urls) -> DeploymentHandle:
    return serve.get_deployment_handle(REPLICA_NAME, "small")


@pytest.fixture(scope="session")
def http(base_url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(base_url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def slow(replica) -> Iterator[None]:
    """Steps of about 70 ms while the test runs: every layer has to arrive."""
    replica.set_num_offloaded.remote(NUM_LAYERS).result()
    yield
    replica.set_num_offloaded.remote(0).result()
