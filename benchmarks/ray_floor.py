"""What Ray Serve's own path allows: an ingress in front of a replica that streams constants, and does nothing else.

It answers completions as the free model would (`benchmarks/free_model.py`), in events that are ready before they are
asked for. `per_item` in the body is how many tokens one item of the stream from the replica carries.
"""

# No `from __future__ import annotations`: Serve reads the annotations.

import json
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse

from benchmarks.free_model import CYCLE
from deployments.neighbours import NUM_CPUS
from deployments.ray_private import bind_replica_to_node_address

MAX_ONGOING_REQUESTS = 10_000
OPTIONS: dict[str, Any] = {"max_ongoing_requests": MAX_ONGOING_REQUESTS, "ray_actor_options": {"num_cpus": NUM_CPUS}}
HEAD = {"id": f"cmpl-{'0' * 32}", "object": "text_completion", "created": 1_700_000_000, "model": "floor"}


class FloorReplica:
    """Streams constants."""

    def __init__(self) -> None:
        bind_replica_to_node_address()
        self._events = [_event(choices=[{"index": 0, "text": char, "finish_reason": None}]) for char in CYCLE]

    async def stream(self, last: str, num_tokens: int, per_item: int) -> AsyncIterator[str]:
        """The events of a completion whose prompt ends in `last`, `per_item` of them at a time."""
        first = CYCLE.index(last) + 1
        for begin in range(0, num_tokens, per_item):
            numbers = range(first + begin, first + min(begin + per_item, num_tokens))
            yield "".join(self._events[number % len(CYCLE)] for number in numbers)
        usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1}
        yield _event(choices=[{"index": 0, "text": "", "finish_reason": "length"}]) + _event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"


class FloorIngress:
    """Passes on what the replica streams."""

    def __init__(self, replica: DeploymentHandle) -> None:
        bind_replica_to_node_address()
        self._stream = replica.options(stream=True).stream

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.json()
        items = self._stream.remote(body["prompt"][-1], body["max_tokens"], body["per_item"])
        return StreamingResponse(items, media_type="text/event-stream")


def _event(**fields: object) -> str:
    return f"data: {json.dumps({**HEAD, **fields}, separators=(',', ':'))}\n\n"


replica = serve.deployment(FloorReplica, name="FloorReplica", **OPTIONS)
app = serve.deployment(FloorIngress, name="FloorIngress", **OPTIONS).bind(replica.bind())
