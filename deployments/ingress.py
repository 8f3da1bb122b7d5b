"""The HTTP front: one FastAPI application that turns OpenAI requests into calls of a replica."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.body_limit import BodyLimit
from deployments.config import RequestLimits
from deployments.errors import ErrorResponse, install_error_handlers, model_not_found
from deployments.generation import Generation, ReplicaClient
from deployments.messages import ChatMessage, GenerateRequest, ModelCard
from deployments.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    Request,
)
from deployments.ray_private import bind_replica_to_node_address
from deployments.responses import ChatWriter, CompletionWriter, Writer, sse_events, whole_response

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 413, 429, 500, 503)
}


@serve.ingress()
class Ingress:
    """The ingress deployment's class: builds the FastAPI application in its replica."""

    def __init__(self, replica: DeploymentHandle, limits: RequestLimits) -> None:
        bind_replica_to_node_address()
        self._service = Service(ReplicaClient(replica, limits.admission_timeout_s))
        self._limits = limits

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._limits)


class Service:
    """What the routes do, apart from HTTP routing."""

    def __init__(self, replicas: ReplicaClient) -> None:
        self._replicas = replicas

    async def chat(self, body: ChatCompletionRequest) -> Response | ChatCompletion:
        """POST /v1/chat/completions."""
        prompt = tuple(message.to_chat_message() for message in body.messages)
        return await self._generate(ChatWriter, "chatcmpl", body, prompt, body.output_tokens)

    async def complete(self, body: CompletionRequest) -> Response | Completion:
        """POST /v1/completions."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await self._generate(CompletionWriter, "cmpl", body, body.prompt, max_tokens)

    async def models(self) -> ModelList:
        """GET /v1/models."""
        return ModelList(data=(_model(await self._replicas.model_card()),))

    async def model(self, name: str) -> Model:
        """GET /v1/models/{name}. Raises ApiError 404 for another model."""
        card = await self._replicas.model_card()
        if name != card.name:
            raise model_not_found(name, card.name)
        return _model(card)

    async def check_health(self) -> None:
        """Raises ApiError 503 unless a replica answers that it is healthy."""
        await self._replicas.check_health()

    async def _generate(
        self,
        writer_type: type[Writer],
        id_prefix: str,
        body: Request,
        prompt: str | tuple[int, ...] | tuple[ChatMessage, ...],
        max_tokens: int | None,
    ) -> Any:
        await self.model(body.model)
        request_id = f"{id_prefix}-{uuid.uuid4().hex}"
        request = GenerateRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=body.sampling(max_tokens),
            stop=body.stop,
            ttft_ms=body.slo.ttft_ms if body.slo is not None else None,
            tpot_ms=body.slo.tpot_ms if body.slo is not None else None,
        )
        generation = await self._replicas.generate(request)
        writer = writer_type(request_id, body.model)
        if not body.stream:
            return await whole_response(generation, writer)
        return _event_stream(generation, writer, include_usage=body.include_usage)


def build_api(service: Service, limits: RequestLimits) -> FastAPI:
    """The HTTP application: routes, error shapes, body limit."""
    api = FastAPI(title="Select-N", description="OpenAI-compatible LLM serving with memory offloading")
    install_error_handlers(api)
    api.add_middleware(BodyLimit, max_body_bytes=limits.max_body_bytes)

    @api.get("/health")
    async def health() -> JSONResponse:
        await service.check_health()
        return JSONResponse({"status": "ok"})

    @api.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        return await service.models()

    @api.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> Model:
        return await service.model(name)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
    async def chat_completions(body: ChatCompletionRequest) -> Any:
        return await service.chat(body)

    @api.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def completions(body: CompletionRequest) -> Any:
        return await service.complete(body)

    return api


def _event_stream(generation: Generation, writer: Writer, *, include_usage: bool) -> StreamingResponse:
    return StreamingResponse(
        sse_events(generation, writer, include_usage=include_usage),
        media_type="text/event-stream",
        # Proxies such as nginx hold a response back until it is complete unless told otherwise.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def _model(card: ModelCard) -> Model:
    return Model(id=card.name, created=card.created_unix_s, max_model_len=card.max_model_len)
