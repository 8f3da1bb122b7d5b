"""What replicas, nodes and the coordinator say to each other: frozen, plain data without behaviour.

docs/cluster.md says who guarantees what. Times named `sent_s` are seconds on the sender's own monotonic clock and
mean nothing to anybody else, who may only send them back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, order=True)
class Epoch:
    """Which update: the coordinator's life it comes from (later lives are larger), and its number in that life."""

    life: int
    number: int


NO_EPOCH = Epoch(life=0, number=0)


@dataclass(frozen=True, kw_only=True)
class LinkDemand:
    """What a replica wants of its bus: k_min units offloaded at least, k_max at most, each streamed in every step.

    `unit_bytes` is the size of the largest unit where they differ: the bus is then never given out twice. `step_s` is
    the time that a step may take, the TPOT objective.
    """

    k_min: int
    k_max: int
    unit_bytes: int
    step_s: float

    def __post_init__(self) -> None:
        if self.flaw is not None:
            raise ValueError(self.flaw)

    @property
    def flaw(self) -> str | None:
        """What is wrong with it; None: nothing. Unpickling one does not ask."""
        if not 0 <= self.k_min <= self.k_max:
            return f"k_min={self.k_min}, k_max={self.k_max}: 0 <= k_min <= k_max is needed"
        if self.unit_bytes < 1 or not 0 < self.step_s < math.inf:
            return f"unit_bytes={self.unit_bytes}, step_s={self.step_s}: both must be above 0, and finite"
        return None


@dataclass(frozen=True, kw_only=True)
class KvUse:
    """Tokens of KV a replica holds, and the most it could hold at its current k_max."""

    used_tokens: int = 0
    reachable_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a replica may use of its bus: `link_bytes_per_s` while its lease runs, `fallback_bytes_per_s` after that."""

    link_bytes_per_s: int = 0
    fallback_bytes_per_s: int = 0


NOTHING = Allowance()


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """A replica's state, and its request for an update.

    `sequence` numbers its reports, so that an old one is recognised. `version` numbers the changes of `allowed`, which
    is what it may do now (its link share is the fallback once its lease has run out): an update is for one
    version and dropped by every other. `heard_life` is the latest life of the coordinator it has heard from.
    """

    replica_id: str
    node_id: str
    bus_id: str
    sequence: int
    sent_s: float
    version: int
    heard_life: int
    allowed: Allowance
    link: LinkDemand
    kv: KvUse = KvUse()
    is_leaving: bool = False


@dataclass(frozen=True, kw_only=True)
class RangeUpdate:
    """What a replica may do from now on: applied only by `for_version`, within `lease_s` after it sent `sent_s`.

    `k_max` goes with `allowed.link_bytes_per_s`; the interval range is [L/k_max, L/k_min]. `problem` says why a
    replica's objective cannot be met.
    """

    epoch: Epoch
    replica_id: str
    for_version: int
    sent_s: float
    lease_s: float
    allowed: Allowance
    k_min: int
    k_max: int
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class BusState:
    """A bus of a node: what it can move from host memory to its devices, and who may be using it.

    `replica_ids` are the replicas alive on it, None where the node cannot tell. To leave one out that is alive is
    the only mistake here that could have the bus given out twice.
    """

    bus_id: str
    bytes_per_s: int
    num_devices: int
    replica_ids: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """What of a node's report concerns the division of its buses; node_state.py makes it.

    `heard_life` is what the coordinator answered to the last one (0 before there was an answer). A smaller `sequence`
    is an older state.
    """

    node_id: str
    sequence: int
    heard_life: int
    buses: tuple[BusState, ...]
