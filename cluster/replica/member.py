"""A replica as a member of the cluster: its claim on its node's host memory, its share of its bus, in its own thread.

A token waits for nothing here. Where agent or coordinator cannot be reached the replica serves all the same: with the
fewest units offloaded until it has a share, and with its fallback when it has lost one.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

import ray

from cluster.node.agents import find_agent
from cluster.node.node_state import bus_of_gpu
from cluster.node.processes import start_ticks
from cluster.protocol.messages import Allowance, KvUse, LinkDemand
from cluster.protocol.node_reports import HostAnswer, HostClaim, NodeReport
from cluster.replica.lease import RangeHolder
from cluster.replica.range_client import Exchange, RangeClient
from selectn_core.errors import HostMemoryExceeded

# torch is imported when a replica starts, not where this module is.
if TYPE_CHECKING:
    from selectn_core.engine.engine import Engine
    from selectn_core.offload.control import LinkShare

logger = logging.getLogger(__name__)

RENEW_S = 1.0
CALL_TIMEOUT_S = 2.0
# How long a replica that starts waits for its node's agent, which may be starting too, and for a ledger that is young.
AGENT_TIMEOUT_S = 20.0
_RETRY_S = 0.2
_MAX_HISTORY = 256
# What was lately promised counts as needed for so many reports more: requests that come and go make no new demand.
_NEEDED_FOR = 10
# Steps are planned to be a little shorter than they may be, so a unit takes more of the bus than k_min's part for it.
_SURE = 1.15
# Requests come and go: what they need has to fall by more than this share before less is asked for.
_KEPT_SHARE = 1 / 3
_GIB = 1 << 30


class Agent(Protocol):
    """A node's agent as its replicas see it. Everything may raise, and blocks for CALL_TIMEOUT_S at most."""

    def claim_host(self, claim: HostClaim) -> HostAnswer: ...

    def release_host(self, replica_id: str) -> None: ...

    def latest(self) -> NodeReport | None: ...


class AgentConnection:
    """The agent of a node, found by name at every call: it may have been replaced."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    def claim_host(self, claim: HostClaim) -> HostAnswer:
        return self._call("claim_host", claim)

    def release_host(self, replica_id: str) -> None:
        self._call("release_host", replica_id)

    def latest(self) -> NodeReport | None:
        return self._call("latest")

    def _call(self, method: str, *arguments: object) -> Any:
        result = getattr(find_agent(self._node_id), method).remote(*arguments)
        try:
            return ray.get(result, timeout=CALL_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(result)  # an agent that hangs collects no calls
            raise


class Member:
    """One replica's membership. `reserve` while its engine loads, `join` when it has, `stop` and `leave` at the end."""

    def __init__(
        self,
        *,
        replica_id: str,
        node_id: str,
        agent: Agent,
        exchange: Exchange,
        hold_s: float,
        agent_timeout_s: float = AGENT_TIMEOUT_S,
    ) -> None:
        """`exchange` reports to the coordinator, which may hold an answer back for `hold_s`."""
        self._node_id, self._agent, self._exchange, self._hold_s = node_id, agent, exchange, hold_s
        self._agent_timeout_s = agent_timeout_s
        self._claim = HostClaim(
            replica_id=replica_id,
            bus_id=None,
            pid=os.getpid(),
            process_start_ticks=start_ticks(os.getpid()),
        )
        self._claim_lock = threading.Lock()
        self._is_granted = False  # what `_claim` says, by an agent that may be gone since
        self._held_bytes = self._kv_bytes = 0
        self._host_problem: str | None = "the node's agent has not answered yet"
        self._engine: Engine | None = None
        self._k_min = self._wanted = 0
        self._needed: deque[int] = deque([0], maxlen=_NEEDED_FOR)  # units that promises needed offloaded, lately
        self._range: RangeClient | None = None
        # (monotonic seconds, bytes/s, units at most) for people and tests: what was allowed, and when.
        self._history: deque[tuple[float, int, int]] = deque(maxlen=_MAX_HISTORY)
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-member", daemon=True)
        self._thread.start()

    # -- host memory --------------------------------------------------------------------------------------------

    def reserve(self, num_bytes: int, shared_as: str | None) -> None:
        """Reserves host memory for weights before they take it: the engine's `reserve_host`.

        Raises HostMemoryExceeded if the node's ledger refuses. Goes on without it, with a warning, if nobody answers.
        """
        if shared_as is None:
            self._extend(own_bytes=self._claim.own_bytes + num_bytes)
        else:
            self._extend(store_name=shared_as, store_bytes=num_bytes)

    def reserve_kv(self, kv_gib: float) -> None:
        """As `reserve`, for the most KV that may be kept in host memory; `join` gives back what is not needed."""
        self._kv_bytes = int(kv_gib * _GIB)
        self._extend(own_bytes=self._claim.own_bytes + self._kv_bytes)

    def _extend(self, **changes: Any) -> None:
        end_s = time.monotonic() + self._agent_timeout_s
        while True:
            is_late = time.monotonic() >= end_s
            with self._claim_lock:
                wanted = replace(self._claim, **changes, is_renewal=False)
                answer = self._ask(wanted)
                if answer is None and is_late:
                    self._claim, self._is_granted = wanted, False
                    self._agent_timeout_s = 0.0  # once is enough
                    logger.warning("host memory is used without a reservation: %s", self._host_problem)
                    return
            if answer is not None and answer.refusal is None:
                return
            if answer is not None and (is_late or not answer.ask_again):
                raise HostMemoryExceeded(f"node {self._node_id} refuses host memory: {answer.refusal}")
            time.sleep(_RETRY_S)

    def _ask(self, claim: HostClaim) -> HostAnswer | None:
        """Makes a claim; None if nobody answers. What was granted is the claim from then on."""
        try:
            answer = self._agent.claim_host(claim)
        except Exception as error:  # it is being restarted, or the node has none
            self._host_problem = f"the node's agent does not answer: {_first_line(error)}"
            return None
        self._host_problem, self._held_bytes = answer.refusal, answer.held_bytes
        if answer.refusal is None:
            self._claim, self._is_granted = claim, True
        return answer

    # -- the bus ------------------------------------------------------------------------------------------------

    def join(self, engine: Engine, bus_id: str | None) -> None:
        """The engine is ready. `bus_id` None: a bus that nobody else is on, so that there is nothing to share.

        Until the coordinator has said what there is, as few units are offloaded as memory allows.
        """
        more_bytes = engine.kv_swap_bytes - self._kv_bytes
        with self._claim_lock:
            self._claim = replace(self._claim, bus_id=bus_id, own_bytes=self._claim.own_bytes + more_bytes)
            self._is_granted = False
        from selectn_core.control.policies import MOST_SLOTS

        self._k_min = engine.target.fewest(MOST_SLOTS).num_offloaded
        if bus_id is not None:
            share = equal_share(engine)
            engine.set_link_share(link_share(engine, share, share, as_largest(engine, self._k_min)))
        self._engine = engine

    def bus_of(self, engine: Engine) -> str | None:
        """The bus that the engine's device is on: by its name, or by what the node's agent knows of its GPU."""
        if engine.device.kind != "cuda":
            return engine.config.device.bus
        import torch

        uuid = f"GPU-{torch.cuda.get_device_properties(engine.device.torch_device).uuid}"
        end_s = time.monotonic() + self._agent_timeout_s
        while time.monotonic() < end_s:
            try:
                report = self._agent.latest()
            except Exception as error:
                self._host_problem = _first_line(error)
            else:
                if report is not None and (bus_id := bus_of_gpu(report, uuid)) is not None:
                    return bus_id
            time.sleep(_RETRY_S)
        logger.warning("the bus of %s is not known: it is used as if nobody else did", uuid)
        return None

    def stop(self) -> None:
        """Looks at the engine no more: it is about to be closed. Idempotent."""
        self._should_end.set()
        self._thread.join()

    def leave(self) -> None:
        """Says goodbye to coordinator and agent, when the engine uses neither link nor host memory any more."""
        self.stop()
        if self._range is not None:
            self._range.close()
        try:
            self._agent.release_host(self._claim.replica_id)
        except Exception as error:  # it will see that this process is gone
            logger.info("the node's agent did not hear that this replica leaves: %s", _first_line(error))

    def snapshot(self) -> dict[str, Any]:
        """What this replica may do, since when and until when, as JSON-able values."""
        state = self._range.state if self._range is not None else None
        now_s = time.monotonic()
        return {
            "replica": self._claim.replica_id,
            "node": self._node_id,
            "bus": self._claim.bus_id,
            "host_held_bytes": self._held_bytes,
            "host_reserved_bytes": self._claim.own_bytes + self._claim.store_bytes if self._is_granted else 0,
            "host_problem": self._host_problem,
            "range": list(state.k_range) if state else None,
            "link_bytes_per_s": state.allowed.link_bytes_per_s if state else None,
            "fallback_bytes_per_s": state.allowed.fallback_bytes_per_s if state else None,
            "epoch": asdict(state.epoch) if state else None,
            "lease_left_s": max(0.0, state.lease_end_s - now_s) if state and state.lease_end_s is not None else None,
            "problem": state.problem if state else None,
            "last_error": state.last_error if state else None,
            "history": [list(each) for each in list(self._history)],
        }

    def _run(self) -> None:
        while not self._should_end.wait(RENEW_S):
            try:
                self._renew()
                self._report()
            except Exception:
                logger.exception("reporting this replica failed; it goes on serving")

    def _renew(self) -> None:
        with self._claim_lock:
            if self._claim.own_bytes or self._claim.store_bytes or self._engine is not None:
                answer = self._ask(replace(self._claim, is_renewal=True))
                if answer is not None and answer.refusal is not None:
                    logger.warning("the node's ledger: %s", answer.refusal)

    def _report(self) -> None:
        """Tells the coordinator what is wanted, from when the node's agent has this replica on its list."""
        engine, bus_id = self._engine, self._claim.bus_id
        if engine is None or bus_id is None:
            return
        self._needed.append(engine.guarantee.num_offloaded)
        self._wanted = wanted_by_requests(engine, self._wanted)
        link = link_demand(engine, max(self._k_min, *self._needed), self._wanted)
        if self._range is None and self._is_granted:
            holder = RangeHolder(replica_id=self._claim.replica_id, node_id=self._node_id, bus_id=bus_id)
            self._range = RangeClient(holder, self._exchange, self._apply, link=link, hold_s=self._hold_s)
            self._range.start()
        if self._range is not None:
            kv = KvUse(
                used_tokens=engine.used_kv_tokens,
                reachable_tokens=engine.reachable_kv_tokens(self._range.state.k_range[1]),
            )
            self._range.set_demand(link=link, kv=kv)

    def _apply(self, allowed: Allowance, k_range: tuple[int, int]) -> None:
        self._history.append((time.monotonic(), allowed.link_bytes_per_s, k_range[1]))
        assert self._engine is not None
        share = link_share(self._engine, allowed.link_bytes_per_s, allowed.fallback_bytes_per_s, k_range[1])
        self._engine.set_link_share(share)


def link_share(engine: Engine, bytes_per_s: float, guaranteed_bytes_per_s: float, k_max: int) -> LinkShare:
    """A share in the engine's words; `k_max` counts units as large as the largest.

    What k_min takes is streamed whatever it is, and a link of 0 has no latency.
    """
    from selectn_core.offload.control import LinkShare

    return LinkShare(
        bytes_per_s=max(1, bytes_per_s),
        guaranteed_bytes_per_s=max(1, guaranteed_bytes_per_s),
        max_offloaded_bytes=k_max * largest_unit_bytes(engine),
    )


def link_demand(engine: Engine, k_min: int, wanted: int = 0) -> LinkDemand:
    """What the engine wants of its bus, within its TPOT objective: all units at most, counted in the largest.

    At least `k_min`, which memory and its promises need, and what its requests would like (`wanted`) if its equal share
    of the bus carries that: so much is nobody else's, however much host memory they would use with it.

    A plan by hand wants what it is. Where no objective says how long a step may take, it takes an equal share's time.
    """
    unit_bytes = largest_unit_bytes(engine)
    k_min, wanted, k_max = (as_largest(engine, count) for count in (k_min, wanted, len(engine.units)))
    if engine.offloading.control.is_manual:
        by_hand = -(-engine.target.plans.offloaded_bytes(engine.target.plan) // unit_bytes)
        k_min = k_max = max(k_min, by_hand)
    objectives, share = engine.objectives, equal_share(engine)
    step_s = objectives.tpot_s if objectives is not None else max(1, k_max) * unit_bytes / share
    k_min = max(k_min, min(wanted, k_max, int(share * step_s // unit_bytes)))
    return LinkDemand(k_min=k_min, k_max=k_max, unit_bytes=unit_bytes, step_s=step_s)


def largest_unit_bytes(engine: Engine) -> int:
    """What a range counts in."""
    return max(unit.num_bytes for unit in engine.units)


def as_largest(engine: Engine, num_offloaded: int) -> int:
    """How many of the largest unit have as many bytes as so many of an engine's units, of which some may be small."""
    plan = engine.target.plans.plan(min(num_offloaded, len(engine.units)), engine.target.plan.num_slots)
    return -(-engine.target.plans.offloaded_bytes(plan) // largest_unit_bytes(engine))


def wanted_by_requests(engine: Engine, before: int) -> int:
    """Units to be sure of for the requests in flight and those about to come; `before` while that is near."""
    wanted = math.ceil(_SURE * engine.guarantee.wanted_offloaded)
    return before if (1 - _KEPT_SHARE) * before <= wanted <= before else wanted


def equal_share(engine: Engine) -> float:
    """Bytes per second of the link if everybody who may use its bus does: as measured, or else as configured."""
    return engine.link_bytes_per_s / engine.config.offload.num_sharing


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
