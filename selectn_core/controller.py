"""The online stage: before every step, how many tokens of prefill may join it and what is offloaded while it runs.

The controller knows the record (what a step of every shape takes), learns how far it is off and what the link gives
now, and keeps every decoding request within its TPOT objective and every waiting one within its TTFT objective while
as much as possible lives in host memory. It decides; the executor moves the bytes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from selectn_core.device import LinkUsage
from selectn_core.latency import Link, StepCosts, simulate_steps_s
from selectn_core.placement import OffloadPlan, nearest_plan
from selectn_core.policies import Policy, Situation
from selectn_core.remembered import Remembered
from selectn_core.step_times import StepTimes, scaled, while_copying
from selectn_core.steps import StepRecord, StepShape

# Of a TPOT objective, what steps are planned to take: the rest is for what nobody can predict.
PLANNED_SHARE = 0.92
# A request that is behind may catch up over this many tokens; one that is ahead does not make steps longer than this.
_HORIZON_TOKENS = 8
_MOST_SHARE = 0.96
# Of the time to a waiting request's deadline, what its prefill is planned to take.
_TTFT_SHARE = 0.8
_SMALLEST_CHUNK = 16
_RAISE_AFTER_STEPS = 4
_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A request that has its first token: how many it has, when the first came, how many may follow, its TPOT."""

    num_tokens: int
    first_token_s: float
    num_left: int
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A request without a token yet: tokens of prefill that are left, and the instant by which TTFT wants its first."""

    prefill_tokens: int
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """All requests, waiting ones in the order in which they will be served; instants on one clock, in seconds."""

    now_s: float
    decoding: Sequence[Decoding]
    waiting: Sequence[Waiting]
    mean_kv_tokens: int  # keys of a decoding request, on average


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What the next step may take in: tokens of prefill, and whether requests may begin that have no KV yet."""

    prefill_tokens: int
    may_begin: bool


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

    def __init__(self, times: StepTimes, link: Link, policy: Policy, *, slowdown: float = 0.0, max_tokens: int) -> None:
        """`link` is the record's; `slowdown` how much a link that is always busy slows compute."""
        self.times, self.policy = times, policy
        self.link = LinkEstimate(link)
        self.min_offloaded, self.max_offloaded = 0, None  # type: int, int | None
        self.is_feasible = True
        self.spent_s = 0.0
        self._slowdown, self._max_tokens = slowdown, max_tokens
        self._scales = {True: ComputeScale(), False: ComputeScale()}  # of steps that only decode, and others
        self._decode_limit_s, self._prefill_s_per_token = math.inf, math.inf
        self._may_raise = 0
        self._urgent_wait = False
        self._last_usage: LinkUsage | None = None
        self._remembered = Remembered()

    # -- before scheduling --------------------------------------------------------------------------------------

    def admit(self, load: Load, plan: OffloadPlan) -> Admission:
        """What may join the next step, while `plan` holds."""
        began_s = time.perf_counter()
        self._decode_limit_s = min((_limit_s(each, load.now_s) for each in load.decoding), default=math.inf)
        self._prefill_s_per_token = _prefill_pace(load)
        self._urgent_wait = bool(load.waiting)
        admission = self._admission(load, plan)
        self.spent_s += time.perf_counter() - began_s
        return admission

    def _admission(self, load: Load, plan: OffloadPlan) -> Admission:
        batch, left = len(load.decoding), sum(each.prefill_tokens for each in load.waiting)
        room = min(self._max_tokens - batch, left)
        if not batch or room <= 0:
            return Admission(prefill_tokens=max(0, self._max_tokens - batch), may_begin=True)
        fits_one_more = self._unloaded_s(StepShape.decode(batch + 1, load.mean_kv_tokens)) <= self._decode_limit_s
        tokens = self._largest_chunk(load, room, plan)
        return Admission(prefill_tokens=tokens, may_begin=fits_one_more)

    def _largest_chunk(self, load: Load, room: int, plan: OffloadPlan) -> int:
        """The most tokens that fit beside the decoding requests: under the plan, or under any if TTFT needs them."""
        decodes = [load.mean_kv_tokens] * len(load.decoding)
        limit_s = self._decode_limit_s
        needed = math.ceil(limit_s / self._prefill_s_per_token) if math.isfinite(self._prefill_s_per_token) else 0
        for tokens in _chunks(room):
            shape = StepShape.of(prefills=[(tokens, 0)], decodes=decodes)
            unloaded_s = self._unloaded_s(shape)
            if unloaded_s > limit_s:
                continue
            if tokens <= needed or self._predict(shape, plan) <= limit_s:
                return tokens
        return 0

    # -- before the step ----------------------------------------------------------------------------------------

    def decide(self, shape: StepShape, current: OffloadPlan) -> Decision:
        """The plan for this step."""
        began_s = time.perf_counter()
        limit_s = self._limit_of(shape)
        wanted = self._choose(shape, current, limit_s)
        plan = self._settle(shape, current, wanted, limit_s)
        predicted_s = self._predict_first(shape, current, plan)
        fewer = plan.num_offloaded < current.num_offloaded
        self.is_feasible = predicted_s <= limit_s * (1 + _TOLERANCE) or not fewer
        self.spent_s += time.perf_counter() - began_s
        return Decision(plan=plan, urgent=fewer, predicted_s=predicted_s, limit_s=limit_s)

    def _limit_of(self, shape: StepShape) -> float:
        """Seconds that the step may take: for those who decode, and for those who wait for its prefill."""
        prefill_tokens = shape.num_tokens - shape.num_decodes
        waiting_s = prefill_tokens * self._prefill_s_per_token if prefill_tokens else math.inf
        return min(self._decode_limit_s, waiting_s)

    def _choose(self, shape: StepShape, current: OffloadPlan, limit_s: float) -> OffloadPlan:
        return self.policy.choose(
            Situation(
                costs=self._costs(shape, current, careful=True),
                link=self.link.link,
                limit_s=limit_s,
                current=current,
                min_offloaded=self.min_offloaded,
                max_offloaded=self.max_offloaded,
            )
        )

    def _settle(self, shape: StepShape, current: OffloadPlan, wanted: OffloadPlan, limit_s: float) -> OffloadPlan:
        """Between the plan that holds and the one that is wanted: no moving to and fro for a hair's breadth."""
        if not self.policy.adapts:
            return wanted
        if wanted.num_offloaded < current.num_offloaded:  # weights come home: over the link, so only if they must
            self._may_raise = 0
            if self._predict(shape, current) <= limit_s * (1 + _TOLERANCE):
                return current
        elif wanted.num_offloaded > current.num_offloaded:
            self._may_raise += 1
            if self._may_raise < _RAISE_AFTER_STEPS and not self._urgent_wait:
                return current
        elif wanted.num_slots >= current.num_slots:
            return current
        return self._with_few_moves(shape, current, wanted, limit_s)

    def _with_few_moves(
        self, shape: StepShape, current: OffloadPlan, wanted: OffloadPlan, limit_s: float
    ) -> OffloadPlan:
        if self.policy.name != "select-n":
            return wanted
        near = nearest_plan(current, wanted)
        return near if self._predict(shape, near) <= min(limit_s, 1.05 * self._predict(shape, wanted)) else wanted

    # -- after the step -----------------------------------------------------------------------------------------

    def learn(self, record: StepRecord, usage: LinkUsage) -> None:
        """Takes in what the step took, and what the link has carried in all."""
        began_s = time.perf_counter()
        if self._last_usage is not None:
            self.link.add(usage.since(self._last_usage))
        self._last_usage = usage
        expected_s = self.times.expected_s(record.shape)
        self._scales[record.shape.is_decode_only].add((record.duration_s - record.stall_s) / expected_s)
        self.spent_s += time.perf_counter() - began_s

    # -- prediction ---------------------------------------------------------------------------------------------

    def _unloaded_s(self, shape: StepShape) -> float:
        return self.times.expected_s(shape) * self._scales[shape.is_decode_only].high

    def _predict(self, shape: StepShape, plan: OffloadPlan) -> float:
        """Seconds of a step of this shape once `plan` has held for a while, on the careful side."""
        return self._remembered.predict_step_s(self._costs(shape, plan, careful=True), plan, self.link.link)

    def _costs(self, shape: StepShape, plan: OffloadPlan, *, careful: bool) -> StepCosts:
        scale = self._scales[shape.is_decode_only]
        costs = self.times.expected(shape)
        costs = while_copying(costs, _copied_bytes(costs, plan), self.link.link, self._slowdown)
        return scaled(costs, scale.high if careful else scale.middle)

    def _predict_first(self, shape: StepShape, current: OffloadPlan, plan: OffloadPlan) -> float:
        """Seconds that the next step should take, the copies of a change of plan included."""
        costs = self._costs(shape, plan, careful=False)
        if plan == current:
            return self._remembered.predict_step_s(costs, plan, self.link.link)
        promoted = sorted(set(current.offloaded) - set(plan.offloaded))
        kept = [unit for unit in plan.offloaded if unit in set(current.offloaded[: current.num_slots])]
        return simulate_steps_s(
            costs, plan.offloaded, plan.num_slots, self.link.link, 1, promoted=promoted, in_slots=kept
        )[0]


class LinkEstimate:
    """The bandwidth that the link gives now, from what steps have seen of it.

    Down at once, where several copies agree: a single one may have been unlucky. Up slowly. Where nothing is copied
    nothing is seen, and the estimate drifts back to the record's.
    """

    def __init__(self, nominal: Link) -> None:
        self.nominal = nominal
        self.share_bytes_per_s = math.inf  # what the coordinator allows
        self._now_bytes_per_s = nominal.bytes_per_s
        self._recent: deque[float] = deque(maxlen=6)
        self._few: deque[float] = deque(maxlen=2)

    @property
    def link(self) -> Link:
        """The link to plan with."""
        return Link(bytes_per_s=min(self._now_bytes_per_s, self.share_bytes_per_s), copy_s=self.nominal.copy_s)

    def add(self, usage: LinkUsage) -> None:
        """Takes in the copies of one step."""
        if usage.num_copies == 0:
            self._drift_back()
            return
        seen = usage.share_bytes_per_s
        self._recent.append(seen)
        self._few.append(seen)
        believed = usage.num_copies >= _COPIES_TO_BELIEVE or len(self._few) == self._few.maxlen
        if not believed:
            return
        low = seen if usage.num_copies >= _COPIES_TO_BELIEVE else max(self._few)
        if low < self._now_bytes_per_s:
            self._now_bytes_per_s = low
        else:
            self._now_bytes_per_s += _UPWARD * max(0.0, median(self._recent) - self._now_bytes_per_s)

    def _drift_back(self) -> None:
        missing = self.nominal.bytes_per_s - self._now_bytes_per_s
        self._now_bytes_per_s += max(0.0, _DRIFT * missing)


_COPIES_TO_BELIEVE = 4
_UPWARD = 0.5
_DRIFT = 0.05


class ComputeScale:
    """How far the record is off now: measured over expected compute, in the middle and on the high side."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque([1.0] * 3, maxlen=24)
        self.middle = self.high = 1.0

    def add(self, ratio: float) -> None:
        """Takes in one step. One alone changes little."""
        self._recent.append(ratio)
        ordered = sorted(self._recent)
        self.middle = ordered[len(ordered) // 2]
        self.high = ordered[len(ordered) * 4 // 5]


def _limit_s(request: Decoding, now_s: float) -> float:
    """Seconds that steps may take so that this request keeps its TPOT, over the next few tokens on average."""
    horizon = max(1, min(_HORIZON_TOKENS, request.num_left))
    planned_s = (request.num_tokens - 1 + horizon) * PLANNED_SHARE * request.tpot_s
    return min(_MOST_SHARE * request.tpot_s, (request.first_token_s + planned_s - now_s) / horizon)


def _prefill_pace(load: Load) -> float:
    """Seconds per token of prefill with which every waiting request still has its first token in time."""
    pace_s, tokens = math.inf, 0
    for request in load.waiting:
        tokens += request.prefill_tokens
        if tokens:
            pace_s = min(pace_s, _TTFT_SHARE * max(0.0, request.deadline_s - load.now_s) / tokens)
    return pace_s


def _chunks(most: int) -> list[int]:
    """Sizes of a chunk of prefill to try, from the largest down."""
    sizes = [most]
    while sizes[-1] > _SMALLEST_CHUNK:
        sizes.append(max(_SMALLEST_CHUNK, sizes[-1] * 3 // 4))
    return sizes


def _copied_bytes(costs: StepCosts, plan: OffloadPlan) -> int:
    return sum(costs.unit_bytes[unit] for unit in plan.offloaded) if plan.num_offloaded > plan.num_slots else 0
