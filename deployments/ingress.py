"""The HTTP front: one FastAPI application that turns OpenAI requests into calls of a replica."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from fastapi import Depends, FastAPI, Header
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.admission import Admission, AdmissionConfig
from deployments.api_keys import ApiKeys, load_api_keys
from deployments.board import board_of
from deployments.body_limit import BodyLimit
from deployments.config import RequestLimits
from deployments.draining import OrderlyEnd, Stopping
from deployments.errors import ErrorResponse, install_error_handlers, unauthorized
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
from deployments.ray_private import bind_replica_to_node_address, when_told_to_stop
from deployments.responses import ChatWriter, CompletionWriter, Writer, sse_events, whole_response
from deployments.served_models import possible_names
from deployments.sizing import PromptSizes
from selectn_core.config import ModelConfig, SloConfig

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503)
}


@serve.ingress()
class Ingress:
    """The ingress deployment's class: builds the FastAPI application in its replica."""

    def __init__(self, replica: DeploymentHandle, limits: RequestLimits, slo: SloConfig, model: ModelConfig) -> None:
        bind_replica_to_node_address()
        self._stopping = Stopping()
        when_told_to_stop(self._stopping.begin)
        self._keys = load_api_keys(limits.api_keys_file, limits.api_keys_env)
        admission = Admission(
            board_of(serve.get_replica_context().app_name),
            AdmissionConfig(
                max_queued_requests=limits.max_queued_requests,
                timeout_s=limits.admission_timeout_s,
                refuse_late=limits.refuse_late,
            ),
        )
        sizes = PromptSizes(limits.default_max_tokens)
        ttft_s = None if slo.ttft_ms == "auto" else slo.ttft_ms / 1e3
        client = ReplicaClient(
            replica,
            admission,
            sizes,
            ttft_s=ttft_s,
            timeout_s=limits.admission_timeout_s,
            model_names=possible_names(model),
        )
        self._service = Service(client)
        self._limits = limits

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = build_api(self._service, self._limits, self._keys)
        api.add_middleware(OrderlyEnd, stopping=self._stopping)
        return api


class Service:
    """What the routes do, apart from HTTP routing."""

    def __init__(self, replicas: ReplicaClient) -> None:
        self._replicas = replicas

    async def chat(self, body: ChatCompletionRequest, key: str) -> Response | ChatCompletion:
        """POST /v1/chat/completions, for whom the API key belongs to."""
        prompt = tuple(message.to_chat_message() for message in body.messages)
        return await self._generate(ChatWriter, "chatcmpl", body, prompt, body.output_tokens, key)

    async def complete(self, body: CompletionRequest, key: str) -> Response | Completion:
        """POST /v1/completions, for whom the API key belongs to."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await self._generate(CompletionWriter, "cmpl", body, body.prompt, max_tokens, key)

    async def models(self) -> ModelList:
        """GET /v1/models."""
        return ModelList(data=tuple(_model(card) for card in await self._replicas.models.cards()))

    async def model(self, name: str) -> Model:
        """GET /v1/models/{name}. Raises ApiError 404 for another model."""
        return _model(await self._replicas.models.card(name))

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
        key: str,
    ) -> Any:
        await self.model(body.model)
        request_id = f"{id_prefix}-{uuid.uuid4().hex}"
        request = GenerateRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=body.sampling(max_tokens),
            stop=body.stop,
            model=body.model,
            ttft_ms=body.slo.ttft_ms if body.slo is not None else None,
            tpot_ms=body.slo.tpot_ms if body.slo is not None else None,
        )
        writer = writer_type(request_id, body.model)

        async def read(generation: Generation) -> Any:
            if not body.stream:
                return await whole_response(generation, writer)
            return _event_stream(generation, writer, include_usage=body.include_usage)

        return await self._replicas.generate(request, read, key=key, priority=body.priority)


def build_api(service: Service, limits: RequestLimits, keys: ApiKeys) -> FastAPI:
    """The HTTP application: routes, error shapes, body limit, API keys."""
    api = FastAPI(title="Select-N", description="OpenAI-compatible LLM serving with memory offloading")
    install_error_handlers(api)
    api.add_middleware(BodyLimit, max_body_bytes=limits.max_body_bytes)

    async def owner(authorization: str | None = Header(default=None)) -> str:
        name = keys.owner(authorization)
        if name is None:
            raise unauthorized()
        return name

    @api.get("/health")
    async def health() -> JSONResponse:
        await service.check_health()
        return JSONResponse({"status": "ok"})

    @api.get("/v1/models", responses=ERRORS, dependencies=[Depends(owner)])
    async def models() -> ModelList:
        return await service.models()

    @api.get("/v1/models/{name:path}", responses=ERRORS, dependencies=[Depends(owner)])
    async def model(name: str) -> Model:
        return await service.model(name)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
    async def chat_completions(body: ChatCompletionRequest, key: str = Depends(owner)) -> Any:
        return await service.chat(body, key)

    @api.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def completions(body: CompletionRequest, key: str = Depends(owner)) -> Any:
        return await service.complete(body, key)

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
