"""A controller in a closed loop with a machine that obeys the recurrence: no threads, no clock of this machine's."""

from __future__ import annotations

from collections.abc import Sequence

from selectn_core.controller import Controller
from selectn_core.device import LinkUsage
from selectn_core.in_flight import Decoding, Load, Waiting
from selectn_core.latency import Link, simulate_steps_s
from selectn_core.placement import OffloadPlan
from selectn_core.policies import Frontier, Policy, SelectN
from selectn_core.step_times import MeasuredStep, SamplingTimes, StepTimes, while_copying
from selectn_core.steps import StepRecord, StepShape

NUM_UNITS, UNIT_BYTES = 16, 10_000_000
MAX_TOKENS, BATCH, LENGTH = 128, 8, 200
LINK = Link(bytes_per_s=1e9)


def unit_s(shape: StepShape) -> float:
    """What one unit of the test's machine takes: a part that every step has, one per token, one per key."""
    return 2e-3 + 2e-5 * shape.num_tokens + 2e-7 * shape.kv_tokens


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
    ) -> None:
        """`slowdown` is how much a link that is always busy slows compute, which the controller knows.

        `sampling` is what rows that are sampled truly take; all are, where it is given.
        """
        self.true, self.tpot_s, self.slowdown = step_times(sampling=sampling), tpot_s, slowdown
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
        costs = self.true.expected(self.shape)
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
