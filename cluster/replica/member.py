"""A replica as a member of the cluster: its claim on its node's host memory, its share of its bus, in its own thread.

A token waits for nothing here. Where agent or coordinator cannot be reached the replica serves all the same: with the
fewest units offloaded until it has a share, and with its fallback when it has lost one.
"""

from __future__ import annotations

import logging
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
from cluster.replica.recent_needs import RecentNeeds
from selectn_core.errors import HostMemoryExceeded

# torch is imported when a replica starts, not where this module is.
if TYPE_CHECKING:
    from selectn_core.engine.engine import Engine

logger = logging.getLogger(__name__)

RENEW_S = 1.0
CALL_TIMEOUT_S = 2.0
# How long a replica that starts waits for its node's agent, which may be starting too, and for a ledger that is young.
AGENT_TIMEOUT_S = 20.0
_RETRY_S = 0.2
_MAX_HISTORY = 256
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
        self._needs = RecentNeeds()
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
        if bus_id is not None:
            engine.take_least_link_share()
        self._engine = engine

    def bus_of(self, engine: Engine) -> str | None:
        """The bus that the engine's device is on: by its name, or by what the node's agent knows of its GPU."""
        uuid = engine.gpu_uuid
        if uuid is None:
            return engine.config.device.bus
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
        self._needs.add(needed=engine.guaranteed_units, wanted=engine.wanted_units)
        link = demand_of(engine, self._needs)
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
        self._engine.set_link_range(allowed.link_bytes_per_s, allowed.fallback_bytes_per_s, k_range[1])


def demand_of(engine: Engine, needs: RecentNeeds) -> LinkDemand:
    """What the engine wants of its bus, as a message."""
    demand = engine.link_demand(needed=needs.needed, wanted=needs.wanted)
    return LinkDemand(k_min=demand.k_min, k_max=demand.k_max, unit_bytes=demand.unit_bytes, step_s=demand.step_s)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
