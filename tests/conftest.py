"""What every test shares."""

from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes on a shared machine says nothing about the code.
settings.register_profile("selectn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("selectn")


@pytest.fixture(scope="session", autouse=True)
def imports_out_of_the_collector() -> None:
    """Closing an engine collects garbage; walking all of torch and transformers each time takes half the run."""
    gc.collect()
    gc.freeze()
