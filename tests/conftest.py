"""What every test shares."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def imports_out_of_the_collector() -> None:
    """Closing an engine collects garbage; walking all of torch and transformers each time takes half the run."""
    gc.collect()
    gc.freeze()
