"""A controller in a closed loop with a machine that obeys the recurrence: no threads, no clock of this machine's."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from selectn_core.control.controller import Controller
from selectn_core.control.load import PASSED_SHARE, Decoding, Load, Waiting
from selectn_core.control.policies import Frontier, Policy, SelectN
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link, simulate_steps_s
from selectn_core.latency.step_times import MeasuredStep, SamplingTimes, StepTimes, scaled, while_copying
from selectn_core.latency.steps import Chunk, StepRecord, StepShape, step_of

NUM_UNITS, UNIT_BYTES = 16, 10_000_000
MAX_TOKENS, BATCH, LENGTH = 128, 8, 200
LINK = Link(bytes_per_s=1e9)


def unit_s(shape: StepShape) -> float:
    """What one unit of the test's machine takes: so much in every step, per token, per key, and per pair in prefill."""
    return 2e-3 + 2e-5 * shape.num_tokens + 2e-7 * shape.kv_tokens + 5e-9 * shape.prefill_pairs


def rest_s(shape: StepShape) -> float:
    return 5e-3 + 1e-4 * shape.num_requests


def measured(shape: StepShape, *, factor: float = 1.0, noise: float = 0.02) -> MeasuredStep:
    total_s = factor * (rest_s(shape) + NUM_UNITS * unit_s(shape))
    return MeasuredStep(
        shape=shape,
        kind_s=(factor * unit_s(shape),),
        rest_s=factor * rest_s(shape),
        low_s=total_s * (1 - noise),
        high_s=total_s * (1 + noise),
        num_samples=3,
    )


def grid() -> list[StepShape]:
    decodes = [StepShape.decode(batch, length) for batch in (1, 2, 4, 8) for length in (16, 128, 512)]
    prefills = [StepShape.prefill(tokens, past) for tokens in (8, 32, 128) for past in (0, 256)]
    mixed = [
        StepShape.of([(tokens, past)], [length] * batch)
        for batch in (2, 8)
        for tokens in (16, 64, 120)
        for past, length in ((0, 128), (256, 512))
    ]
    return [*decodes, *prefills, *mixed]


def step_times(*, factor: float = 1.0, sampling: SamplingTimes | None = None) -> StepTimes:
    """A record's times, `factor` times what the machine takes."""
    steps = tuple(measured(shape, factor=factor) for shape in grid())
    return StepTimes(steps, [0] * NUM_UNITS, [UNIT_BYTES] * NUM_UNITS, sampling=sampling)


def frontier() -> Frontier:
    return Frontier([UNIT_BYTES] * NUM_UNITS)


class Machine:
    """Decodes with `BATCH` requests for ever, each step as long as the recurrence says for the true costs."""

    def __init__(
        self,
        times: StepTimes,
        *,
        policy: Policy | None = None,
        tpot_s: float,
        link: Link = LINK,
        slowdown: float = 0.0,
        sampling: SamplingTimes | None = None,
        spread: float = 0.0,
    ) -> None:
        """`slowdown` is how much a link that is always busy slows compute, which the controller knows.

        `sampling` is what rows that are sampled truly take; all are, where it is given. Steps take up to `spread`
        longer than the true costs say, each by chance.
        """
        self.true, self.tpot_s, self.slowdown = step_times(sampling=sampling), tpot_s, slowdown
        self._spread, self._chance = spread, random.Random(0)
        self.link = LINK
        policy = policy or SelectN(frontier())
        self.controller = Controller(times, link, policy, slowdown=slowdown, max_tokens=MAX_TOKENS)
        self.plan = OffloadPlan(offloaded=(), num_slots=1, num_units=NUM_UNITS)
        self.shape = StepShape.decode(BATCH, LENGTH).sampling(None if sampling is not None else 0)
        self.waiting: Sequence[Waiting] = ()
        self.num_fitting: int | None = None
        self.now_s, self.num_tokens = 0.0, 1
        self.usage = LinkUsage(copied_bytes=0, num_copies=0, busy_s=0.0)
        self.computed_s = 0.0  # of the last step
        self.durations_s: list[float] = []
        self.plans: list[OffloadPlan] = []
        self.urgent: list[bool] = []

    def run(self, num_steps: int) -> Machine:
        for _ in range(num_steps):
            self.step()
        return self

    def step(self) -> None:
        self.controller.guaranteed_plan(self.load(), self.tpot_s)
        self.controller.admit(self.load(), self.plan)
        decision = self.controller.decide(self.shape, self.plan)
        duration_s = self._take(decision.plan)
        self.plan = decision.plan
        self.now_s += duration_s
        self.num_tokens += 1
        self.durations_s.append(duration_s)
        self.plans.append(self.plan)
        self.urgent.append(decision.urgent)
        self.controller.learn(self._record(duration_s), self.usage)

    def load(self) -> Load:
        decoding = [
            Decoding(num_tokens=self.num_tokens, first_token_s=0.0, num_left=1000, tpot_s=self.tpot_s)
            for _ in range(self.shape.num_decodes)
        ]
        length = self.shape.decode_kv_tokens // self.shape.num_decodes
        return Load(
            now_s=self.now_s,
            decoding=decoding,
            waiting=self.waiting,
            mean_kv_tokens=length,
            num_fitting=self.num_fitting,
            sampled_share=self.shape.num_sampled / self.shape.num_decodes,
        )

    def forget(self) -> None:
        """New requests: none is ahead or behind."""
        self.now_s, self.num_tokens = 0.0, 1

    def _take(self, plan: OffloadPlan) -> float:
        costs = scaled(self.true.expected(self.shape), 1 + self._spread * self._chance.random())
        promoted = sorted(set(self.plan.offloaded) - set(plan.offloaded))
        copies = promoted + (list(plan.offloaded) if plan.num_offloaded > plan.num_slots else [])
        copied_bytes = sum(costs.unit_bytes[unit] for unit in copies)
        costs = while_copying(costs, copied_bytes, self.link, self.slowdown)
        self.computed_s = costs.unloaded_s
        self.usage = LinkUsage(
            copied_bytes=self.usage.copied_bytes + copied_bytes,
            num_copies=self.usage.num_copies + len(copies),
            busy_s=self.usage.busy_s + copied_bytes / self.link.bytes_per_s,
        )
        return simulate_steps_s(costs, plan.offloaded, plan.num_slots, self.link, 2, promoted=promoted)[
            0 if promoted else 1
        ]

    def _record(self, duration_s: float) -> StepRecord:
        return StepRecord(
            iteration=len(self.durations_s),
            shape=self.shape,
            num_offloaded=self.plan.num_offloaded,
            num_slots=self.plan.num_slots,
            duration_s=duration_s,
            stall_s=max(0.0, duration_s - self.computed_s),
            offloaded_bytes=self.plan.num_offloaded * UNIT_BYTES,
            ended_s=self.now_s,
        )


@dataclass(kw_only=True)
class Request:
    """One that a `Server` serves; instants of its clock."""

    prompt: int
    output: int
    tpot_s: float
    ttft_s: float = 1e6
    arrives_s: float = 0.0
    num_computed: int = 0
    tokens_s: list[float] = field(default_factory=list)  # when each of its tokens came

    @property
    def has_ended(self) -> bool:
        return len(self.tokens_s) == self.output

    @property
    def measured_tpot_s(self) -> float:
        return (self.tokens_s[-1] - self.tokens_s[0]) / (self.output - 1)

    @property
    def measured_ttft_s(self) -> float:
        return self.tokens_s[0] - self.arrives_s


class Server(Machine):
    """The same machine with a queue: prompts in chunks, requests that come, begin and end; memory for all of them.

    `tpot_s` and `ttft_s` are the server's objectives, requests have their own.
    """

    def __init__(
        self,
        times: StepTimes,
        *,
        tpot_s: float,
        ttft_s: float = math.inf,
        link: Link = LINK,
        spread: float = 0.0,
        max_requests: int = 32,
    ) -> None:
        super().__init__(times, tpot_s=tpot_s, link=link, spread=spread)
        self.controller.ttft_s = ttft_s
        self.link, self.max_requests = link, max_requests
        self.coming: list[Request] = []
        self.present: list[Request] = []  # in the order in which they came
        self.begun: list[Request] = []
        self.shapes: list[StepShape] = []
        self.limits_s: list[float] = []

    def serve(self, requests: Sequence[Request], num_steps: int = 100_000) -> Server:
        """Until the last has ended, or for so many steps."""
        self.coming += sorted(requests, key=lambda each: each.arrives_s)
        for _ in range(num_steps):
            if not self.coming and not self.present:
                break
            self.step()
        return self

    def step(self) -> None:
        if not self.present and self.coming:
            self.now_s = max(self.now_s, self.coming[0].arrives_s)
        while self.coming and self.coming[0].arrives_s <= self.now_s:
            self.present.append(self.coming.pop(0))
        load = self.load()
        self.controller.guaranteed_plan(load, min(self.controller.tightest_kept_tpot_s(load), self.tpot_s))
        admission = self.controller.admit(load, self.plan)
        self.begun += [self.present[int(each.ticket)] for each in admission.beginning]
        decoding = [each for each in self.begun if each.tokens_s]
        computed = [(each, 1) for each in decoding]
        tokens = admission.prefill_tokens
        for each in self.begun:
            if not each.tokens_s and tokens:
                computed.append((each, min(tokens, each.prompt - each.num_computed)))
                tokens -= computed[-1][1]
        self.begun = [each for each in self.begun if each.num_computed or any(each is one for one, _ in computed)]
        self.shape = step_of([Chunk(count, each.num_computed) for each, count in computed])
        decision = self.controller.decide(self.shape, self.plan)
        duration_s = self._take(decision.plan)
        self.plan = decision.plan
        self.now_s += duration_s
        self.durations_s.append(duration_s)
        self.plans.append(self.plan)
        self.shapes.append(self.shape)
        self.limits_s.append(decision.limit_s)
        self.controller.learn(self._record(duration_s), self.usage)
        for each, count in computed:
            each.num_computed += count
            if each.num_computed >= each.prompt:
                each.tokens_s.append(self.now_s)
        self.present = [each for each in self.present if not each.has_ended]
        self.begun = [each for each in self.begun if not each.has_ended]

    def load(self) -> Load:
        decoding = [each for each in self.begun if each.tokens_s]
        begun = [each for each in self.begun if not each.tokens_s]
        others = [each for each in self.present if not any(each is one for one in self.begun)]
        tickets = {id(each): str(i) for i, each in enumerate(self.present)}
        return Load(
            now_s=self.now_s,
            decoding=[
                Decoding(
                    num_tokens=len(each.tokens_s),
                    first_token_s=each.tokens_s[0],
                    num_left=each.output - len(each.tokens_s),
                    tpot_s=each.tpot_s,
                )
                for each in decoding
            ],
            waiting=[
                Waiting(
                    prefill_tokens=each.prompt - each.num_computed,
                    num_past=each.num_computed,
                    deadline_s=each.arrives_s + each.ttft_s,
                    passed_until_s=each.arrives_s + PASSED_SHARE * each.ttft_s,
                    tpot_s=each.tpot_s,
                    ticket=tickets[id(each)],
                )
                for each in (*begun, *others)
            ],
            num_begun=len(begun),
            num_fitting=self.max_requests - len(decoding),
            mean_kv_tokens=sum(e.num_computed for e in decoding) // len(decoding) + 1 if decoding else 1,
        )
