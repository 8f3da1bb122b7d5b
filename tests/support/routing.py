"""What tests of routing have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from deployments.routing.headroom_report import Promise

TIMEOUT_S = 20


def run(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test that is a coroutine; fails where it waits for ever."""
    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


def others(tokens: int, requests: int = 1) -> tuple[Promise, ...]:
    """What the door has promised to another ingress's requests."""
    return (Promise(origin="other", tokens=tokens, requests=requests),)
