"""The online stage: before every step, how many tokens of prefill may join it and what is offloaded while it runs.

The controller knows the record (what a step of every shape takes), learns how far it is off and what the link gives
now, and keeps every decoding request within its TPOT objective and every waiting one within its TTFT objective while
as much as possible lives in host memory. It decides; the executor moves the bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from selectn_core.device import LinkUsage
from selectn_core.in_flight import PLANNED_SHARE, Load, prefill_pace_s, tpot_limit_s
from selectn_core.latency import Link, simulate_steps_s
from selectn_core.learning import ComputeScale, LinkEstimate
from selectn_core.placement import OffloadPlan, freed_bytes, nearest_plan
from selectn_core.policies import Policy, Situation
from selectn_core.remembered import Remembered
from selectn_core.step_times import StepTimes, scaled, slowed
from selectn_core.steps import StepRecord, StepShape

_SMALLEST_CHUNK = 16
# Of a step that decodes, what its compute may take with a chunk of prefill in it: what is left hides copies.
_CHUNK_SHARE = 0.85
# While requests wait for memory, what a step may take at most in unloaded steps: they need speed, not more memory.
_BUSY_STRETCH = 1.1
# For so many steps after the last one that waited: more are likely to follow, and moving weights costs steps.
_BUSY_STEPS = 24
_RAISE_AFTER_STEPS = 4
# By how much a step may exceed its limit before weights come home for it (predictions are rounded to a few percent),
# and by how much more must be freed before others move.
_TOLERANCE, _GAIN = 0.04, 0.1
_ROUNDING = 0.02
_PAYS_OFF_STEPS = 16
# Steps longer than this many objectives are reason to take memory from running requests.
_URGENT_SHARE = 1.25
_FEWEST_COPIED = 2


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What the next step may take in: tokens of prefill, and how many requests that have no KV yet."""

    prefill_tokens: int
    num_beginning: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The plan for a step; `urgent` where weights must come home though requests hold the memory.

    `predicted_s` is what the step should take, `limit_s` what it may.
    """

    plan: OffloadPlan
    urgent: bool
    predicted_s: float
    limit_s: float


class Controller:
    """Called by the engine's thread, in the order of a step: `admit`, `decide`, `learn`."""

    def __init__(
        self,
        times: StepTimes,
        link: Link,
        policy: Policy,
        *,
        slowdown: float = 0.0,
        max_tokens: int,
        guaranteed_share: float = 1.0,
    ) -> None:
        """`link` is the record's, `slowdown` how much a link that is always busy slows compute.

        `guaranteed_share` of the link is there whatever others on its bus do.
        """
        self.times, self.policy = times, policy
        self.link = LinkEstimate(link, guaranteed_share)
        self.min_freed_bytes, self.max_offloaded_bytes = 0, None  # type: int, float | None
        self.held_freed_bytes = 0  # what those who run need: less is only freed where the link is not what it must be
        self.is_feasible = True
        self._slowdown, self._max_tokens = slowdown, max_tokens
        self._scales = {True: ComputeScale(), False: ComputeScale()}  # of steps that only decode, and others
        self._tpot_s, self._limit_s, self._prefill_s_per_token = math.inf, math.inf, math.inf
        self._planned = StepShape.decode(1, 1)
        self._guaranteed: OffloadPlan | None = None
        self._guaranteed_for: object = None
        self._busy_steps = 0
        self._is_prefill_held = False  # there is a prompt to compute, and no room for any of it beside who decodes
        self._is_broken = False  # the link gives less than is guaranteed, and steps are too long for it
        self._may_raise = 0
        self._last_usage: LinkUsage | None = None
        self._remembered = Remembered()

    @property
    def compute_scale(self) -> float:
        """Measured over expected time of steps that only decode, in the middle: 1 where the record is right."""
        return self._scales[True].middle

    # -- before scheduling --------------------------------------------------------------------------------------

    def admit(self, load: Load, plan: OffloadPlan) -> Admission:
        """What may join the next step, while `plan` holds."""
        batch = len(load.decoding)
        kv_tokens = _rounded_up(load.mean_kv_tokens)
        decode = load.sampling_in(StepShape.decode(max(1, batch), kv_tokens))
        unloaded_s = self._unloaded_s(decode)
        self._tpot_s = load.tightest_tpot_s
        limits_s = [tpot_limit_s(each, load.now_s, unloaded_s) for each in load.decoding]
        self._limit_s = min([PLANNED_SHARE * self._tpot_s, *limits_s])
        self._prefill_s_per_token = prefill_pace_s(load)
        self._busy_steps = (
            _BUSY_STEPS if load.is_full or len(load.fitting) < len(load.waiting) else max(0, self._busy_steps - 1)
        )
        num_beginning = self._num_beginning(load, kv_tokens)
        load = replace(load, num_fitting=load.num_begun + num_beginning)
        tokens = self._chunk(load)
        self._is_prefill_held = not tokens and any(each.prefill_tokens for each in load.fitting)
        self._planned = decode
        if tokens and batch:
            self._planned = load.sampling_in(StepShape.of([(_rounded_up(tokens), 0)], [kv_tokens] * batch))
        return Admission(prefill_tokens=tokens, num_beginning=num_beginning)

    def _num_beginning(self, load: Load, kv_tokens: int) -> int:
        """How many may begin, of those that fit: with all of them decoding everybody is within the objective still.

        One may where nobody else runs: it is not served better later.
        """
        running, most = len(load.decoding) + load.num_begun, len(load.fitting) - load.num_begun

        def is_too_slow(num_more: int) -> bool:
            shape = load.sampling_in(StepShape.decode(running + num_more, kv_tokens))
            return self._unloaded_s(shape) > self._limit_s

        if most <= 0 or not is_too_slow(most):
            return max(0, most)
        least = 0 if running else 1
        return max(least, bisect_left(range(1, most), True, key=is_too_slow))

    def _chunk(self, load: Load) -> int:
        """Tokens of prefill for the next step: what its compute has room for, more where TTFT wants it, some if any."""
        batch = len(load.decoding)
        room = min(self._max_tokens - batch, sum(each.prefill_tokens for each in load.fitting))
        if not batch or room <= 0:
            return max(0, room)
        decodes = [load.mean_kv_tokens] * batch
        least = min(_SMALLEST_CHUNK, next(each.prefill_tokens for each in load.fitting if each.prefill_tokens))
        needed = max(_SMALLEST_CHUNK, self._limit_s / self._prefill_s_per_token)
        slowed = 1 + self._slowdown  # beside a link that is always busy, as it is where most is offloaded
        for tokens in _chunks(room, least):
            shape = load.sampling_in(StepShape.of(prefills=[(tokens, 0)], decodes=decodes))
            unloaded_s = slowed * self._unloaded_s(shape)
            if unloaded_s <= (self._limit_s if tokens <= needed else _CHUNK_SHARE * self._limit_s):
                return tokens
        return 0

    def guaranteed_plan(self, load: Load, tpot_s: float) -> OffloadPlan:
        """What could be offloaded if the link fell to what is guaranteed: requests must fit the memory that this frees.

        `tpot_s` is the objective that is to be held then, of those who run and of those who may come. Whatever more is
        offloaded while the link is better can come home at any moment, over a link that has just become slow, without
        taking memory from anybody.
        """
        shape = load.sampling_in(StepShape.decode(len(load.decoding) + 1, _rounded_up(load.mean_kv_tokens)))
        scale = math.ceil((1 + self._slowdown) * self._scales[True].high / _ROUNDING) * _ROUNDING
        limit_s, link = PLANNED_SHARE * tpot_s, self.link.guaranteed
        asked = (shape, scale, limit_s, link, self.min_freed_bytes, self.max_offloaded_bytes, self.policy)
        if asked != self._guaranteed_for:
            situation = Situation(
                costs=self.times.expected(shape),
                link=link.beside(scale),
                limit_s=limit_s / scale,
                min_freed_bytes=self.min_freed_bytes,
                max_offloaded_bytes=self.max_offloaded_bytes,
            )
            self._guaranteed, self._guaranteed_for = self.policy.choose(situation), asked
        assert self._guaranteed is not None
        return self._guaranteed

    # -- before the step ----------------------------------------------------------------------------------------

    def decide(self, shape: StepShape, current: OffloadPlan) -> Decision:
        """The plan for this step."""
        limit_s = self._limit_of(shape)
        late_s = _URGENT_SHARE * self._tpot_s
        self._is_broken = self.link.is_below_guarantee and self._predict(self._planned, current) > late_s
        planned = self._planned  # not the step itself: a plan must be good for what follows, moving it takes a step
        wanted = self._choose(planned, current, limit_s)
        plan = self._settle(planned, current, wanted, limit_s)
        predicted_s = self._predict_first(shape, current, plan)
        self.is_feasible = self._unloaded_s(planned) <= self._tpot_s
        return Decision(
            plan=plan,
            urgent=self._is_broken and self._freed_bytes(plan) < self._freed_bytes(current),
            predicted_s=predicted_s,
            limit_s=limit_s,
        )

    def _limit_of(self, shape: StepShape) -> float:
        """Seconds that steps may take: for those who decode, for those who wait for prefill, or for memory."""
        limit_s, prefill_tokens = self._limit_s, shape.num_tokens - shape.num_decodes
        if prefill_tokens and self._prefill_s_per_token < math.inf:
            planned_tokens = max(1, self._planned.num_tokens - self._planned.num_decodes)
            limit_s = min(limit_s, max(planned_tokens, prefill_tokens) * self._prefill_s_per_token)
        # Below this nothing is won by bringing weights home, and the link is busy with them meanwhile.
        fastest_s = _BUSY_STRETCH * self._unloaded_s(self._planned)
        limit_s = max(limit_s, min(fastest_s, PLANNED_SHARE * self._tpot_s))
        if self._busy_steps and self._guaranteed is not None:
            # Not below what the memory of those who run needs.
            fast_s = max(fastest_s, self._predict(self._planned, self._guaranteed))
            limit_s = min(limit_s, fast_s * (1 + _ROUNDING))
        return limit_s

    def _choose(self, shape: StepShape, current: OffloadPlan, limit_s: float) -> OffloadPlan:
        """What the policy wants now, at what compute takes beside the copies of `current`, and beside its own."""
        wanted = self._choose_beside(shape, current, current, limit_s)
        if wanted != current and self._predict(shape, wanted) > limit_s * (1 + _ROUNDING):
            wanted = self._choose_beside(shape, wanted, current, limit_s)
        return wanted

    def _choose_beside(
        self, shape: StepShape, copying: OffloadPlan, current: OffloadPlan, limit_s: float
    ) -> OffloadPlan:
        factor = self._factor(shape, copying, careful=True)
        return self.policy.choose(
            Situation(
                costs=self.times.expected(shape),
                link=self.link.link.beside(factor),
                limit_s=limit_s / factor,
                min_freed_bytes=self.min_freed_bytes if self._is_broken else self.held_freed_bytes,
                max_offloaded_bytes=self._most_offloaded_bytes(current),
            )
        )

    def _most_offloaded_bytes(self, current: OffloadPlan) -> float | None:
        """While nothing is copied the link is not known: then it is tried with two units before more depend on it."""
        if not self.link.is_stale or current.num_offloaded > _FEWEST_COPIED:
            return self.max_offloaded_bytes
        most = _FEWEST_COPIED * max(self.times.unit_bytes)
        return most if self.max_offloaded_bytes is None else min(most, self.max_offloaded_bytes)

    def _settle(self, shape: StepShape, current: OffloadPlan, wanted: OffloadPlan, limit_s: float) -> OffloadPlan:
        """Between the plan that holds and the one that is wanted: no moving to and fro for a hair's breadth."""
        if not self.policy.adapts:
            return wanted
        if self._exceeds_range(current) and not self._exceeds_range(wanted):
            self._may_raise = 0
            return self._with_few_moves(shape, current, wanted, limit_s)
        current_s = self._predict(shape, current)
        if current_s > limit_s * (1 + _TOLERANCE):
            self._may_raise = 0
            plan = self._with_few_moves(shape, current, wanted, limit_s)
            return plan if current_s > self._tpot_s or self._pays_off(shape, current, plan) else current
        # weights come home over the link, and other ones go for a reason: neither is free
        gains = self._freed_bytes(wanted) > (1 + _GAIN) * self._freed_bytes(current)
        self._may_raise = self._may_raise + 1 if gains else 0
        if self._may_raise < _RAISE_AFTER_STEPS:
            return current
        return self._with_few_moves(shape, current, wanted, limit_s)

    def _exceeds_range(self, plan: OffloadPlan) -> bool:
        """Whether it offloads more bytes than may be: the link that its copies would take belongs to others."""
        return self._offloaded_bytes(plan) > (
            math.inf if self.max_offloaded_bytes is None else self.max_offloaded_bytes
        )

    def _pays_off(self, shape: StepShape, current: OffloadPlan, plan: OffloadPlan) -> bool:
        """Whether shorter steps soon make up for the time in which the link brings weights home."""
        promoted_bytes = sum(self.times.unit_bytes[unit] for unit in set(current.offloaded) - set(plan.offloaded))
        saved_s = self._predict(shape, current) - self._predict(shape, plan)
        return saved_s * _PAYS_OFF_STEPS >= promoted_bytes / self.link.link.bytes_per_s

    def _freed_bytes(self, plan: OffloadPlan) -> int:
        return freed_bytes(plan, self.times.unit_bytes)

    def _with_few_moves(
        self, shape: StepShape, current: OffloadPlan, wanted: OffloadPlan, limit_s: float
    ) -> OffloadPlan:
        if self.policy.name != "select-n":
            return wanted
        near = nearest_plan(current, wanted)
        wanted_bytes = self._freed_bytes(wanted)
        least_bytes = max((1 - _GAIN) * wanted_bytes, min(wanted_bytes, self.held_freed_bytes))
        frees_as_much = self._freed_bytes(near) >= least_bytes
        if self._exceeds_range(near) and not self._exceeds_range(wanted):
            return wanted
        is_as_fast = self._predict(shape, near) <= min(limit_s, 1.05 * self._predict(shape, wanted))
        return near if frees_as_much and is_as_fast else wanted

    # -- after the step -----------------------------------------------------------------------------------------

    def learn(self, record: StepRecord, usage: LinkUsage) -> None:
        """Takes in what the step took, and what the link has carried in all."""
        if self._last_usage is not None:
            self.link.add(usage.since(self._last_usage))
        self._last_usage = usage
        unloaded_s = self.times.expected_s(record.shape)
        unloaded_s *= slowed(unloaded_s, _bytes_copied(record), self.link.link, self._slowdown)
        self._scales[record.shape.is_decode_only].add((record.duration_s - record.stall_s) / unloaded_s)
        if self._is_prefill_held:
            self._scales[False].forget_worst()

    # -- prediction ---------------------------------------------------------------------------------------------

    def _unloaded_s(self, shape: StepShape) -> float:
        return self.times.expected_s(shape) * self._scales[shape.is_decode_only].high

    def _predict(self, shape: StepShape, plan: OffloadPlan) -> float:
        """Seconds of a step of this shape once `plan` has held for a while, on the careful side."""
        return self._predicted_s(shape, plan, self._factor(shape, plan, careful=True))

    def _predicted_s(self, shape: StepShape, plan: OffloadPlan, factor: float) -> float:
        link = self.link.link.beside(factor)
        return factor * self._remembered.predict_step_s(self.times.expected(shape), plan, link)

    def _factor(self, shape: StepShape, plan: OffloadPlan, *, careful: bool) -> float:
        """Compute under `plan` over what the record expects: what was learned, and what copies slow it by."""
        scale, unloaded_s = self._scales[shape.is_decode_only], self.times.expected_s(shape)
        copied_bytes = self._copied_bytes(plan) if self._slowdown else 0
        return (scale.high if careful else scale.middle) * slowed(
            unloaded_s, copied_bytes, self.link.link, self._slowdown
        )

    def _copied_bytes(self, plan: OffloadPlan) -> int:
        return self._offloaded_bytes(plan) if plan.num_offloaded > plan.num_slots else 0

    def _offloaded_bytes(self, plan: OffloadPlan) -> int:
        return self._remembered.get(plan, lambda: sum(self.times.unit_bytes[unit] for unit in plan.offloaded))

    def _predict_first(self, shape: StepShape, current: OffloadPlan, plan: OffloadPlan) -> float:
        """Seconds that the next step should take, the copies of a change of plan included."""
        factor = self._factor(shape, plan, careful=False)
        if plan == current:
            return self._predicted_s(shape, plan, factor)
        promoted = sorted(set(current.offloaded) - set(plan.offloaded))
        kept = [unit for unit in plan.offloaded if unit in set(current.offloaded[: current.num_slots])]
        costs, link = scaled(self.times.expected(shape), factor), self.link.link
        return simulate_steps_s(costs, plan.offloaded, plan.num_slots, link, 1, promoted=promoted, in_slots=kept)[0]


def _rounded_up(num_tokens: int) -> int:
    """To a sixteenth or so: the keys of a batch grow with every step, and nothing hangs on one."""
    unit = max(16, 1 << max(0, num_tokens.bit_length() - 4))
    return -(-num_tokens // unit) * unit


def _chunks(most: int, least: int) -> list[int]:
    """Sizes of a chunk of prefill to try, from the largest down."""
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] * 3 // 4))
    return sizes


def _bytes_copied(record: StepRecord) -> int:
    return record.offloaded_bytes if record.num_offloaded > record.num_slots else 0
