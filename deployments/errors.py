"""Every way a request can fail, in the OpenAI error shape. No message repeats a prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.messages import Refused
from deployments.protocol import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1


class ApiError(Exception):
    """An expected failure of one request, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> ErrorResponse:
        """The error as the API shows it."""
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error"
        kind = "server_error" if self.status >= 500 else kind
        return ErrorResponse(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """The error as a whole HTTP response."""
        wait_s = self.retry_after_s
        headers = {} if wait_s is None else {"Retry-After": str(max(1, round(wait_s)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body().model_dump(), status_code=self.status, headers=headers)


def overloaded(
    message: str = "the server is at capacity; retry later", *, retry_after_s: float = RETRY_AFTER_S
) -> ApiError:
    """429: the queue is full, or nothing came free in time."""
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)


def late(ttft_s: float, retry_after_s: float) -> ApiError:
    """429: it would be served, but not in time."""
    message = (
        f"the first token would not come within the objective of {ttft_s * 1e3:.0f} ms; retry later "
        "(limits.refuse_late: false has requests wait instead)"
    )
    return ApiError(429, message, code="objective_unreachable", retry_after_s=retry_after_s)


def too_large(tokens: int, longest_tokens: int) -> ApiError:
    """503: no replica can ever hold it; retrying does not help, so nothing says when."""
    message = (
        f"the request may come to {tokens} tokens, prompt and output; the longest that a replica of this server can "
        f"hold has {longest_tokens}: ask for fewer, or shorten the prompt"
    )
    return ApiError(503, message, param="max_tokens", code="request_too_large")


def unauthorized() -> ApiError:
    """401: no API key, or a wrong one."""
    return ApiError(401, "a valid API key is required: Authorization: Bearer <key>", code="invalid_api_key")


def unavailable(message: str = "the model is not available now; retry later") -> ApiError:
    """503: no replica can take the request."""
    return ApiError(503, message, code="unavailable", retry_after_s=RETRY_AFTER_S)


def internal() -> ApiError:
    """500, without details: they are in the log."""
    return ApiError(500, "the server failed while answering this request", code="internal_error")


def refused(refusal: Refused) -> ApiError:
    """A replica's refusal as the client sees it."""
    if refusal.kind == "overloaded":
        return overloaded(refusal.message)
    if refusal.kind == "unavailable":
        return unavailable(refusal.message)
    if refusal.kind == "too_large":
        return ApiError(503, refusal.message, param=refusal.field, code="request_too_large")
    return ApiError(400, refusal.message, param=refusal.field, code="invalid_value")


def out_of_range(name: str, value: float, low: float, high: float) -> ApiError:
    """400 for a number of the request's own, as a replica says it."""
    message = f"{name}={value:g} is not allowed: expected {low:g} to {high:g}"
    return ApiError(400, message, param=name, code="invalid_value")


def model_not_found(name: str, served: str) -> ApiError:
    """404 for a model this server does not serve."""
    message = f"the model '{name}' does not exist; this server serves '{served}'"
    return ApiError(404, message, param="model", code="model_not_found")


def install_error_handlers(api: FastAPI) -> None:
    """Makes every failure of `api`, expected or not, answer in the OpenAI shape."""

    @api.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def on_invalid_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_body(error).response()

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _http_error(request, error)

    @api.exception_handler(Exception)
    async def on_defect(_: Request, error: Exception) -> JSONResponse:
        return internal().response()


def invalid_body(error: RequestValidationError) -> ApiError:
    """400 for the first problem of a body, naming the field."""
    problem: Mapping[str, object] = error.errors()[0]
    context = problem.get("ctx")
    if problem["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if isinstance(context, Mapping) and "param" in context:
        return ApiError(400, str(problem["msg"]), param=str(context["param"]), code="unsupported_field")
    location = problem["loc"]
    param = _param(location) if isinstance(location, tuple) else None
    message = str(problem["msg"]).replace("Input should be", "expected")
    return ApiError(400, f"{param or 'body'}: {message}", param=param, code="invalid_value")


def _param(location: tuple[object, ...]) -> str | None:
    """('body', 'messages', 0, 'content', 'str') as "messages[0].content": union branches are left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif str(part).isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else str(part)
    return path or None


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    messages = {
        404: f"unknown URL: {request.method} {request.url.path}",
        405: f"{request.method} is not allowed for {request.url.path}",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response
