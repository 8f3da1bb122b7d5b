"""Every way a request can fail, in the OpenAI error shape. No message repeats a prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from deployments.api.fields import BRANCHES, in_plain_words, path_to, shown
from deployments.api.protocol import ErrorDetail, ErrorResponse
from deployments.messages import Refused

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MAX_SHOWN_CHARS = 256


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
        if self.status == 408:  # what is still to come of the body is not waited for
            headers["Connection"] = "close"
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
    """400: no replica can ever hold it, so that retrying does not help."""
    return context_length_exceeded(
        f"the request may come to {tokens} tokens, prompt and output; the longest that a replica of this server can "
        f"hold has {longest_tokens}: ask for fewer, or shorten the prompt",
        param="max_tokens",
    )


def context_length_exceeded(message: str, *, param: str | None) -> ApiError:
    """400: longer than a request may be here, whenever it comes."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


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
        return context_length_exceeded(refusal.message, param=refusal.field)
    return ApiError(400, refusal.message, param=refusal.field, code="invalid_value")


def out_of_range(name: str, value: float, low: float, high: float) -> ApiError:
    """400 for a number of the request's own, as a replica says it."""
    message = f"{name}={value:g} is not allowed: expected {low:g} to {high:g}"
    return ApiError(400, message, param=name, code="invalid_value")


def model_not_found(name: str, served: str) -> ApiError:
    """404 for a model this server does not serve."""
    message = f"the model '{shown(name, MAX_SHOWN_CHARS)}' does not exist; this server serves '{served}'"
    return ApiError(404, message, param="model", code="model_not_found")


def install_error_handlers(api: FastAPI) -> None:
    """Makes every failure of `api`, expected or not, answer in the OpenAI shape."""

    @api.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def on_invalid_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        return invalid_field(problem, problem["loc"][1:]).response()

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _http_error(request, error)

    @api.exception_handler(Exception)
    async def on_defect(_: Request, error: Exception) -> JSONResponse:
        return internal().response()


def invalid_field(problem: Mapping[str, Any], location: Sequence[str | int]) -> ApiError:
    """400 for one of pydantic's errors, whose field is at `location`."""
    # Only the server's own names are in pydantic's locations, so what is left out here is no client's.
    place = [part for part in location if part not in BRANCHES]
    param, context = path_to(place), problem.get("ctx") or {}
    if "param" in context:  # an object's error about one of its fields
        where = f"{param}: " if param is not None else ""
        param = path_to((*place, str(context["param"])))
        return ApiError(400, f"{where}{problem['msg']}", param=param, code="unsupported_field")
    message = in_plain_words(problem["type"], problem["msg"], context)
    return ApiError(400, f"{param or 'body'}: {message}", param=param, code="invalid_value")


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    allowed, path = ", ".join(_allowed_methods(request)), shown(request.url.path, MAX_SHOWN_CHARS)
    messages = {
        404: f"unknown URL: {request.method} {path}",
        405: f"{request.method} is not allowed for {path}; allowed: {allowed}",
    }
    if request.method == "OPTIONS" and error.status_code == 405:
        messages[405] += ". This server does not take part in CORS: pages of other origins cannot call it"
    message = messages.get(error.status_code, str(error.detail))
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = allowed
    return response


def _allowed_methods(request: Request) -> list[str]:
    """Of every route with this path; the framework names the first one's only."""
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})
