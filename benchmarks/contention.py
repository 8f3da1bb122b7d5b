"""Two engines in two processes on one emulated bus: with equal fixed shares, and as the coordinator divides it. No Ray.

Both serve the same model from devices that hold its resident weights and the KV cache of two requests; one has a tight
TPOT objective, the other a loose one, and each gets requests at random (Poisson), at two rates, shares of what it could
serve with half of the bus for itself. With equal shares each may use half of the bus, whatever happens. With the
coordinator both are members of a cluster: the production `Member`, range client and coordinator actor's class, whose
calls go through a process of their own in place of Ray.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseManager
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.common import attained, random_prompts
from benchmarks.small_device import (
    BATCH,
    FULL_STEP,
    NEW_TOKENS,
    PROMPT_TOKENS,
    capacity,
    device_gib,
    roomy_record,
    with_memory,
)
from cluster.coordinator.actor import CoordinatorActor
from cluster.coordinator.coordinator import CoordinatorConfig
from cluster.node.host_claims import HostClaims
from cluster.protocol.messages import BusState, NodeState, RangeUpdate, ReplicaReport
from cluster.protocol.node_reports import HostAnswer, HostClaim
from cluster.replica.member import Member
from selectn_core.config import DeviceConfig, EngineConfig, ModelConfig, OffloadConfig, SloConfig
from selectn_core.device.bus import Bus
from selectn_core.engine.engine import Engine
from selectn_core.latency.steps import StepRecord
from selectn_core.offload.control import LinkShare
from selectn_core.planning.record import PerformanceRecord
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives
from selectn_core.requests.sampling import SamplingParams
from selectn_core.start import load_unsteered_engine

BUS_GB_PER_S = 0.8
# TPOT objectives in unloaded steps of a full batch, and TTFT objectives in those of TPOT.
MULTIPLES = {"tight": 1.75, "loose": 5.0}
TTFT_STEPS = 25
LOAD_SHARES = (0.3, 0.6)
STEADY_AFTER = 0.2  # of the time in which requests arrive, after which throughput and memory count
MODES = ("equal", "coordinated")
LEASE_S, HOLD_S, NODE_PERIOD_S, READY_TIMEOUT_S = 4.0, 1.0, 0.5, 120.0
HOST_BYTES = 8 << 30
NODE_ID = "node"


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One of the two: what it promises, and what is asked of it."""

    name: str
    config: EngineConfig
    tpot_s: float
    most_requests_per_s: float  # that it could serve with half of the bus

    @property
    def ttft_s(self) -> float:
        return TTFT_STEPS * self.tpot_s

    @property
    def drain_s(self) -> float:
        """After the last arrival, how long a request may take that meets its objectives."""
        return self.ttft_s + NEW_TOKENS * self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Run:
    """Requests arrive for `seconds` from the instant `begins_s` of `time.perf_counter` on."""

    mode: str
    load_share: float
    begins_s: float
    seconds: float

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.seconds

    @property
    def steady_s(self) -> float:
        return self.begins_s + STEADY_AFTER * self.seconds


def contention(
    source: str, *, seconds: float, profile_s: float, load_shares: Sequence[float] = LOAD_SHARES
) -> list[dict[str, Any]]:
    """One sample per mode, load and replica; requests arrive for `seconds` in each."""
    bus_name = f"bench-bus-{uuid.uuid4().hex[:8]}"
    try:
        roomy = _config(source, bus_name)
        record = roomy_record(roomy, profile_s)
        config = with_memory(roomy, device_gib(roomy, record))
        replicas = [_replica(name, config, record, multiple) for name, multiple in MULTIPLES.items()]
        return _run(replicas, record, seconds, load_shares)
    finally:
        Bus.unlink(bus_name)


# -- what runs ---------------------------------------------------------------------------------------------------


def _config(source: str, bus_name: str) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(source=source),
        # One thread each: two engines compute at once on as few as two cores.
        device=DeviceConfig(kind="emulated", link_gb_per_s=BUS_GB_PER_S, bus=bus_name, compute_threads=1),
        batch=BATCH,
        offload=OffloadConfig(num_sharing=len(MULTIPLES)),
    )


def _replica(name: str, config: EngineConfig, record: PerformanceRecord, multiple: float) -> Replica:
    tpot_s = multiple * record.step_times().expected_s(FULL_STEP)
    half = 1 / len(MULTIPLES)
    slo = SloConfig(ttft_ms=TTFT_STEPS * tpot_s * 1e3, tpot_ms=tpot_s * 1e3)
    return Replica(
        name=name,
        config=replace(config, slo=slo),
        tpot_s=tpot_s,
        most_requests_per_s=capacity(record, tpot_s, guaranteed_share=half, usual_share=half),
    )


def _run(
    replicas: Sequence[Replica], record: PerformanceRecord, seconds: float, load_shares: Sequence[float]
) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    samples = []
    with _Manager(ctx=spawn) as manager:
        node = manager.Node(str(replicas[0].config.device.bus), len(replicas))  # type: ignore[attr-defined]
        processes, pipes = [], []
        for replica in replicas:
            ours, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=_serve, args=(theirs, replica, record, node), daemon=True))
            pipes.append(ours)
            processes[-1].start()
            theirs.close()  # so that one that dies is noticed
        for mode, load_share in tqdm([(mode, share) for mode in MODES for share in load_shares], desc="runs"):
            for pipe in pipes:
                pipe.send(mode)
            for pipe in pipes:
                _received(pipe, READY_TIMEOUT_S)
            run = Run(
                mode=mode,
                load_share=load_share,
                begins_s=time.perf_counter() + 0.2,  # one clock for all processes of a machine
                seconds=seconds,
            )
            for pipe in pipes:
                pipe.send(run)
            samples += [
                _received(pipe, seconds + replica.drain_s + READY_TIMEOUT_S)
                for replica, pipe in zip(replicas, pipes, strict=True)
            ]
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.send(None)
            process.join(READY_TIMEOUT_S)
    return samples


def _received(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"a replica has not answered in {timeout_s:.0f} s")
    return pipe.recv()


class Node:
    """What a node has beside its replicas, in a process of its own: the ledger's claims and the coordinator."""

    def __init__(self, bus_id: str, num_devices: int) -> None:
        self._bus_id, self._num_devices = bus_id, num_devices
        self._claims = HostClaims(
            HOST_BYTES, is_alive=lambda claim: psutil.pid_exists(claim.pid), now_s=time.monotonic()
        )
        self._lock = threading.Lock()
        self._coordinator = CoordinatorActor(CoordinatorConfig(lease_s=LEASE_S))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._report(), self._loop)

    def exchange(self, report: ReplicaReport, hold_s: float) -> RangeUpdate | None:
        return asyncio.run_coroutine_threadsafe(self._coordinator.wait_for_update(report, hold_s), self._loop).result()

    def claim_host(self, claim: HostClaim) -> HostAnswer:
        with self._lock:
            return self._claims.claim(claim, time.monotonic())

    def release_host(self, replica_id: str) -> None:
        with self._lock:
            self._claims.release(replica_id)

    def latest(self) -> None:
        """No telemetry: an emulated device knows its bus by name."""

    async def _report(self) -> None:
        heard_life = sequence = 0
        while True:
            with self._lock:
                placed = self._claims.report(time.monotonic()).replicas
            sequence += 1
            bus = BusState(
                bus_id=self._bus_id,
                bytes_per_s=int(BUS_GB_PER_S * 1e9),
                num_devices=self._num_devices,
                replica_ids=tuple(each.replica_id for each in placed if each.bus_id == self._bus_id),
            )
            heard_life = await self._coordinator.report_node(
                NodeState(
                    node_id=NODE_ID,
                    sequence=sequence,
                    heard_life=heard_life,
                    buses=(bus,),
                )
            )
            await asyncio.sleep(NODE_PERIOD_S)


class _Manager(BaseManager):
    """Lets other processes of ours call a `Node`."""


_Manager.register("Node", Node)


# -- one replica, in its own process -----------------------------------------------------------------------------


def _serve(pipe: Connection, replica: Replica, record: PerformanceRecord, node: Any) -> None:
    engine = load_unsteered_engine(replica.config)
    member: Member | None = None
    try:
        engine.steer(record)
        with engine:
            while (mode := pipe.recv()) is not None:
                if mode == "equal":
                    share = record.link.link.bytes_per_s / len(MULTIPLES)
                    engine.set_link_share(LinkShare(bytes_per_s=share, guaranteed_bytes_per_s=share))
                elif member is None:
                    member = _joined(engine, replica.name, node)
                pipe.send("ready")
                pipe.send(_measure(engine, member, replica, pipe.recv()))
            if member is not None:
                member.stop()
    finally:
        engine.close()
        if member is not None:
            member.leave()


def _joined(engine: Engine, name: str, node: Any) -> Member:
    member = Member(replica_id=name, node_id=NODE_ID, agent=node, exchange=node.exchange, hold_s=HOLD_S)
    member.join(engine, member.bus_of(engine))
    ends_s = time.monotonic() + READY_TIMEOUT_S
    while not member.snapshot()["link_bytes_per_s"]:
        if time.monotonic() > ends_s:
            raise TimeoutError(f"replica {name} was never given a share of the bus: {member.snapshot()}")
        time.sleep(0.05)
    return member


def _measure(engine: Engine, member: Member | None, replica: Replica, run: Run) -> dict[str, Any]:
    requests_per_s = run.load_share * replica.most_requests_per_s
    arrivals = _arrivals(replica.name, requests_per_s, run.seconds)
    prompts = random_prompts(len(arrivals), PROMPT_TOKENS, engine.model.config.get_text_config().vocab_size)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    usage, first_step = engine.device.link_usage(), engine.steps.num_steps
    handles: list[RequestHandle] = []
    for at_s, prompt in zip(arrivals, prompts, strict=True):
        time.sleep(max(0.0, run.begins_s + at_s - time.perf_counter()))
        handles.append(engine.submit(prompt, params))
    time.sleep(max(0.0, run.ends_s - time.perf_counter()))
    copied_bytes = engine.device.link_usage().since(usage).copied_bytes
    while any(h.num_tokens < NEW_TOKENS for h in handles) and time.perf_counter() < run.ends_s + replica.drain_s:
        time.sleep(0.05)
    for handle in handles:
        handle.cancel()
    records = [r for r in list(engine.steps.records) if r.iteration >= first_step]
    history = member.snapshot()["history"] if member is not None else []
    return {
        "what": "contention",
        "mode": run.mode,
        "load_share": run.load_share,
        "replica": replica.name,
        "tpot_ms": replica.tpot_s * 1e3,
        "ttft_ms": replica.ttft_s * 1e3,
        "requests_per_s": requests_per_s,
        **_latencies(handles, replica),
        **_means(records, run),
        "link_use": copied_bytes / (BUS_GB_PER_S * 1e9 * run.seconds),
        # Seconds since the beginning; layers offloaded and requests, and the share and units that were allowed.
        "steps": [[round(r.ended_s - run.begins_s, 3), r.num_offloaded, r.shape.num_requests] for r in records],
        "shares": [[round(at_s - run.begins_s, 3), *rest] for at_s, *rest in history if at_s < run.ends_s],
    }


def _latencies(handles: Sequence[RequestHandle], replica: Replica) -> dict[str, Any]:
    """Of all that were offered; those without a first token wait still."""
    ended = [handle.num_tokens == NEW_TOKENS for handle in handles]
    timings = [handle.timing for handle in handles]
    return {
        "num_requests": len(handles),
        "num_ended": sum(ended),
        **attained(handles, [Objectives(ttft_s=replica.ttft_s, tpot_s=replica.tpot_s)] * len(handles), NEW_TOKENS),
        "tpot_p99_ms": _percentile([(t.tpot_s or 0.0) * 1e3 for t in timings], 99),
        "ttft_p99_ms": _percentile([(t.ttft_s or replica.drain_s) * 1e3 for t in timings], 99),
    }


def _means(records: Sequence[StepRecord], run: Run) -> dict[str, float]:
    """Over the steady part of the run."""
    decoded = sum(r.shape.num_decodes for r in records if run.steady_s < r.ended_s <= run.ends_s)
    return {
        # A request's first token comes with its prefill.
        "tokens_per_s": decoded * NEW_TOKENS / (NEW_TOKENS - 1) / (run.ends_s - run.steady_s),
        "host_bytes": _over_time(records, lambda r: r.offloaded_bytes, run),
        "mean_k": _over_time(records, lambda r: r.num_offloaded, run),
        "mean_batch": _over_time(records, lambda r: r.shape.num_requests, run),
    }


def _arrivals(name: str, requests_per_s: float, seconds: float) -> list[float]:
    """The same instants in both modes."""
    rng, instants, now_s = random.Random(name), [], 0.0
    while (now_s := now_s + rng.expovariate(requests_per_s)) < seconds:
        instants.append(now_s)
    return instants


def _over_time(records: Sequence[StepRecord], value: Callable[[StepRecord], float], run: Run) -> float:
    """The mean over the steady part: what a step has counts from the last one's end, of the last to the end."""
    total, until_s = 0.0, run.steady_s
    for record in records:
        to_s = min(max(record.ended_s, until_s), run.ends_s)
        total += value(record) * (to_s - until_s)
        until_s = to_s
    return (total + value(records[-1]) * (run.ends_s - until_s)) / (run.ends_s - run.steady_s)


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
