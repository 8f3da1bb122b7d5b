"""The status over HTTP: a page without data, which asks for it; and the data, behind the API key if there is one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response

from deployments import status
from deployments.api.errors import ApiError, ErrorResponse
from deployments.status.collect import Collector, to_json
from deployments.status.schema import Explanation, Status

MAX_ID_CHARS = 128
PAGE: dict[str, tuple[str, str]] = {
    "/status": ("status.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
}
# Nothing comes from elsewhere, nothing is run that is not a file of ours, and no form sends a key into a URL.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def add_status_routes(api: FastAPI, collector: Collector, owner: Callable[..., Awaitable[str]]) -> None:
    """Adds the page, its files, `/status.json` and `/decisions/{id}`. `owner` refuses who has no key."""
    for path, (name, media_type) in PAGE.items():
        page = _page(files(status).joinpath("page", name).read_bytes(), media_type)
        api.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)
    errors: dict[int | str, dict[str, Any]] = {401: {"model": ErrorResponse}}

    @api.get("/status.json", response_model=Status, responses=errors, dependencies=[Depends(owner)])
    @api.head("/status.json", include_in_schema=False, dependencies=[Depends(owner)])
    async def status_json() -> Response:
        return _json(await collector.status())

    @api.get(
        "/decisions/{decision_id}",
        response_model=Explanation,
        responses={**errors, 404: {"model": ErrorResponse}, 503: {"model": ErrorResponse}},
        dependencies=[Depends(owner)],
    )
    @api.head("/decisions/{decision_id}", include_in_schema=False, dependencies=[Depends(owner)])
    async def decision(decision_id: str) -> Response:
        return _json(await _explained(collector, decision_id))


async def _explained(collector: Collector, decision_id: str) -> Explanation:
    shown = "".join(each if each.isprintable() else "?" for each in decision_id[:MAX_ID_CHARS])
    try:
        found = await collector.explain(decision_id) if len(decision_id) <= MAX_ID_CHARS else None
    except TimeoutError:
        raise ApiError(503, f"the place that made the decision '{shown}' does not answer", code="unavailable") from None
    if found is None:
        message = f"there is no decision '{shown}': each place keeps its last ones, and forgets them when it ends"
        raise ApiError(404, message, param="decision_id", code="decision_not_found")
    return found


def _page(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=SAFE_HEADERS)

    return page


def _json(part: Status | Explanation) -> JSONResponse:
    return JSONResponse(to_json(part), headers=SAFE_HEADERS)
