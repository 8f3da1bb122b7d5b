"""The one owner of the plan: who decides it, what was asked for, and what becomes of it at every step.

A plan comes about in four stages, each with one holder:

    policy     names a plan for what is expected           `Control` (a policy's, or by hand)
    decision   that plan, for one step                     `Control.decision`
    target     what is aimed at from now on                `Target.plan`
    executor   what holds in device memory                 `Executor.plan`

The target may lack memory while requests hold it. Then more is offloaded than it says, until memory comes free.
"""

from __future__ import annotations

import threading

from selectn_core.batching import ContinuousBatching
from selectn_core.config import MAX_SLOTS, EngineConfig, SloConfig, require
from selectn_core.decision_log import DecisionLog
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import recompute_s, swap_s
from selectn_core.latency.steps import StepLog, StepShape
from selectn_core.memory.arena import Arena
from selectn_core.memory.kv_geometry import KvGeometry
from selectn_core.offload.control import Control, LinkShare, ManualControl
from selectn_core.offload.executor import Executor
from selectn_core.offload.interval_facts import IntervalFacts
from selectn_core.offload.target import Target
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.table import RequestTable

# Of the decisions that leave the plan as it is one in so many steps is logged: why k is what it is should be there too.
LOG_EVERY_STEPS = 256


class Offloading:
    """An engine's. What is set may be set from any thread; the rest is called on the generation thread."""

    def __init__(
        self,
        config: EngineConfig,
        requests: RequestTable,
        batching: ContinuousBatching,
        arena: Arena,
        executor: Executor,
        target: Target,
    ) -> None:
        self.units, self.device = executor.units, executor.device
        self.requests, self.batching, self.arena = requests, batching, arena
        self.executor, self.target = executor, target
        # Another thread may put another control here at any moment: read it once.
        self.control: Control = ManualControl(config.slo, config.batch.max_requests)
        self.link_share: LinkShare | None = None
        self.decisions = DecisionLog("interval")
        self._unlogged_steps = LOG_EVERY_STEPS  # the first step's is logged
        self._max_requests = config.batch.max_requests
        self._lock = threading.Lock()  # of what is aimed at
        # Those that hold KV or may begin in the next step, by ticket. One that is cancelled meanwhile is among them: it
        # computes that step, and the step counts on its memory.
        self._served: dict[str, RequestHandle] = {}

    @property
    def plan(self) -> OffloadPlan:
        """What holds now."""
        return self.executor.plan

    @property
    def geometry(self) -> KvGeometry:
        return self.batching.geometry

    def offloaded_bytes(self, plan: OffloadPlan) -> int:
        """Bytes of the units that live only in host memory under `plan`."""
        return self.target.plans.offloaded_bytes(plan)

    # -- who decides --------------------------------------------------------------------------------------------

    def put_in_control(self, control: Control) -> None:
        """Lets `control` decide from now on."""
        self.control = control
        if self.link_share is not None:
            control.set_link_share(self.link_share)

    def set_link_share(self, share: LinkShare) -> None:
        """What this replica may use of its host bus from the next step on, whoever decides."""
        self.link_share = share
        self.control.set_link_share(share)

    def set_num_offloaded(self, num_offloaded: int, num_slots: int | None = None) -> None:
        """Offloads `num_offloaded` of the units from the next iteration on, by hand: the policy rests.

        While the KV cache uses the memory that fewer of them need, or a request needs more of it than this number
        leaves, more are offloaded. Raises ConfigError if it can never be.
        """
        slots = num_slots if num_slots is not None else self.target.plan.num_slots
        require(1 <= slots <= MAX_SLOTS, "num_slots", slots, f"1 to {MAX_SLOTS}")
        self._aim_by_hand(self.target.of("num_offloaded", num_offloaded, slots))

    def set_plan(self, plan: OffloadPlan, *, urgent: bool = False) -> None:
        """As `set_num_offloaded`, with the units chosen by the caller.

        An `urgent` plan does not wait for running requests to release the memory that it needs: before the next step
        is scheduled the newest are preempted until it fits or one is left. They go on later, their tokens the same.
        """
        self._aim_by_hand(self.target.checked("the plan", plan), urgent=urgent)

    def _aim_by_hand(self, plan: OffloadPlan, *, urgent: bool = False) -> None:
        with self._lock:  # the policy may be deciding right now: what it comes to is of no interest any more
            if not self.control.is_manual:
                self.control = ManualControl(SloConfig(), self._max_requests, resting=self.control)
            self.target.aim_at(plan, urgent=urgent)

    # -- a step -------------------------------------------------------------------------------------------------

    def before_schedule(self, *, drops_unknown: bool) -> list[str]:
        """Moves weights and KV pages to where the next step wants them; which new requests may begin, in their turn.

        `drops_unknown`: requests that only the batching knows are cancelled.
        """
        if self.target.is_urgent:
            self._forget_ended()
            self._preempt_for(self._wanted_plan())
        beginning = self._may_begin(drops_unknown)
        self._follow_target()
        # What is still to come back waits for KV to be released: no new request may take its place.
        if self.executor.plan != self.executor.wanted:
            return []
        for ticket in beginning:
            handle = self.requests.get(ticket)
            if handle is not None:
                handle.begins()
        return beginning

    def _may_begin(self, drops_unknown: bool) -> list[str]:
        control, progress, backlog = self.control, self.batching.progress(), self.batching.backlog()
        handles = self.requests.by_ticket()  # after the backlog: who is there and not here is not wanted any more
        if drops_unknown:
            for ticket in backlog.keys() - handles.keys():
                self.batching.cancel(ticket)
        step = control.admit(handles, progress, backlog)
        known = {**self._served, **handles}
        self._served = {ticket: known[ticket] for ticket in step.served if ticket in known}
        return list(step.beginning)

    def step_planned(self, shape: StepShape) -> None:
        """Has the plan for this step decided, and follows it."""
        control = self.control
        decision = control.decide(shape)
        if decision is not None:
            with self._lock:
                if self.control is control:
                    self.target.aim_at(decision.plan, urgent=decision.urgent)
        self._follow_target(shape)  # which may have just been changed, for this step

    def step_done(self, steps: StepLog, shape: StepShape, duration_s: float) -> None:
        """Notes the step in `steps`, and lets the control learn from it."""
        plan, control = self.executor.plan, self.control
        decision = control.decision
        record = steps.add(
            shape,
            plan,
            duration_s=duration_s,
            stall_s=self.executor.end_step(),
            offloaded_bytes=self.offloaded_bytes(plan),
            # What was predicted is of the plan that was decided, which memory may not have allowed.
            predicted_s=decision.predicted_s if decision is not None and decision.plan == plan else None,
            limit_s=decision.limit_s if decision is not None else None,
        )
        control.done(record)

    def served(self) -> list[RequestHandle]:
        """Requests that hold KV or may begin now, as of the step that was scheduled last; any thread."""
        served = self._served
        return [handle for ticket, handle in self.requests.by_ticket().items() if ticket in served]

    def _forget_ended(self) -> None:
        """Those of the last step that hold nothing any more: no step counts on their memory."""
        progress, handles = self.batching.progress(), self.requests.by_ticket()
        self._served = {
            ticket: handle for ticket, handle in self._served.items() if ticket in progress or ticket in handles
        }

    def _follow_target(self, shape: StepShape | None = None) -> None:
        """`shape`: the step that was scheduled, where one was."""
        before, wanted = self.executor.wanted, self._wanted_plan()
        if wanted != before:
            self.executor.request_plan(wanted)
        self._unlogged_steps += shape is not None
        if wanted != before or self._unlogged_steps >= LOG_EVERY_STEPS:
            self._log(before, wanted, shape)
        self.executor.apply_plan()

    def _log(self, before: OffloadPlan, wanted: OffloadPlan, shape: StepShape | None) -> None:
        """What was known and decided; a step waits for no more than this tuple."""
        control, self._unlogged_steps = self.control, 0
        self.decisions.add(IntervalFacts(before, wanted, self.target.plan, control.decision, shape, control.limits))

    def _preempt_for(self, plan: OffloadPlan) -> None:
        while self.batching.pages.num_in_use > self.target.kv_sectors(plan) and self.batching.preempt_newest():
            pass

    def _wanted_plan(self) -> OffloadPlan:
        """The target, with more offloaded while the longest request would not fit the KV cache otherwise.

        Of those that hold KV or may begin now: for one that only waits nothing has to move yet.
        """
        longest = max((handle.max_total_tokens for handle in self._served.values()), default=0)
        return self.target.with_kv(self.geometry.sectors_for_request(longest))

    def swap_is_cheaper(self, num_tokens: int, num_bytes: int, prefill_s_per_token: float | None) -> bool:
        """Whether a preempted request's KV should wait in host memory rather than be computed again."""
        if prefill_s_per_token is None:
            return True
        link = self.control.link_now(self.device.link_usage())
        return swap_s(num_bytes, link) < recompute_s(num_tokens, prefill_s_per_token)
