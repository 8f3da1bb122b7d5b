"""The online stage: before every step, how many tokens of prefill may join it and what is offloaded while it runs.

The controller knows the record (what a step of every shape takes), learns how far it is off and what the link gives
now, and keeps every decoding request within its TPOT objective and every waiting one within its TTFT objective while
as much as possible lives in host memory. It decides; the executor moves the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from selectn_core.control.joining import Joining, StepAdmission, chunks
from selectn_core.control.load import PLANNED_SHARE, TTFT_SHARE, Load, in_turn, rounded_up
from selectn_core.control.policies import Policy, Situation
from selectn_core.control.prediction import Predictor
from selectn_core.control.tuning import ControllerTuning
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan, nearest_plan, place_by_index
from selectn_core.latency.recurrence import Link
from selectn_core.latency.step_times import StepTimes
from selectn_core.latency.steps import Chunk, StepRecord, StepShape
from selectn_core.offload.control import Decision, PlanLimits


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """A step that a plan must be good for, what it may take, and the objective, which must not be exceeded."""

    shape: StepShape
    limit_s: float
    objective_s: float


class Controller:
    """Called in the order of a step: `admit`, `decide`, `look` (beside the step, if a thread is free) and `learn`."""

    def __init__(
        self,
        times: StepTimes,
        link: Link,
        policy: Policy,
        *,
        slowdown: float = 0.0,
        max_tokens: int,
        guaranteed_share: float = 1.0,
        ttft_s: float = math.inf,
        percentile: float = 99.0,
        tuning: ControllerTuning | None = None,
    ) -> None:
        """`link` is the record's, `slowdown` how much a link that is always busy slows compute.

        `guaranteed_share` of the link is there whatever others on its bus do. `ttft_s` is the server's TTFT objective;
        `percentile` of requests, in percent, are to be within theirs.
        """
        self._tuning = tuning or ControllerTuning()
        self.times, self.policy, self.ttft_s, self.percentile = times, policy, ttft_s, percentile
        self._predictor = Predictor(
            times, link, slowdown=slowdown, guaranteed_share=guaranteed_share, percentile=percentile
        )
        self.link = self._predictor.link
        self.min_freed_bytes, self.max_offloaded_bytes = 0, None  # type: int, float | None
        self.held_freed_bytes = 0  # what those who run need: less is only freed where the link is not what it must be
        self.lacking_bytes = 0  # the same where it is more than `min_freed_bytes`; negative: so much is left over
        self.is_feasible = True
        self._slowdown, self._max_tokens = slowdown, max_tokens
        self._joining = Joining(times, self._predictor.scales, slowdown=slowdown, max_tokens=max_tokens)
        self._planned = self._following = StepShape.decode(1, 1)  # the next step, and the decode step after prefill
        self._num_chunks = 1  # steps of prefill that are left
        self._guaranteed: OffloadPlan | None = None
        self._guaranteed_tpot_s = math.inf
        self._busy_steps = 0
        self._is_prefill_held = False  # there is a prompt to compute, and no room for any of it beside who decodes
        self._is_broken = False  # the link gives less than is guaranteed, and steps are too long for it
        self._may_raise = 0
        self._unlooked_steps = 0  # since another plan was looked for
        self._look_for: tuple[Sequence[_Goal], OffloadPlan] | None = None  # goals, and the plan to be better than
        self._better: OffloadPlan | None = None  # what looks have found, for the next step that is decided
        self._prompts = [StepShape.prefill(tokens) for tokens in chunks(max_tokens)]
        self._guaranteed_factor = 0.0

    @property
    def compute_scale(self) -> float:
        """Measured over expected time of steps that only decode, in the middle: 1 where the record is right."""
        return self._predictor.scales[True].middle

    @property
    def look_every_steps(self) -> int:
        return self._tuning.look_every_steps

    @property
    def is_look_due(self) -> bool:
        """Whether `look` has something to do."""
        return self._look_for is not None

    @property
    def knows_better(self) -> bool:
        """Whether the next step that is decided may offload more."""
        return self._better is not None

    @property
    def learned(self) -> tuple[float, float, float]:
        """All that steps have taught it: the link's bytes per second, and how far the record is off."""
        return self._predictor.learned

    # -- before scheduling --------------------------------------------------------------------------------------

    def aim_at(self, policy: Policy, ttft_s: float, percentile: float) -> None:
        """Other objectives have been set; what was learned of the machine stays."""
        self.policy, self.ttft_s, self.percentile = policy, ttft_s, percentile
        self._predictor.aim_at(percentile)

    def rehearse(self, shapes: Iterable[StepShape], tpot_s: float) -> None:
        """Has the policy choose for these steps as if they were next, so that what is asked later is mostly known.

        At the bandwidth that is there and that is guaranteed, and for compute as fast as recorded and slower.
        """
        if not self.policy.adapts:
            return
        links = {self.link.link, self.link.guaranteed}
        for shape, link, slower in product(shapes, links, self._tuning.rehearsed):
            factor = (1 + self._slowdown) * slower
            self._wanted(shape, factor, link, PLANNED_SHARE * tpot_s, self.min_freed_bytes, self.max_offloaded_bytes)

    def admit(self, load: Load, plan: OffloadPlan) -> StepAdmission:
        """What may join the next step, while `plan` holds."""
        is_short = load.is_full or len(load.fitting) < len(load.waiting)
        self._busy_steps = self._tuning.busy_steps if is_short else max(0, self._busy_steps - 1)
        admission = self._joining.admit(load, self.lacking_bytes, self._has_memory)
        self._is_prefill_held = not admission.prefill_tokens and any(each.prefill_tokens for each in admission.turn)
        self._plan_for(load, admission)
        return admission

    def _plan_for(self, load: Load, admission: StepAdmission) -> None:
        """Notes the step that a plan is made for, with its prefill, and the decode step after it where none decodes."""
        self._planned = self._following = load.decoding_now
        turn, tokens = admission.turn, admission.prefill_tokens
        if not tokens:
            return
        prefills = [
            Chunk(rounded_up(num) if num > 1 else 1, past and rounded_up(past))
            for num, past in in_turn(turn, tokens)
            if num
        ]
        self._planned = load.step_with(prefills, rounded_up(load.mean_kv_tokens))
        if load.decoding:
            self._following = self._planned
            return
        following = load.joined_by(admission.beginning)
        self._following = following.decode_step(len(prefills), rounded_up(max(each.num_keys for each in turn)))
        self._num_chunks = -(-sum(each.prefill_tokens for each in turn) // tokens)

    def _has_memory(self, load: Load, limit_s: float, lacking_bytes: int) -> bool:
        """Whether what is offloaded in steps as short as this, at the bandwidth guaranteed, frees so much."""
        if limit_s >= PLANNED_SHARE * self._guaranteed_tpot_s or lacking_bytes <= self.min_freed_bytes:
            return True
        return self._predictor.freed_bytes(self._guaranteed_within(load, limit_s)) >= lacking_bytes

    def tightest_kept_tpot_s(self, load: Load) -> float:
        """The smallest TPOT objective, of those who hold KV, that can be kept at all; infinite without any."""
        return self._joining.tightest_kept_tpot_s(load)

    def guaranteed_plan(self, load: Load, tpot_s: float) -> OffloadPlan:
        """What could be offloaded if the link fell to what is guaranteed: requests must fit the memory that this frees.

        `tpot_s` is the objective that is to be held then, of those who run and of those who may come. Whatever more is
        offloaded while the link is better can come home at any moment, over a link that has just become slow, without
        taking memory from anybody.
        """
        self._guaranteed_tpot_s = tpot_s
        self._guaranteed = self._guaranteed_within(load, PLANNED_SHARE * tpot_s)
        return self._guaranteed

    def _guaranteed_within(self, load: Load, limit_s: float) -> OffloadPlan:
        shape = load.decode_step(len(load.decoding) + 1, rounded_up(load.mean_kv_tokens))
        factor, link = self._careful_factor(), self.link.guaranteed
        asked = (shape, factor, limit_s, link, self.min_freed_bytes, self.max_offloaded_bytes, self.policy)
        least, most = self.min_freed_bytes, self.max_offloaded_bytes
        return self._predictor.remembered.get(asked, lambda: self._wanted(shape, factor, link, limit_s, least, most))

    def _careful_factor(self) -> float:
        """Of compute beside a link that is always busy; it stays while it is a little more than needed."""
        rounding = self._tuning.rounding
        factor = math.ceil((1 + self._slowdown) * self._predictor.scales[True].high / rounding) * rounding
        if not 0 <= self._guaranteed_factor - factor < 1.5 * rounding:
            self._guaranteed_factor = factor
        return self._guaranteed_factor

    def _wanted(
        self, shape: StepShape, factor: float, link: Link, limit_s: float, least_bytes: int, most_bytes: float | None
    ) -> OffloadPlan:
        """What the policy chooses for a step whose compute takes `factor` times what the record expects.

        `least_bytes` are to be freed, `most_bytes` may be offloaded.
        """
        return self.policy.choose(
            Situation(
                costs=self.times.expected(shape),
                link=link.beside(factor),
                limit_s=limit_s / factor,
                min_freed_bytes=least_bytes,
                max_offloaded_bytes=most_bytes,
            )
        )

    # -- before the step ----------------------------------------------------------------------------------------

    def decide(self, shape: StepShape, current: OffloadPlan) -> Decision:
        """The plan for this step."""
        self.look()
        self._predictor.next_step()
        limit_s = self._limit_of(shape)
        late_s = self._tuning.urgent_share * self._joining.tpot_s
        self._is_broken = self.link.is_below_guarantee and self._predictor.steady_s(self._following, current) > late_s
        goals = self._goals(limit_s)
        plan = self._settle(goals, current)
        predicted_s = self._predictor.next_s(shape, current, plan)
        self.is_feasible = self._joining.unloaded_s(self._following) <= self._joining.tpot_s
        return Decision(
            plan=plan,
            urgent=self._is_broken and self._predictor.freed_bytes(plan) < self._predictor.freed_bytes(current),
            predicted_s=predicted_s,
            limit_s=limit_s,
            # `_settle` has asked for it already.
            held_s=self._predictor.steady_s(goals[0].shape, current) if self.policy.adapts else None,
        )

    def go_on(self) -> None:
        """A step runs by the last decision: it only counts."""
        self._unlooked_steps += 1
        self._busy_steps = max(0, self._busy_steps - 1)

    def _goals(self, limit_s: float) -> list[_Goal]:
        """What a plan must be good for. Not the step itself: what follows, for moving it takes a step.

        Where nobody decodes that is the chunk of prefill, and the decode step after it. A prompt that finds the server
        idle is to be in time as well: there is no time then for weights to come home.
        """
        goals = [_Goal(shape=self._planned, limit_s=limit_s, objective_s=self._joining.tpot_s)]
        if self._following is not self._planned:
            tpot_s = self._joining.tpot_s
            goals = [
                _Goal(shape=self._planned, limit_s=limit_s, objective_s=math.inf),
                _Goal(shape=self._following, limit_s=PLANNED_SHARE * tpot_s, objective_s=tpot_s),
            ]
        in_time_s = TTFT_SHARE * self.ttft_s
        prompts = self._prompts if in_time_s < math.inf else ()
        largest = next(
            (each for each in prompts if self._tuning.busy_stretch * self._joining.unloaded_s(each) <= in_time_s), None
        )
        if largest is not None:
            goals.append(_Goal(shape=largest, limit_s=in_time_s, objective_s=self.ttft_s))
        return goals

    def _limit_of(self, shape: StepShape) -> float:
        """Seconds that steps may take: for those who decode, for those who wait for prefill, or for memory."""
        limit_s, prefill_tokens = self._joining.limit_s, shape.num_tokens - shape.num_decodes
        if prefill_tokens and self._joining.prefill_s_per_token < math.inf:
            planned_tokens = max(1, self._planned.num_tokens - self._planned.num_decodes)
            limit_s = min(limit_s, max(planned_tokens, prefill_tokens) * self._joining.prefill_s_per_token)
        # Below this nothing is won by bringing weights home, and the link is busy with them meanwhile.
        fastest_s = self._tuning.busy_stretch * self._joining.unloaded_s(self._planned)
        is_prefill_alone = self._following is not self._planned  # then no token of anybody's waits for this step
        limit_s = max(limit_s, fastest_s if is_prefill_alone else min(fastest_s, PLANNED_SHARE * self._joining.tpot_s))
        if self._busy_steps and self._guaranteed is not None:
            # Not below what the memory of those who run needs.
            fast_s = max(fastest_s, self._predictor.steady_s(self._planned, self._guaranteed))
            limit_s = min(limit_s, fast_s * (1 + self._tuning.rounding))
        return limit_s

    def _choose(self, goals: Sequence[_Goal], current: OffloadPlan) -> OffloadPlan:
        """What the policy wants now: for the first goal, or for another one that this does not meet."""
        wanted = self._choose_for(goals[0], current)
        for goal in goals[1:]:
            if self._predictor.steady_s(goal.shape, wanted) > goal.limit_s * (1 + self._tuning.rounding):
                wanted = self._choose_for(goal, current)
        return wanted

    def _choose_for(self, goal: _Goal, current: OffloadPlan) -> OffloadPlan:
        """At what compute takes beside the copies of `current`, and beside its own."""
        shape, limit_s = goal.shape, goal.limit_s
        wanted = self._choose_beside(shape, current, current, limit_s)
        if wanted != current and self._predictor.steady_s(shape, wanted) > limit_s * (1 + self._tuning.rounding):
            wanted = self._choose_beside(shape, wanted, current, limit_s)
        return wanted

    def _choose_beside(
        self, shape: StepShape, copying: OffloadPlan, current: OffloadPlan, limit_s: float
    ) -> OffloadPlan:
        least = self.min_freed_bytes if self._is_broken else self.held_freed_bytes
        factor = self._predictor.factor(shape, copying, careful=True)
        return self._wanted(shape, factor, self.link.link, limit_s, least, self._most_offloaded_bytes(current))

    def _most_offloaded_bytes(self, current: OffloadPlan) -> float | None:
        """While nothing is copied the link is not known: then it is tried with two units before more depend on it."""
        if not self.link.is_stale or current.num_offloaded > self._tuning.fewest_copied:
            return self.max_offloaded_bytes
        most = self._tuning.fewest_copied * max(self.times.unit_bytes)
        return most if self.max_offloaded_bytes is None else min(most, self.max_offloaded_bytes)

    def _settle(self, goals: Sequence[_Goal], current: OffloadPlan) -> OffloadPlan:
        """Between the plan that holds and the one that is wanted: no moving to and fro for a hair's breadth."""
        if not self.policy.adapts:
            return self._choose(goals, current)
        exceeds_range = self._exceeds_range(current)
        missed = next(
            (g for g in goals if self._predictor.steady_s(g.shape, current) > g.limit_s * (1 + self._tuning.tolerance)),
            None,
        )
        self._unlooked_steps += 1
        if not exceeds_range and missed is None:
            return self._go_up(goals, current)
        self._better, self._unlooked_steps = None, 0
        wanted = self._choose(goals, current)
        if exceeds_range and not self._exceeds_range(wanted):
            self._may_raise = 0
            return self._with_few_moves(goals, current, wanted)
        if missed is not None:
            self._may_raise = 0
            plan = self._with_few_moves(goals, current, wanted)
            if not self._is_worth_moving(missed, current, plan):
                return current
            return self._sooner(goals, current, plan)
        # The range is exceeded either way: memory needs it.
        better = self._seen(wanted, current)
        return current if better is None else self._with_few_moves(goals, current, better)

    def _go_up(self, goals: Sequence[_Goal], current: OffloadPlan) -> OffloadPlan:
        """Nothing presses: what looks have found, if it is still good; and now and then the next look is due."""
        better, self._better = self._better, None
        if self._unlooked_steps >= self.look_every_steps:
            self._unlooked_steps, self._look_for = 0, (goals, current)
        if better is None or self._exceeds_range(better) or not self._gains(better, current):
            return current
        loosely = 1 + self._tuning.rounding
        if any(self._predictor.steady_s(goal.shape, better) > goal.limit_s * loosely for goal in goals):
            return current
        return self._with_few_moves(goals, current, better)

    def _gains(self, wanted: OffloadPlan, current: OffloadPlan) -> bool:
        """Weights come home over the link, and other ones go for a reason: neither is free."""
        return self._predictor.freed_bytes(wanted) > (1 + self._tuning.gain) * self._predictor.freed_bytes(current)

    def look(self) -> None:
        """Looks for a plan that frees more, if that is due. No token waits for it: the step that was decided runs.

        By another thread than the engine's, while that calls nothing here; else the next `decide` does it.
        """
        if self._look_for is None:
            return
        (goals, current), self._look_for = self._look_for, None
        self._better = self._seen(self._choose(goals, current), current)

    def _seen(self, wanted: OffloadPlan, current: OffloadPlan) -> OffloadPlan | None:
        """What a look found, where it and those before it say that more can be offloaded."""
        self._may_raise = self._may_raise + 1 if self._gains(wanted, current) else 0
        return wanted if self._may_raise >= self._tuning.raise_after_looks else None

    def _sooner(self, goals: Sequence[_Goal], current: OffloadPlan, plan: OffloadPlan) -> OffloadPlan:
        """`plan`; or, where that is there sooner, as many of the units that are offloaded now as the limits allow.

        A plan of other units brings all of these home first, over a link that may just have become slow. It comes later
        then, if it still frees more.
        """
        if not self.policy.any_units:
            return plan
        for num in range(current.num_offloaded - 1, current.num_slots, -1):
            offloaded = place_by_index(num, num_units=current.num_units, among=current.offloaded)
            fewer = replace(current, offloaded=offloaded)
            if all(self._predictor.steady_s(goal.shape, fewer) <= goal.limit_s for goal in goals):
                break
        else:
            return plan
        shape, needed_bytes = goals[0].shape, self.min_freed_bytes if self._is_broken else self.held_freed_bytes
        is_sooner = self._predictor.next_s(shape, current, fewer) < self._predictor.next_s(shape, current, plan)
        return fewer if is_sooner and self._predictor.freed_bytes(fewer) >= needed_bytes else plan

    def _exceeds_range(self, plan: OffloadPlan) -> bool:
        """Whether it offloads more bytes than may be: the link that its copies would take belongs to others."""
        return self._predictor.offloaded_bytes(plan) > (
            math.inf if self.max_offloaded_bytes is None else self.max_offloaded_bytes
        )

    def _is_worth_moving(self, missed: _Goal, current: OffloadPlan, plan: OffloadPlan) -> bool:
        """Whether the objective is exceeded, or shorter steps soon make up for the time in which weights come home."""
        shape = missed.shape
        if missed.objective_s == math.inf:  # prefill alone: no longer in all than it would take as it is
            stays_s, moves_s = (self._predictor.next_s(shape, current, each) for each in (current, plan))
            saved_s = stays_s - self._predictor.next_s(shape, plan, plan)
            return moves_s - stays_s < (self._num_chunks - 1) * saved_s
        if self._predictor.steady_s(shape, current) > missed.objective_s:
            return True
        promoted_bytes = sum(self.times.unit_bytes[unit] for unit in set(current.offloaded) - set(plan.offloaded))
        saved_s = self._predictor.steady_s(shape, current) - self._predictor.steady_s(shape, plan)
        return saved_s * self._tuning.pays_off_steps >= promoted_bytes / self.link.link.bytes_per_s

    def _with_few_moves(self, goals: Sequence[_Goal], current: OffloadPlan, wanted: OffloadPlan) -> OffloadPlan:
        if not self.policy.any_units:
            return wanted
        near = nearest_plan(current, wanted)
        wanted_bytes = self._predictor.freed_bytes(wanted)
        least_bytes = max((1 - self._tuning.gain) * wanted_bytes, min(wanted_bytes, self.held_freed_bytes))
        frees_as_much = self._predictor.freed_bytes(near) >= least_bytes
        if self._exceeds_range(near) and not self._exceeds_range(wanted):
            return wanted
        is_as_fast = all(
            self._predictor.steady_s(goal.shape, near)
            <= min(goal.limit_s, 1.05 * self._predictor.steady_s(goal.shape, wanted))
            for goal in goals
        )
        return near if frees_as_much and is_as_fast else wanted

    @property
    def limits(self) -> PlanLimits:
        """What keeps plans from offloading more, as of the last step. Reads only: no lock is needed."""
        return PlanLimits(
            adapts=self.policy.adapts,
            is_busy=bool(self._busy_steps),
            unit_bytes=self.times.unit_bytes,
            held_freed_bytes=self.held_freed_bytes,
            max_offloaded_bytes=self.max_offloaded_bytes,
            link_bytes_per_s=self.link.link.bytes_per_s,
            share_bytes_per_s=self.link.share_bytes_per_s,
        )

    # -- after the step -----------------------------------------------------------------------------------------

    def learn(self, record: StepRecord, usage: LinkUsage) -> None:
        """Takes in what the step took, and what the link has carried in all."""
        self._predictor.learn(record, usage)
        if self._is_prefill_held:
            self._predictor.scales[False].forget_worst()
