"""What deciding costs: processor seconds of a policy's work in a step, over the step that is modelled. No model runs.

A controller with all that an engine asks before and after a step, `with_kv` too, is in a closed loop with a machine
that obeys the recurrence. A batch decodes and its keys grow, prompts come, times and bandwidth vary, and for a third of
the time half of the bus is taken. 30 and 60 units are SmolLM2-135M's layers and blocks, with step times of its record
on two CPU cores; 160 are the blocks of 80 layers of 1.7 GB, whose steps are as long as a 70B model's on a fast GPU.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import Check, finish, parse_arguments, table
from selectn_core.control.controller import Controller
from selectn_core.control.load import Decoding, Load, Waiting
from selectn_core.control.policies import Frontier, SelectN
from selectn_core.device import LinkUsage, align_up
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link, StepCosts, predict_step_s, simulate_steps_s
from selectn_core.latency.step_times import MeasuredStep, StepTimes, scaled
from selectn_core.latency.steps import StepRecord, StepShape
from selectn_core.memory.plan_memory import UnmeasuredPlans
from selectn_core.planning.record import PerformanceRecord
from selectn_core.weights.units import Unit

RECORD = Path(__file__).parents[1] / "tests" / "data" / "smollm2-135m.yaml"
BATCH, MAX_TOKENS = 16, 256
TPOT = 1.75  # times the unloaded step
MOST_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A model's units on a machine: what its steps take, and the link beside them."""

    name: str
    times: StepTimes
    link: Link
    slowdown: float
    sets: tuple[tuple[int, ...], ...] = ()


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_steps = 1500 if arguments.quick else 8000
    samples = [sample(machine, num_steps) for machine in (layers(), blocks(), large())]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "units": lambda s: str(s["num_units"]),
        "model": lambda s: s["model"],
        "step, ms": lambda s: f"{1e3 * s['step_s']:.0f}",
        "deciding, ms": lambda s: f"{1e3 * s['deciding_s']:.2f}",
        "p99": lambda s: f"{1e3 * s['deciding_p99_s']:.2f}",
        "of the step": lambda s: f"{s['share']:.2%}",
        "k": lambda s: f"{s['mean_k']:.1f}",
    }
    print(table(list(columns), [[cell(sample) for cell in columns.values()] for sample in samples]))
    checks = [
        Check(name=f"deciding at {s['num_units']} units, share of a step", value=s["share"], target=f"<= {MOST_SHARE}")
        for s in samples
    ]
    return finish(arguments, "measured, steps modelled", samples, checks)


# -- the machines ----------------------------------------------------------------------------------------------------


def layers() -> Machine:
    record = PerformanceRecord.load(RECORD)
    return Machine(
        name="SmolLM2-135M, layers",
        times=record.step_times(),
        link=record.link.link,
        slowdown=record.link.slowdown,
    )


def blocks() -> Machine:
    """Each layer as attention and MLP, a quarter of its time and bytes in the attention, as in SmolLM2."""
    whole = layers()
    steps = [replace(step, kind_s=(0.25 * step.kind_s[0], 0.75 * step.kind_s[0])) for step in whole.times.steps]
    return _of_blocks("SmolLM2-135M, blocks", steps, whole.times.unit_bytes[0], 30, whole.link, whole.slowdown)


def large() -> Machine:
    """80 layers of 1.7 GB, an H100's time for each, over PCIe 5; decoding is bound by memory."""
    layer_bytes, num_layers = 1_700_000_000, 80
    shapes = [step.shape for step in layers().times.steps]
    steps = []
    for shape in shapes:
        layer_s = 1.2e-3 + 2e-6 * shape.num_tokens + 2e-9 * shape.kv_tokens
        total_s = num_layers * layer_s + 10e-3
        steps.append(
            MeasuredStep(
                shape=shape,
                kind_s=(0.25 * layer_s, 0.75 * layer_s),
                rest_s=10e-3,
                low_s=total_s,
                high_s=total_s,
                num_samples=3,
            )
        )
    return _of_blocks("80 layers, blocks", steps, layer_bytes, num_layers, Link(bytes_per_s=50e9, copy_s=1e-5), 0.05)


def _of_blocks(
    name: str, steps: list[MeasuredStep], layer_bytes: int, num_layers: int, link: Link, slowdown: float
) -> Machine:
    sizes = (layer_bytes // 4, 3 * layer_bytes // 4) * num_layers
    return Machine(
        name=name,
        times=StepTimes(steps, [0, 1] * num_layers, sizes),
        link=link,
        slowdown=slowdown,
        sets=tuple(tuple(range(kind, 2 * num_layers, 2)) for kind in (0, 1)),
    )


def _units(machine: Machine) -> list[Unit]:
    return [
        Unit(index=i, layer=i, kind="", name=str(i), module=nn.Module(), tensors=(), parameters=(), num_bytes=num_bytes)
        for i, num_bytes in enumerate(machine.times.unit_bytes)
    ]


# -- the loop --------------------------------------------------------------------------------------------------------


class Loop:
    """A controller and its machine; `deciding_s` has each step's processor time."""

    def __init__(self, machine: Machine) -> None:
        times = machine.times
        self.machine, self.rng = machine, random.Random(0)
        unloaded_s = times.expected_s(StepShape.decode(BATCH, 512))
        self.tpot_s, self.num_units = TPOT * unloaded_s, len(times.unit_bytes)
        policy = SelectN(Frontier(times.unit_bytes, machine.sets))
        self.controller = Controller(
            times, machine.link, policy, slowdown=machine.slowdown, max_tokens=MAX_TOKENS, guaranteed_share=0.5
        )
        self.plans = UnmeasuredPlans(_units(machine), align_up)
        self.total_bytes = sum(align_up(size) for size in times.unit_bytes)
        self.plan = OffloadPlan(offloaded=(), num_slots=1, num_units=self.num_units)
        self.usage = LinkUsage(copied_bytes=0, num_copies=0, busy_s=0.0)
        self.lengths = [self.rng.randint(16, 600) for _ in range(BATCH)]
        self.now_s = 0.0
        self.deciding_s: list[float] = []
        self.steps_s: list[float] = []
        self.ks: list[int] = []

    def run(self, num_steps: int) -> None:
        for i in range(num_steps):
            self.step(i, is_bus_shared=num_steps // 3 < i < 2 * num_steps // 3)

    def step(self, i: int, *, is_bus_shared: bool) -> None:
        waiting = [Waiting(prefill_tokens=200, deadline_s=self.now_s + 2.0, tpot_s=self.tpot_s)] if i % 10 < 3 else []
        decoding = [
            Decoding(num_tokens=50, first_token_s=self.now_s - 48 * self.tpot_s, num_left=200, tpot_s=self.tpot_s)
        ] * BATCH
        load = Load(
            now_s=self.now_s,
            decoding=decoding,
            waiting=waiting,
            num_begun=len(waiting),
            mean_kv_tokens=sum(self.lengths) // BATCH + 1,
        )
        began_s = time.process_time()
        controller = self.controller
        self._with_kv(
            max(self.lengths)
        )  # as `Offloading._wanted_plan` does, before a step is scheduled and before it runs
        controller.guaranteed_plan(load, self.tpot_s)
        admission = controller.admit(load, self.plan)
        chunk = min(admission.prefill_tokens, 200) if waiting else 0
        shape = StepShape.of([(chunk, 0)] if chunk else [], self.lengths)
        decision = controller.decide(shape, self.plan)
        self._with_kv(max(self.lengths))
        deciding_s = time.process_time() - began_s
        self._run_step(shape, decision.plan, is_bus_shared)
        began_s = time.process_time()
        controller.learn(self._record(shape), self.usage)
        self.deciding_s.append(deciding_s + time.process_time() - began_s)
        self._grow()

    def _with_kv(self, longest: int) -> None:
        """A device that lacks a quarter of the weights, and a KV cache that wants more for long requests."""
        room = 0.75 * self.total_bytes - longest * self.total_bytes / 1e4
        if self.plans.bytes_for(self.plan) > room:
            self.plans.fewest(self.plan.num_slots, int(room), at_least=self.plan.num_offloaded)

    def _run_step(self, shape: StepShape, plan: OffloadPlan, is_bus_shared: bool) -> None:
        """The step as it is: a few percent from what is expected, on a link that varies as much."""
        costs = scaled(self.machine.times.expected(shape), self.rng.gauss(1.0, 0.04))
        nominal = self.machine.link
        rate = nominal.bytes_per_s * self.rng.gauss(1.0, 0.05) * (0.5 if is_bus_shared else 1.0)
        copied = plan.offloaded if plan.num_offloaded > plan.num_slots else ()
        copied_bytes = sum(costs.unit_bytes[unit] for unit in copied)
        self.steps_s.append(_taken_s(costs, self.plan, plan, replace(nominal, bytes_per_s=rate)))
        self.plan = plan
        self.computed_s = costs.unloaded_s
        self.usage = LinkUsage(
            copied_bytes=self.usage.copied_bytes + copied_bytes,
            num_copies=self.usage.num_copies + len(copied),
            busy_s=self.usage.busy_s + copied_bytes / rate,
        )
        self.now_s += self.steps_s[-1]
        self.ks.append(plan.num_offloaded)

    def _record(self, shape: StepShape) -> StepRecord:
        duration_s = self.steps_s[-1]
        return StepRecord(
            iteration=len(self.steps_s),
            shape=shape,
            num_offloaded=self.plan.num_offloaded,
            num_slots=self.plan.num_slots,
            duration_s=duration_s,
            stall_s=max(0.0, duration_s - self.computed_s),
            offloaded_bytes=sum(self.machine.times.unit_bytes[unit] for unit in self.plan.offloaded),
            ended_s=self.now_s,
        )

    def _grow(self) -> None:
        self.lengths = [length + 1 if length < 900 else self.rng.randint(16, 400) for length in self.lengths]


def _taken_s(costs: StepCosts, before: OffloadPlan, plan: OffloadPlan, link: Link) -> float:
    """What a step takes, the copies of a change of plan included."""
    if plan == before:
        return predict_step_s(costs, plan.offloaded, plan.num_slots, link)
    promoted = sorted(set(before.offloaded) - set(plan.offloaded))
    in_slots = set(plan.offloaded) & set(before.offloaded[: before.num_slots])
    (step_s,) = simulate_steps_s(
        costs, plan.offloaded, plan.num_slots, link, 1, promoted=promoted, in_slots=sorted(in_slots)
    )
    return step_s


def sample(machine: Machine, num_steps: int) -> dict[str, Any]:
    loop = Loop(machine)
    loop.run(num_steps)
    deciding_s, steps_s = sum(loop.deciding_s), sum(loop.steps_s)
    return {
        "what": "deciding",
        "model": machine.name,
        "num_units": loop.num_units,
        "num_steps": num_steps,
        "step_s": steps_s / num_steps,
        "deciding_s": deciding_s / num_steps,
        "deciding_p99_s": sorted(loop.deciding_s)[int(0.99 * num_steps)],
        "deciding_first_s": loop.deciding_s[0],
        "share": deciding_s / steps_s,
        "mean_k": sum(loop.ks) / num_steps,
    }


if __name__ == "__main__":
    sys.exit(main())
