"""A coordinator and agents that write their accounts down at every change, in files that outlive them."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.coordinator.actor import CoordinatorActor
from cluster.coordinator.coordinator import Coordinator, CoordinatorConfig
from cluster.node.agent import NodeAgent
from cluster.node.agents import NodeAgents
from cluster.protocol.messages import NodeState, RangeUpdate, ReplicaReport
from cluster.protocol.node_reports import HostAnswer, HostClaim

# The directory, for every process that writes there or reads it.
AUDIT = "SELECTN_TEST_AUDIT"


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """What the coordinator counted when it had just told a replica something.

    `used`, by node and bus: what replicas last said that they do, or their fallback once their lease was over.
    `promised`: what this replica was told and the most that others on its bus may be doing, which a young life
    overestimates; it must fit whenever the replica is given more (`is_raise`).
    """

    life: int
    is_raise: bool
    used_bytes_per_s: dict[str, int]
    promised_bytes_per_s: int


@dataclass(frozen=True, kw_only=True)
class LedgerAccounts:
    """A node's ledger after a change. `why` says what made it; `defect` is what its check found."""

    node_id: str
    why: str
    capacity_bytes: int
    reserved_bytes: int
    replicas: list[str]
    defect: str | None


class AuditedCoordinator(CoordinatorActor):
    """The coordinator, which writes its accounts down at every change it makes, in a file that outlives it."""

    def __init__(self, config: CoordinatorConfig) -> None:
        super().__init__(config)
        self._core = _Audited(config)
        self._states: dict[str, NodeState] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def report_node(self, report: NodeState) -> int:
        self._states[report.node_id] = report
        return await super().report_node(report)

    async def states(self) -> dict[str, NodeState]:
        """What nodes last said, by id."""
        return self._states


class _Audited(Coordinator):
    def __init__(self, config: CoordinatorConfig) -> None:
        super().__init__(config, life=time.time_ns(), now_s=time.monotonic())

    def update_for(self, report: ReplicaReport, now_s: float) -> RangeUpdate | None:
        update = super().update_for(report, now_s)
        if update is not None:
            used: dict[str, int] = defaultdict(int)
            replicas = self.status(now_s).replicas
            for each in replicas:
                used[f"{each.node_id}/{each.bus_id}"] += min(each.allowed.link_bytes_per_s, each.committed_bytes_per_s)
            _write_down(
                "coordinator",
                Accounts(
                    life=self.life,
                    is_raise=update.allowed.link_bytes_per_s > report.allowed.link_bytes_per_s,
                    used_bytes_per_s=used,
                    promised_bytes_per_s=update.allowed.link_bytes_per_s
                    + sum(
                        each.committed_bytes_per_s
                        for each in replicas
                        if (each.node_id, each.bus_id) == (report.node_id, report.bus_id)
                        and each.replica_id != report.replica_id
                    ),
                ),
            )
        return update


class AuditedAgent(NodeAgent):
    """A node's agent, which writes its ledger down after every change: claims come one at a time."""

    def __init__(self, *arguments: Any) -> None:
        self._written: LedgerAccounts | None = None
        super().__init__(*arguments)

    def claim_host(self, claim: HostClaim) -> HostAnswer:
        answer = super().claim_host(claim)
        self._write_ledger(f"claim of {claim.replica_id}")
        return answer

    def release_host(self, replica_id: str) -> None:
        super().release_host(replica_id)
        self._write_ledger(f"goodbye of {replica_id}")

    def _publish(self, sequence: int) -> None:
        super()._publish(sequence)
        self._write_ledger("sample")

    def _write_ledger(self, why: str) -> None:
        with self._claims_lock:
            report = self._claims.report(time.monotonic())
            try:
                self._claims.check_integrity()
                defect = None
            except AssertionError as error:
                defect = repr(error)
            entry = LedgerAccounts(
                node_id=self._node_id,
                why=why,
                capacity_bytes=report.capacity_bytes,
                reserved_bytes=report.reserved_bytes,
                replicas=[each.replica_id for each in report.replicas],
                defect=defect,
            )
            if self._written is None or {**vars(entry), "why": ""} != {**vars(self._written), "why": ""}:
                self._written = entry
                _write_down("ledgers", entry)


class AuditedAgents(NodeAgents):
    """The manager of such agents."""

    agent_class = AuditedAgent


def _write_down(name: str, entry: Accounts | LedgerAccounts) -> None:
    with (Path(os.environ[AUDIT]) / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(entry)) + "\n")


def accounts() -> list[Accounts]:
    """All that any life of the coordinator wrote down."""
    return [Accounts(**entry) for entry in _written("coordinator")]


def ledger_accounts() -> list[LedgerAccounts]:
    """All that any agent wrote down."""
    return [LedgerAccounts(**entry) for entry in _written("ledgers")]


def _written(name: str) -> Iterator[dict[str, Any]]:
    for line in (Path(os.environ[AUDIT]) / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
