"""An admission over modelled replicas."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.api.errors import ApiError
from deployments.routing.admission import Admission, AdmissionConfig, Turn
from deployments.routing.ask import Ask
from deployments.routing.headroom_report import HeadroomReport, Promise
from deployments.routing.shared_board import SharedBoard

# Of one replica, full of somebody else's requests.
FULL = (Promise(origin="other", tokens=1000, requests=4),)


class Case:
    """An admission over one replica "a" of 1000 tokens."""

    def __init__(self, *, ttft_s: float | None = None, **config: Any) -> None:
        self.shared = SharedBoard("me")
        self.ttft_s, self.num, self.num_reports = ttft_s, 0, 0
        values = {"max_queued_requests": 4, "timeout_s": 5.0, "refuse_late": True, **config}
        self.admission = Admission(self.shared, AdmissionConfig(**values))

    def report(self, *replica_ids: str, **fields: Any) -> None:
        """Of each of the replicas, which are "a" unless they are named."""
        self.num_reports += 1
        values = {"kv_capacity_tokens": 1000, "longest_request_tokens": 1500, "max_requests": 8, **fields}
        with self.shared.locked() as board:
            board.observe(
                {
                    name: HeadroomReport(replica_id=name, reported_s=float(self.num_reports), **values)
                    for name in replica_ids or ("a",)
                }
            )
        self.shared.changed()

    def request(self, tokens: int = 400, key: str = "k", priority: Any = "normal", model: str = "") -> Ask:
        self.num += 1
        return Ask(
            request_id=f"r{self.num}",
            tokens=tokens,
            least_tokens=tokens,
            prompt_tokens=10,
            ttft_s=self.ttft_s,
            model=model,
            key=key,
            priority=priority,
            arrived_s=self.admission.now_s,
        )

    def enter(self, *args: Any, **kwargs: Any) -> asyncio.Task[Turn]:
        return asyncio.ensure_future(self.admission.enter(self.request(*args, **kwargs)))

    def retry(self, *args: Any, died_on: str = "a", **kwargs: Any) -> asyncio.Task[Turn]:
        """Enters again with a request whose replica is said to be dead, though it may be running still."""
        ask = self.request(*args, **kwargs).after_death(died_on, self.admission.now_s)
        return asyncio.ensure_future(self.admission.enter(ask))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(waiting: asyncio.Task[Turn]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await waiting
    return caught.value
