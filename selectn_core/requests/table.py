"""Who is in flight: requests that were taken and have not ended, so many at most, each name once."""

from __future__ import annotations

import threading

from selectn_core.config import BatchConfig
from selectn_core.errors import EngineOverloaded, EngineUnavailable, RequestError
from selectn_core.requests.handle import RequestHandle


class RequestTable:
    """An engine's requests by ticket, in the order in which they came; any thread may ask."""

    def __init__(self, batch: BatchConfig) -> None:
        self._batch = batch
        self._handles: dict[str, RequestHandle] = {}
        self._lock = threading.Lock()
        self._closed: str | None = None

    def add(self, handle: RequestHandle) -> None:
        """Raises RequestError (its id is in use), EngineOverloaded when full, EngineUnavailable once closed."""
        batch = self._batch
        with self._lock:
            if self._closed is not None:
                raise EngineUnavailable(self._closed)
            if any(other.request_id == handle.request_id for other in self._handles.values()):
                raise RequestError(f"request_id={handle.request_id!r} is in use", field="request_id")
            if len(self._handles) >= batch.max_requests + batch.max_waiting:
                raise EngineOverloaded(
                    f"{len(self._handles)} requests are running or waiting (batch.max_requests="
                    f"{batch.max_requests}, batch.max_waiting={batch.max_waiting})"
                )
            self._handles[handle.ticket] = handle

    def get(self, ticket: str) -> RequestHandle | None:
        """None for one that has ended, or was cancelled."""
        return self._handles.get(ticket)

    def remove(self, ticket: str) -> RequestHandle | None:
        """Of several that remove the same request one gets it, the others None."""
        with self._lock:
            return self._handles.pop(ticket, None)

    def by_ticket(self) -> dict[str, RequestHandle]:
        """All of them now, in a dictionary of the caller's own."""
        with self._lock:
            return dict(self._handles)

    def remove_all(self) -> list[RequestHandle]:
        """Removes every one and returns them."""
        with self._lock:
            handles = list(self._handles.values())
            self._handles.clear()
        return handles

    def close(self, reason: str) -> None:
        """Takes no more; those that are there go on."""
        with self._lock:
            self._closed = reason

    def __len__(self) -> int:
        return len(self._handles)
