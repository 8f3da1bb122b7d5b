"""A bound on request bodies, whatever Content-Length claims: FastAPI itself reads a body to its end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import ApiError


class BodyLimit:
    """ASGI middleware that answers 413 as soon as a body has more than `max_body_bytes`."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise _BodyTooLarge
            return message

        try:
            await self._app(scope, counted_receive, send)
        except _BodyTooLarge:
            await self._too_large().response()(scope, receive, send)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_body_bytes} bytes"
        return ApiError(413, message, code="body_too_large")


class _BodyTooLarge(BaseException):
    """Not an Exception: FastAPI turns those raised while a body is read into a 400 of its own."""
