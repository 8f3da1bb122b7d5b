"""Who decides what is offloaded, as the data plane sees it: the interface, and the control that leaves a plan as it is.

Apart from `control/`, which holds the policies behind this interface and stands above the data plane.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from selectn_core.config import SloConfig
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan, freed_bytes
from selectn_core.latency.recurrence import Link
from selectn_core.latency.steps import Chunk, StepRecord, StepShape
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives, configured_objectives


@dataclass(frozen=True, kw_only=True)
class LinkShare:
    """This replica's share of its bus: what it may use now, what will be there whatever happens, what may be offloaded.

    `max_offloaded_bytes` None: as much as objectives allow.
    """

    bytes_per_s: float
    guaranteed_bytes_per_s: float
    max_offloaded_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """Tickets: of requests without KV cache that may begin, in their turn, and of all that hold some or may begin."""

    beginning: Sequence[str]
    served: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The plan for a step; `urgent` where weights must come home though requests hold the memory.

    `predicted_s` is what the step should take, `limit_s` what it may. `held_s` is what steps would take if the plan
    that holds were left, on the careful side; None where that was not looked at.
    """

    plan: OffloadPlan
    urgent: bool
    predicted_s: float
    limit_s: float
    held_s: float | None = None


# Why k is what it is. "everything": there is no more; "by_hand": it was set; "policy": that has one plan; "memory":
# as little as the memory that requests need allows; "bus_share": the coordinator allows no more; "queue": requests wait
# for memory, and short steps serve them; "objective": steps would be too long with more.
LimitedBy = Literal["everything", "by_hand", "policy", "memory", "bus_share", "queue", "objective"]
LIMITS: tuple[LimitedBy, ...] = get_args(LimitedBy)


class PlanLimits(NamedTuple):
    """What keeps a policy's plan from offloading more, as of the last step.

    `held_freed_bytes` must be freed for those who run, `max_offloaded_bytes` may be offloaded (None: anything).
    `is_busy`: requests wait for memory or for a place. `share_bytes_per_s` is what the coordinator allows,
    infinite where it has said nothing.
    """

    adapts: bool
    is_busy: bool
    unit_bytes: Sequence[int]
    held_freed_bytes: int
    max_offloaded_bytes: float | None
    link_bytes_per_s: float
    share_bytes_per_s: float

    def limited_by(self, plan: OffloadPlan) -> LimitedBy:
        """Why `plan` does not offload more."""
        sizes, offloaded = self.unit_bytes, set(plan.offloaded)
        if len(offloaded) == len(sizes):
            return "everything"
        if not self.adapts:
            return "policy"
        smallest = min((sizes[unit] for unit in offloaded), default=0)
        if 0 < self.held_freed_bytes > freed_bytes(plan, sizes) - smallest:
            return "memory"
        most = math.inf if self.max_offloaded_bytes is None else self.max_offloaded_bytes
        if sum(sizes[unit] for unit in offloaded) + (self.next_unit_bytes(plan) or 0) > most:
            return "bus_share"
        return "queue" if self.is_busy else "objective"

    def next_unit_bytes(self, plan: OffloadPlan) -> int | None:
        """Bytes of the smallest unit that is not offloaded; None where all are."""
        offloaded = set(plan.offloaded)
        return min((size for unit, size in enumerate(self.unit_bytes) if unit not in offloaded), default=None)


class Control(ABC):
    """Asked on the generation thread, in the order of a step: `admit`, `token_budget`, `decide`, `done`.

    Another thread may change objectives and the link's share between any two of them, or put another control in its
    place.
    """

    is_manual = False

    @property
    @abstractmethod
    def objectives(self) -> Objectives | None:
        """What requests are served for that do not name their own; None where nothing says."""

    @abstractmethod
    def set_objectives(self, slo: SloConfig) -> None:
        """Aims at other objectives from the next step on; what was learned of the machine stays."""

    @abstractmethod
    def set_link_share(self, share: LinkShare) -> None:
        """What the bus's coordinator allows from the next step on."""

    @abstractmethod
    def admit(
        self, handles: Mapping[str, RequestHandle], progress: Mapping[str, Chunk], backlog: Mapping[str, Chunk]
    ) -> NextStep:
        """Looks at every request before a step is scheduled; `progress` and `backlog`: see `ContinuousBatching`."""

    @abstractmethod
    def token_budget(self, most: int) -> int:
        """Tokens for the step that is about to be scheduled."""

    @abstractmethod
    def decide(self, shape: StepShape) -> Decision | None:
        """The plan for the step that was scheduled; None: the one that holds."""

    @property
    @abstractmethod
    def decision(self) -> Decision | None:
        """What was decided for the step that is under way."""

    @abstractmethod
    def done(self, record: StepRecord) -> None:
        """Learns from a step."""

    @property
    @abstractmethod
    def guaranteed_plan(self) -> OffloadPlan | None:
        """Whose memory requests may count on, as of the last step; None: the plan that holds."""

    @property
    @abstractmethod
    def adapts(self) -> bool:
        """Whether it ever changes its plan."""

    @property
    @abstractmethod
    def measured_link(self) -> Link | None:
        """The link as it was measured, None where it was not."""

    @abstractmethod
    def link_now(self, usage: LinkUsage) -> Link:
        """What the link gives now; `usage` is of all that it has ever carried."""

    @property
    @abstractmethod
    def limits(self) -> PlanLimits | None:
        """What keeps it from offloading more, as of the last step; None: a plan by hand. Waits for nobody."""

    def limited_by(self, plan: OffloadPlan) -> LimitedBy:
        """Why `plan`, which holds, does not offload more."""
        limits = self.limits
        return "by_hand" if limits is None else limits.limited_by(plan)

    @abstractmethod
    def snapshot(self) -> dict[str, Any] | None:
        """What is aimed at and how well it is known, as JSON-able values."""


class ManualControl(Control):
    """Leaves the plan as it was set by hand, and lets requests begin as they come. A policy may rest meanwhile."""

    is_manual = True

    def __init__(self, slo: SloConfig, max_requests: int, resting: Control | None = None) -> None:
        """`resting`: the policy whose objectives stay, and which is told of new ones."""
        self._slo, self._max_requests, self.resting = slo, max_requests, resting

    @property
    def objectives(self) -> Objectives | None:
        return self.resting.objectives if self.resting is not None else configured_objectives(self._slo)

    def set_objectives(self, slo: SloConfig) -> None:
        self._slo = slo
        if self.resting is not None:
            self.resting.set_objectives(slo)

    def set_link_share(self, share: LinkShare) -> None:
        """Changes nothing: a plan by hand takes what it takes."""

    def admit(
        self, handles: Mapping[str, RequestHandle], progress: Mapping[str, Chunk], backlog: Mapping[str, Chunk]
    ) -> NextStep:
        """As many as there are places; of these only the first is sure to find memory."""
        places = self._max_requests - len(progress)
        beginning = [ticket for ticket in handles if ticket not in progress][:places]
        return NextStep(beginning=beginning, served=frozenset((*progress, *beginning[:1])))

    def token_budget(self, most: int) -> int:
        return most

    def decide(self, shape: StepShape) -> Decision | None:
        return None

    @property
    def decision(self) -> Decision | None:
        return None

    def done(self, record: StepRecord) -> None:
        """Learns nothing."""

    @property
    def guaranteed_plan(self) -> OffloadPlan | None:
        return None

    @property
    def adapts(self) -> bool:
        return False

    @property
    def measured_link(self) -> Link | None:
        return None

    def link_now(self, usage: LinkUsage) -> Link:
        return Link(bytes_per_s=usage.bytes_per_s)

    @property
    def limits(self) -> PlanLimits | None:
        return None

    def snapshot(self) -> dict[str, Any] | None:
        return None
