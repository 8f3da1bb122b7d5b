"""The HTTP front: one FastAPI application that turns OpenAI requests into calls of a replica."""

from __future__ import annotations

import asyncio
import gc
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Header
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.metrics.meters import Meters
from deployments.api.errors import (
    ErrorResponse,
    context_length_exceeded,
    install_error_handlers,
    unauthorized,
)
from deployments.api.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    Request,
)
from deployments.config import RequestLimits
from deployments.http.api_keys import ApiKeys, load_api_keys
from deployments.http.body import BodyReader
from deployments.http.draining import OrderlyEnd, Stopping
from deployments.http.metrics import IngressMetrics
from deployments.http.responses import ChatWriter, CompletionWriter, Writer, sse_events, whole_response
from deployments.http.status_routes import add_status_routes
from deployments.http.write_budget import WriteBudget
from deployments.messages import ChatMessage, GenerateRequest, ModelCard
from deployments.ray_private import bind_replica_to_node_address, when_told_to_stop
from deployments.routing.admission import Admission, AdmissionConfig
from deployments.routing.replica_client import Generation, ReplicaClient
from deployments.routing.served_models import possible_names
from deployments.routing.shared_board import board_of
from deployments.routing.sizing import PromptSizes
from deployments.status.collect import MOST_DECISIONS, Collector, IngressAnswer
from deployments.status.parts import attainment_part
from deployments.status.schema import IngressPart
from deployments.status.sources import ClusterSources
from selectn_core.config import ModelConfig, SloConfig
from selectn_core.decision_log import LoggedDecision

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503)
}


@serve.ingress()
class Ingress:
    """The ingress deployment's class: builds the FastAPI application in its replica."""

    def __init__(self, replica: DeploymentHandle, limits: RequestLimits, slo: SloConfig, model: ModelConfig) -> None:
        bind_replica_to_node_address()
        self._stopping = Stopping()
        when_told_to_stop(self._stopping.begin)
        self._keys = load_api_keys(limits.api_keys_file, limits.api_keys_env)
        self._board = board_of(serve.get_replica_context().app_name)
        admission = Admission(
            self._board,
            AdmissionConfig(
                max_queued_requests=limits.max_queued_requests,
                timeout_s=limits.admission_timeout_s,
                refuse_late=limits.refuse_late,
            ),
        )
        admission.events = IngressMetrics(Meters("ingress"), lambda: admission.num_waiting, self._num_replicas)
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
        self._service, self._admission = Service(client, WriteBudget(limits.stream_writes_per_s)), admission
        self._limits = limits
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._collector = Collector(
            ClusterSources(replica, own=self._answer, decisions=admission.decisions, replica_ids=self._replica_ids)
        )

    async def snapshot(self) -> dict[str, Any]:
        """The replicas there are, requests that wait here, and what became of those that no engine has taken.

        For a Serve handle, as a replica's.
        """
        return {
            "replica_ids": sorted(self._replica_ids()),
            "num_waiting": self._admission.num_waiting,
            "attainment": self._admission.offered.snapshot(),
        }

    async def status(self) -> IngressAnswer:
        """What the status page shows of this ingress, and its latest decisions. For a handle: another ingress asks."""
        return self._answer()

    async def decision(self, decision_id: str) -> LoggedDecision | None:
        """A decision about an admission by its id; None where it is not kept, or is another ingress's."""
        return self._admission.decisions.find(self._id, decision_id)

    def _answer(self) -> IngressAnswer:
        attainment = attainment_part(self._admission.offered.snapshot())
        return IngressAnswer(
            part=IngressPart(id=self._id, num_waiting=self._admission.num_waiting, attainment=attainment),
            decisions=tuple(self._admission.decisions.latest(self._id, MOST_DECISIONS)),
        )

    def _replica_ids(self) -> frozenset[str]:
        with self._board.locked() as board:
            return board.replica_ids

    def _num_replicas(self) -> int:
        return len(self._replica_ids())

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = build_api(self._service, self._limits, self._keys, self._collector)
        api.add_middleware(OrderlyEnd, stopping=self._stopping)
        # What is imported by now stays. Left to the collector, a few large bodies would have it go through all of that,
        # which stops every request here for a fifth of a second.
        gc.collect()
        gc.freeze()
        return api


class Service:
    """What the routes do, apart from HTTP routing."""

    def __init__(self, replicas: ReplicaClient, budget: WriteBudget) -> None:
        self._replicas, self._budget = replicas, budget

    async def chat(self, body: ChatCompletionRequest, key: str) -> Response | ChatCompletion:
        """POST /v1/chat/completions, for whom the API key belongs to."""
        prompt = tuple(message.to_chat_message() for message in body.messages)
        return await self._generate(ChatWriter, "chatcmpl", body, prompt, body.output_tokens, key)

    async def complete(self, body: CompletionRequest, key: str) -> Response | Completion:
        """POST /v1/completions, for whom the API key belongs to."""
        return await self._generate(CompletionWriter, "cmpl", body, body.prompt, body.max_tokens, key)

    async def models(self) -> ModelList:
        """GET /v1/models."""
        return ModelList(data=tuple(_model(card) for card in await self._replicas.models.cards()))

    async def model(self, name: str) -> Model:
        """GET /v1/models/{name}. Raises ApiError 404 for another model."""
        return _model(await self._replicas.models.card(name))

    @property
    def longest_tokens(self) -> int | None:
        """What a request may have at most, as far as is known."""
        return self._replicas.longest_tokens

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
        await check_prompt_fits(prompt, await self._replicas.card(body.model))
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
            events = sse_events(generation, writer, include_usage=body.include_usage, budget=self._budget)
            return _event_stream(events)

        return await self._replicas.generate(request, read, key=key, priority=body.priority)


def build_api(service: Service, limits: RequestLimits, keys: ApiKeys, collector: Collector | None = None) -> FastAPI:
    """The HTTP application: routes, error shapes, body limit, API keys. `collector` None: without the status.

    With keys there is no /docs and no /openapi.json: who has none sees /health and the empty page of /status.
    """
    urls: dict[str, Any] = dict.fromkeys(("openapi_url", "docs_url", "redoc_url")) if keys.are_required else {}
    api = FastAPI(title="Select-N", description="OpenAI-compatible LLM serving with memory offloading", **urls)
    install_error_handlers(api)
    bodies = BodyReader(limits.max_body_bytes, limits.body_timeout_s)

    async def owner(authorization: str | None = Header(default=None)) -> str:
        name = keys.owner(authorization)
        if name is None:
            raise unauthorized()
        return name

    @api.get("/health")
    @api.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        await service.check_health()
        return JSONResponse({"status": "ok"})

    @api.get("/v1/models", responses=ERRORS, dependencies=[Depends(owner)])
    @api.get("/v1/models/", include_in_schema=False, dependencies=[Depends(owner)])
    @api.head("/v1/models", include_in_schema=False, dependencies=[Depends(owner)])
    async def models() -> ModelList:
        return await service.models()

    @api.get("/v1/models/{name:path}", responses=ERRORS, dependencies=[Depends(owner)])
    @api.head("/v1/models/{name:path}", include_in_schema=False, dependencies=[Depends(owner)])
    async def model(name: str) -> Model:
        return await service.model(name)

    # The body is read here, not by FastAPI, which would read it before it asks whose it is.
    @api.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=ERRORS,
        openapi_extra=body_schema(ChatCompletionRequest),
    )
    async def chat_completions(request: HttpRequest, key: str = Depends(owner)) -> Any:
        body = await bodies.read(request, ChatCompletionRequest, longest_tokens=service.longest_tokens)
        return await service.chat(body, key)

    @api.post(
        "/v1/completions", response_model=Completion, responses=ERRORS, openapi_extra=body_schema(CompletionRequest)
    )
    async def completions(request: HttpRequest, key: str = Depends(owner)) -> Any:
        body = await bodies.read(request, CompletionRequest, longest_tokens=service.longest_tokens)
        return await service.complete(body, key)

    if collector is not None:
        add_status_routes(api, collector, owner)
    return api


async def check_prompt_fits(prompt: str | tuple[int, ...] | tuple[ChatMessage, ...], card: ModelCard) -> None:
    """Raises ApiError 400 for a prompt that cannot fit, before it waits for room.

    A chat is for its replica to judge: templates may leave out some of what is said.
    """
    if isinstance(prompt, str):
        bound = card.text_bound
        if bound is not None and len(prompt) > bound.max_chars:
            refusal = await asyncio.to_thread(bound.refusal, prompt)
            if refusal is not None:
                raise context_length_exceeded(refusal, param="prompt")
    elif len(prompt) >= card.max_model_len and not isinstance(prompt[0], ChatMessage):
        message = f"the prompt has {len(prompt)} tokens; a request may have {card.max_model_len}, prompt and output"
        raise context_length_exceeded(message, param="prompt")


def body_schema(kind: type[Request]) -> dict[str, Any]:
    """The part of an operation in /openapi.json that says what its body is."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return whole(parts[value["$ref"].removeprefix("#/$defs/")])
        return {name: whole(each) for name, each in value.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole(schema)}}}}


def _event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(
        events,
        media_type="text/event-stream",
        # Proxies such as nginx hold a response back until it is complete unless told otherwise.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def _model(card: ModelCard) -> Model:
    return Model(id=card.name, created=card.created_unix_s, max_model_len=card.max_model_len)
