"""Log lines about a request: its id is in the text, for people, and in a field of its own, for what reads logs."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes to `logger` about one request. The id is the server's own: the client sees it as the answer's `id`."""

    def __init__(self, logger: logging.Logger, request_id: str) -> None:
        super().__init__(logger, {"request_id": request_id})
        self._prefix = f"request {request_id}: ".replace("%", "%%")

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{self._prefix}{msg}", {**kwargs, "extra": {**(kwargs.get("extra") or {}), **(self.extra or {})}}
