"""What every test shares."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.imports import libraries_of

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for every core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HEAVY = {"torch", "transformers", "ray"}

# How long an example takes on a shared machine says nothing about the code.
settings.register_profile("selectn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("selectn")
settings.register_profile("fast", settings.get_profile("selectn"), max_examples=20)


@pytest.fixture(scope="session", autouse=True)
def imports_out_of_the_collector() -> None:
    """Closing an engine collects garbage; walking all of torch and transformers each time takes half the run."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests that load neither torch nor Ray, and are not marked slow"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        settings.load_profile("fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`: loading torch alone takes longer than these tests."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.getoption("--fast") and is_test and HEAVY & libraries_of(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests that load Ray `ray`, and all that start servers `slow`. With `--fast` slow ones are left out."""
    for item in items:
        if "ray" in libraries_of(item.path):
            item.add_marker(pytest.mark.ray)
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.slow)
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
