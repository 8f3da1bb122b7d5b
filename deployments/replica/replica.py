"""One replica: it owns the engine and the tokenizer, and turns requests into text.

Text is made and read here, not in the ingress: the tokenizer belongs to the checkpoint the replica has
loaded, so the ingress stays free of torch and of model files, and tokenising scales with the replicas.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from cluster.metrics.meters import Meters
from cluster.node.telemetry import TelemetryConfig
from cluster.replica.member import Member
from cluster.services import CoordinationConfig
from deployments.declared import apply_declared, declared
from deployments.messages import (
    Accepted,
    ChatMessage,
    GenerateMessage,
    GenerateRequest,
    ModelCard,
    Refused,
    Sampling,
)
from deployments.prompt_length import text_bound
from deployments.ray_private import bind_replica_to_node_address
from deployments.replica.detokenizer import Detokenizer
from deployments.replica.door import Door, Visit
from deployments.replica.membership import open_member
from deployments.replica.metrics import ReplicaMetrics
from deployments.replica.outlet import OutletServer
from deployments.replica.prompting import PromptEncoder
from deployments.replica.report import replica_report, served_fields
from deployments.replica.streams import RequestText, Streams
from deployments.replica.tracing import TracedRequest
from deployments.routing.prefixes import RecentPrefixes, prefix_hashes
from deployments.routing.sizing import prompt_bytes
from deployments.status.collect import MOST_DECISIONS, ReplicaAnswer
from deployments.status.parts import replica_facts
from selectn_core.config import EngineConfig, SloConfig
from selectn_core.decision_log import LoggedDecision
from selectn_core.errors import (
    ConfigError,
    EngineOverloaded,
    EngineUnavailable,
    RequestError,
    RequestTooLarge,
    UnsupportedModel,
)

# torch and transformers are imported when a replica starts: building the application, which imports this
# module in a process of its own, takes seconds less without them.
if TYPE_CHECKING:
    from selectn_core.engine.engine import Engine
    from selectn_core.requests.sampling import SamplingParams

logger = logging.getLogger(__name__)


class _Overdue(Exception):
    """A request has waited at the door for as long as it may."""


class SelectNReplica:
    """The replica deployment's class. Its methods are called through a Serve handle."""

    async def __init__(  # type: ignore[misc]
        self,
        config: EngineConfig,
        default_max_tokens: int,
        cluster: CoordinationConfig,
        telemetry: TelemetryConfig,
    ) -> None:
        bind_replica_to_node_address()
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._args, self._declared = config, config
        self._is_configured = False
        self._user_config_problem: str | None = None
        self._default_max_tokens = default_max_tokens
        self._outlet = OutletServer()
        began_s = time.monotonic()
        self._member, _ = await asyncio.gather(
            asyncio.to_thread(open_member, cluster, telemetry, num_sharing=config.offload.num_sharing),
            asyncio.to_thread(import_module, "selectn_core.start"),  # which takes as long
        )
        cluster_s = time.monotonic() - began_s
        self._engine = await asyncio.to_thread(_started_engine, config, self._member)
        self._engine.startup_s |= {"cluster": cluster_s, "total": time.monotonic() - began_s}
        close_at_exit(self._engine)
        self._tokenizer: Any = self._engine.tokenizer
        self._text_bound = text_bound(self._tokenizer, self._engine.max_model_len)
        self._prompts = PromptEncoder(self._tokenizer, self._text_bound)
        self._created_unix_s = int(time.time())
        self._prefixes = RecentPrefixes()
        self._door = await asyncio.to_thread(
            Door,
            self._engine.reachable_kv_tokens,
            self._engine.footprint_tokens,
            max_requests=config.batch.max_requests,
            max_waiting=config.batch.max_waiting,
            longest=self._engine.max_model_len,
        )
        await self._outlet.open(ray.util.get_node_ip_address())
        self._streams = Streams(self._outlet, stepped=self._door.progressed)
        self._headroom_tokens = self._engine.reachable_kv_tokens()
        label = {"model_name": self._engine.model_name}
        genai = Meters("genai", label) if telemetry.genai_metrics else None
        self._metrics = ReplicaMetrics(Meters("replica", label), self._state, self._engine.steps.records, genai)
        self._engine.observe(self._metrics.numbers)
        logger.info("serving %s", self._engine.model_name)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateMessage]:
        """Refused, or Accepted and what `Stream.messages` says. Abandoning the iterator cancels the request."""
        came_s = time.monotonic()
        if request.model not in ("", self._engine.model_name):  # its caller has not heard yet who serves what
            yield Refused(kind="unavailable", message=f"this replica does not serve the model '{request.model}'")
            return
        try:
            prompt_ids = await self._prompts.encode(request)
            check_length(len(prompt_ids), request.sampling.max_tokens, self._engine.max_model_len)
            params = self._sampling_params(request.sampling, len(prompt_ids))
            self._engine.check_request(prompt_ids, params)
            objectives = self._engine.objectives_for(ttft_ms=request.ttft_ms, tpot_ms=request.tpot_ms)
            traced = TracedRequest(self._engine)
            async with self._let_in(request, prompt_ids, params) as visit:
                handle = self._engine.submit(
                    prompt_ids,
                    params,
                    request_id=request.request_id,
                    objectives=objectives,
                    waited_s=request.waited_s + time.monotonic() - came_s,
                    returns=True,  # the ingress offers it again, and counts what it refuses in the end
                )
                visit.num_generated = lambda: handle.num_tokens
                try:
                    text = RequestText(handle, Detokenizer(self._tokenizer, prompt_ids), request.stop)
                    with closing(self._streams.open(text, request)) as stream:
                        yield Accepted(
                            num_prompt_tokens=handle.num_prompt_tokens,
                            outlet=self._outlet.outlet if request.inbox else None,
                            connection=stream.connection,
                        )
                        async for message in stream.messages():
                            yield message
                finally:
                    # A client that went away, a stop string, or nothing: cancelling a finished request is harmless.
                    handle.cancel()
                    traced.end(handle)
        except RequestTooLarge as error:
            yield Refused(kind="too_large", message=str(error), field=_body_field(error, request))
        except RequestError as error:
            yield Refused(kind="invalid", message=str(error), field=_body_field(error, request))
        except EngineOverloaded as error:
            yield Refused(kind="overloaded", message=str(error))
        except _Overdue:
            yield Refused(kind="overdue", message="no room came free in time")
        except EngineUnavailable as error:
            yield Refused(kind="unavailable", message=str(error))

    @asynccontextmanager
    async def _let_in(
        self, request: GenerateRequest, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[Visit]:
        """Waits at the door until the request's KV is sure to fit; holds that promise while the block lasts."""
        decided: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        visit = Visit(
            origin=request.origin,
            sequence=request.sequence,
            prompt_tokens=len(prompt_ids),
            total_tokens=len(prompt_ids) + params.max_tokens,
            decide=lambda may_enter: None if decided.done() else decided.set_result(may_enter),
        )
        self._door.knock(visit)
        try:
            try:
                async with asyncio.timeout(request.wait_s):
                    may_enter = await decided
            except TimeoutError:
                raise _Overdue from None
            if not may_enter:
                raise EngineUnavailable("this replica is stopping; send the request again")
            self._prefixes.add(prefix_hashes(prompt_bytes(request)))
            yield visit
        finally:
            self._door.leave(visit)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve's hook, called every `headroom_period_s`: what the routers rank this replica by."""
        self._door.let_in()
        report = replica_report(self._replica_id, self._engine, self._door, self._prefixes)
        promised_tokens = sum(promise.tokens for promise in report.promises)
        self._headroom_tokens = max(0, report.kv_capacity_tokens - promised_tokens)
        return replace(report, **served_fields(await self.model_card())).to_json()

    async def model_card(self) -> ModelCard:
        """What /v1/models shows."""
        return ModelCard(
            name=self._engine.model_name,
            max_model_len=self._engine.max_model_len,
            created_unix_s=self._created_unix_s,
            text_bound=self._text_bound,
        )

    # Those that follow are for people and scripts, through a Serve handle. The router takes a call to the replica
    # that `replica_id` names; without it to any. The ids are in the ingress's `snapshot`.

    async def drain(self, *, replica_id: str | None = None) -> None:
        """Lets no request in any more, and sends those at the door elsewhere; those inside finish."""
        require_replica(replica_id, self._replica_id)
        self._door.close()

    async def snapshot(self, *, replica_id: str | None = None) -> dict[str, Any]:
        """The engine's state, as plain JSON data, whose it is, and what the cluster allows it."""
        require_replica(replica_id, self._replica_id)
        return self._state(is_brief=False)

    def _state(self, *, is_brief: bool = True) -> dict[str, Any]:
        """What `snapshot` says; any thread."""
        return {
            **self._engine.snapshot(is_brief=is_brief),
            "replica_id": self._replica_id,
            "cluster": self._member.snapshot() if self._member is not None else None,
            "at_door": self._door.num_waiting,
            "headroom_tokens": self._headroom_tokens,
            "user_config_problem": self._user_config_problem,
        }

    async def status(self, *, replica_id: str | None = None) -> ReplicaAnswer:
        """What the status page shows of this replica, and its latest decisions."""
        require_replica(replica_id, self._replica_id)
        history = list(self._engine.steps.k_history.copy())
        return ReplicaAnswer(
            facts=replica_facts(self._state(), node_id=ray.get_runtime_context().get_node_id(), k_history=history),
            decisions=tuple(self._engine.offloading.decisions.latest(self._replica_id, MOST_DECISIONS)),
        )

    async def decision(self, decision_id: str, *, replica_id: str | None = None) -> LoggedDecision | None:
        """A decision about this replica's plan by its id; None where it is not kept, or is another replica's."""
        require_replica(replica_id, self._replica_id)
        return self._engine.offloading.decisions.find(self._replica_id, decision_id)

    async def set_num_offloaded(
        self, num_offloaded: int, num_slots: int | None = None, *, replica_id: str | None = None
    ) -> None:
        """Changes this replica's plan from its next iteration on. Raises ConfigError if it does not fit."""
        require_replica(replica_id, self._replica_id)
        self._engine.set_num_offloaded(num_offloaded, num_slots)

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: Any = None) -> None:
        """Serve's hook for `user_config`, when the replica starts and when it has changed: the replica goes on running.

        Serve calls it without a `user_config`, after one was removed, only because it takes a `rank`. One that is wrong
        ends a replica that starts, and changes nothing in one that runs: Serve would replace it with one that fails.
        """
        try:
            wanted = declared(self._args, user_config)
            if wanted != self._declared:
                apply_declared(self._engine, wanted)
        except ConfigError as error:
            if not self._is_configured:
                raise
            self._user_config_problem = str(error)
            logger.error("user_config is wrong and changes nothing: %s", error)
            return
        self._declared, self._is_configured, self._user_config_problem = wanted, True, None

    async def set_objectives(self, slo: SloConfig, *, replica_id: str | None = None) -> None:
        """Changes the objectives from the next iteration on, for requests in flight too."""
        require_replica(replica_id, self._replica_id)
        self._engine.set_objectives(slo)

    async def check_health(self) -> None:
        """Serve's health check: raising has this replica replaced."""
        if not self._engine.is_healthy():
            raise EngineUnavailable("the engine has stopped")

    async def __del__(self) -> None:
        """Serve awaits this once, when the replica is shut down in order."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            self._door.close()
            await self._outlet.close()
            await asyncio.to_thread(_close, engine, self._member)
            await asyncio.to_thread(self._metrics.close)
            self._prompts.close()

    def _sampling_params(self, sampling: Sampling, num_prompt_tokens: int) -> SamplingParams:
        from selectn_core.requests.sampling import SamplingParams

        room = self._engine.max_model_len - num_prompt_tokens
        default = sampling.default_max_tokens or self._default_max_tokens
        return SamplingParams(
            max_tokens=min(default, room) if sampling.max_tokens is None else sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )


def check_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raises RequestTooLarge for more than a request may have, and says which of its parts is too long."""
    if num_prompt_tokens >= max_model_len:
        raise RequestTooLarge(
            f"the prompt has {num_prompt_tokens} tokens; a request may have {max_model_len} here, prompt and output",
            field="prompt",
        )
    if num_prompt_tokens + (max_tokens or 1) > max_model_len:
        raise RequestTooLarge(
            f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} are more than the {max_model_len} tokens "
            "that a request may have here",
            field="max_tokens",
        )


def require_replica(wanted: str | None, own: str) -> None:
    """Raises ConfigError where a call was for another replica than this one."""
    if wanted is not None and wanted != own:
        raise ConfigError(
            f"replica_id={wanted!r}: no such replica takes calls (this one is {own!r}); "
            "the ingress's snapshot has the ids of those that run"
        )


def _body_field(error: RequestError, request: GenerateRequest) -> str | None:
    """The HTTP field at fault: a chat's prompt was made from its messages."""
    is_chat = any(isinstance(part, ChatMessage) for part in request.prompt)
    return "messages" if error.field == "prompt" and is_chat else error.field


def _started_engine(config: EngineConfig, member: Member | None) -> Engine:
    from selectn_core.start import load_engine  # late: it imports torch

    if member is None:
        engine = load_engine(config)
    else:
        member.reserve_kv(config.host.kv_gib)
        engine = load_engine(config, reserve_host=member.reserve)
    if engine.tokenizer is None:
        engine.close()
        raise UnsupportedModel(f"{engine.model_name} has no tokenizer, which serving text needs")
    if member is not None:
        member.join(engine, member.bus_of(engine))
    engine.start()
    return engine


def close_at_exit(engine: Engine) -> None:
    """Closes the engine when its process is about to end without a word to the replica, as where its raylet has gone.

    Python waits for the threads that generate and copy: nothing else would ever end them, or free the device.
    """

    def close() -> None:
        threading.main_thread().join()
        engine.close()

    threading.Thread(target=close, name="close-at-exit", daemon=True).start()


def _close(engine: Engine, member: Member | None) -> None:
    if member is not None:
        member.stop()
    engine.close()
    if member is not None:
        member.leave()
