"""Between an engine and its controller: what requests in flight want goes in, what the next step may do comes out."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from selectn_core.config import EngineConfig, SloConfig
from selectn_core.control.controller import Controller
from selectn_core.control.joining import StepAdmission
from selectn_core.control.load import PASSED_SHARE, PLANNED_SHARE, Decoding, Load, Waiting
from selectn_core.control.policies import (
    Fixed,
    Frontier,
    Paper,
    Policy,
    SelectN,
    every_unit_one_ahead,
    last_of_every_group,
    worst_case_share,
)
from selectn_core.control.standing import Standing
from selectn_core.device import LinkUsage
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link
from selectn_core.latency.steps import Chunk, StepRecord, StepShape
from selectn_core.offload.control import Control, Decision, LinkShare, NextStep, PlanLimits
from selectn_core.offload.offloading import Offloading
from selectn_core.planning.planner import offloadable_sets
from selectn_core.planning.record import PerformanceRecord
from selectn_core.requests.handle import RequestHandle
from selectn_core.requests.objectives import Objectives, resolve_objectives

logger = logging.getLogger(__name__)

_MOST_LENGTHS = 4096


class Steering(Control):
    """An engine's online stage: the configured policy decides, by what was measured."""

    def __init__(self, offloading: Offloading, config: EngineConfig, record: PerformanceRecord) -> None:
        """Raises ConfigError where the configured policy would leave too much on the device."""
        self._offloading, self._batch, self._offload = offloading, config.batch, config.offload
        self._record, self._times = record, record.step_times()
        self._frontier = Frontier(record.unit_bytes, _unit_sets_of(config.offload.policy, record))
        self._objectives = resolve_objectives(config.slo, self._times, config.batch)
        self.controller = Controller(
            self._times,
            record.link.link,
            self._policy(self._objectives),
            slowdown=record.link.slowdown,
            max_tokens=config.batch.max_batch_tokens,
            guaranteed_share=1 / config.offload.num_sharing,
            ttft_s=self.objectives.ttft_s,
            percentile=config.slo.percentile,
        )
        arena = offloading.arena
        self._sectors_for = lru_cache(_MOST_LENGTHS)(offloading.geometry.sectors_for_request)
        wanted_bytes = sum(arena.round_up(unit.num_bytes) for unit in offloading.units)
        self._weight_sectors = wanted_bytes // arena.sector_bytes
        self.controller.min_freed_bytes = max(0, wanted_bytes - arena.reachable_bytes(0))
        self._decision: Decision | None = None
        self._standing = Standing(self.controller.look_every_steps - 1)
        self._num_orders = self._orders_seen = 0  # what was set from outside, and what of it the last `admit` knew
        self._stands: Decision | None = None  # what goes for the step that is under way without a new look
        self._looked_at: tuple[Mapping[str, RequestHandle], Mapping[str, Chunk]] = ({}, {})
        self._admission = StepAdmission(prefill_tokens=0)
        self._guaranteed = self._guaranteed_for(load_of({}, {}, {}, self.objectives))
        self._num_decoding = 0
        self._lock = threading.Lock()
        self.spent_s = self.looked_s = self.stepped_s = 0.0  # looked: beside steps, which do not wait for it
        self._has_failed_to_look = False
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="look-for-a-better-plan")
        self._rehearse()

    def _rehearse(self) -> None:
        """Has the policy choose for the steps that may come: the first choice of its kind takes ten times as long.

        They are of all batches, as long as requests were that the record has measured, and of full chunks of prefill.
        """
        batch = self._batch
        measured = [step.shape.decodes[0] for step in self._times.steps if step.shape.decodes] or [1]
        sizes, lengths = _between(1, batch.max_requests, 1.3), _between(min(measured), max(measured), 1.5)
        steps = [StepShape.decode(size, length) for size, length in product(sizes, lengths)]
        beside = [StepShape.of([(batch.max_batch_tokens, 0)], each.decodes) for each in steps]
        self.controller.rehearse([*steps, *(each.sampling() for each in steps), *beside], self.objectives.tpot_s)

    def _policy(self, objectives: Objectives) -> Policy:
        """The configured one. Raises ConfigError for one whose plan leaves too much on the device."""
        offload, target, num_units = self._offload, self._offloading.target, len(self._offloading.units)

        def by_name(plan: OffloadPlan) -> Fixed:
            interval = f" and offload.interval={offload.interval}" if offload.policy == "group" else ""
            return Fixed(offload.policy, target.checked(f"offload.policy={offload.policy}{interval}", plan))

        makers: dict[str, Callable[[], Policy]] = {
            "select-n": lambda: SelectN(self._frontier),
            "paper": lambda: Paper(self._frontier),
            "static": lambda: Fixed("static", self._static_plan(objectives)),
            "group": lambda: by_name(last_of_every_group(offload.interval or num_units, num_units)),
            "all": lambda: by_name(every_unit_one_ahead(num_units)),
            "none": lambda: Fixed("none", target.fewest(1)),
        }
        return makers[offload.policy]()

    def _static_plan(self, objectives: Objectives) -> OffloadPlan:
        batch = self._batch
        full = StepShape.decode(batch.max_requests, max(1, batch.kv_tokens // batch.max_requests))
        costs, limit_s = self._times.expected(full.sampling()), PLANNED_SHARE * objectives.tpot_s
        plan = worst_case_share(costs, self._record.link.link, self._offload.num_sharing, limit_s)
        least = self._offloading.target.fewest(plan.num_slots)
        return plan if plan.num_offloaded >= least.num_offloaded else least

    @property
    def objectives(self) -> Objectives:
        return self._objectives

    @property
    def adapts(self) -> bool:
        return self.controller.policy.adapts

    @property
    def measured_link(self) -> Link:
        return self._record.link.link

    def link_now(self, usage: LinkUsage) -> Link:
        """What it has learned: all that was ever copied says less."""
        return self.controller.link.link

    def set_objectives(self, slo: SloConfig) -> None:
        objectives = resolve_objectives(slo, self._times, self._batch)
        policy = self._policy(objectives)  # where it is refused nothing has changed
        with self._lock:
            self._objectives = objectives
            self._num_orders += 1
            self.controller.aim_at(policy, objectives.ttft_s, slo.percentile)
            # On an idle engine no step would do so, and what it promises goes by it.
            self._guaranteed = self._guaranteed_for(load_of({}, {}, {}, objectives))

    def set_link_share(self, share: LinkShare) -> None:
        controller = self.controller
        with self._lock:
            controller.link.share_bytes_per_s = share.bytes_per_s
            nominal = controller.link.nominal.bytes_per_s
            controller.link.guaranteed_bytes_per_s = min(share.guaranteed_bytes_per_s, nominal)
            controller.max_offloaded_bytes = share.max_offloaded_bytes
            self._num_orders += 1

    def admit(
        self, handles: Mapping[str, RequestHandle], progress: Mapping[str, Chunk], backlog: Mapping[str, Chunk]
    ) -> NextStep:
        with self._timed():
            if self._num_orders != self._orders_seen or self.controller.knows_better:
                self._standing.forget()
            self._orders_seen = self._num_orders
            self._stands = self._standing.next(self._offloading.plan, handles, progress, self.controller.learned)
            if self._stands is not None:
                self.controller.go_on()
                return NextStep(beginning=(), served=frozenset(progress))
            # One more than there are places: the others change nothing, however many they are.
            most = max(0, self._batch.max_requests - len(progress)) + 1
            load = load_of(handles, progress, backlog, self.objectives, self._kv_bytes, most_new=most)
            num_fitting, is_full = self._num_fitting(load, handles, progress)
            load = replace(load, num_fitting=load.num_begun + num_fitting, is_full=is_full)
            self._num_decoding = len(load.decoding)
            self._admission = self.controller.admit(load, self._offloading.plan)
            self._looked_at = handles, progress
        beginning = [each.ticket for each in self._admission.beginning]
        return NextStep(beginning=beginning, served=frozenset((*progress, *beginning)))

    def _kv_bytes(self, handle: RequestHandle) -> int:
        return self._sectors_for(handle.max_total_tokens) * self._offloading.arena.sector_bytes

    def _num_fitting(
        self, load: Load, handles: Mapping[str, RequestHandle], progress: Mapping[str, Chunk]
    ) -> tuple[int, bool]:
        """How many of the requests without KV memory will hold to the end of their output, in their order.

        And whether there is no room for another as large as those on average, in memory or in the batch.
        """
        arena, sectors_for = self._offloading.arena, self._sectors_for
        held = sum(sectors_for(handles[ticket].max_total_tokens) for ticket in progress if ticket in handles)
        self._guaranteed = self._guaranteed_for(load)
        room = self._offloading.target.kv_sectors(self._guaranteed) - held
        missing = self._weight_sectors + held - arena.num_sectors
        controller = self.controller
        controller.lacking_bytes = missing * arena.sector_bytes
        controller.held_freed_bytes = max(controller.min_freed_bytes, controller.lacking_bytes)
        places = self._batch.max_requests - len(progress)
        num_fitting = 0
        for ticket, handle in handles.items():
            if ticket in progress:
                continue
            room -= sectors_for(handle.max_total_tokens)
            # One that runs alone has all the memory there is: more is offloaded for it.
            if (room < 0 and (progress or num_fitting)) or num_fitting >= places:
                break
            num_fitting += 1
        is_full = bool(progress) and (num_fitting >= places or room * len(progress) < held)
        return num_fitting, is_full

    def _guaranteed_for(self, load: Load) -> OffloadPlan:
        # Whoever runs now may have asked for little: who comes next may not.
        return self.controller.guaranteed_plan(
            load, min(self.controller.tightest_kept_tpot_s(load), self.objectives.tpot_s)
        )

    def token_budget(self, most: int) -> int:
        return min(most, max(1, self._num_decoding + self._admission.prefill_tokens))

    def decide(self, shape: StepShape) -> Decision:
        with self._timed():
            self._decision = self._stands if self._num_orders == self._orders_seen else None
            if self._decision is None:
                plan = self._offloading.plan
                self._decision = self.controller.decide(shape, plan)
                # One that moves weights, or has somebody begin, is of this step alone; and so is one that was ordered
                # otherwise while it was made.
                stays = self._decision.plan == plan and not self._admission.beginning
                if stays and self._num_orders == self._orders_seen:
                    self._standing.decided(self._decision, *self._looked_at, self.controller.learned)
                else:
                    self._standing.forget()
                if self.controller.is_look_due:
                    self._looking.submit(self._look)
        return self._decision

    def _look(self) -> None:
        """On a thread of its own, while the step runs."""
        began_s = time.perf_counter()
        try:
            with self._lock:
                self.controller.look()
        except Exception:  # requests are served as they are
            if not self._has_failed_to_look:
                logger.exception("looking for a better plan has failed; no more may be offloaded from now on")
            self._has_failed_to_look = True
        finally:
            self.looked_s += time.perf_counter() - began_s

    @property
    def guaranteed_plan(self) -> OffloadPlan:
        return self._guaranteed

    @property
    def decision(self) -> Decision | None:
        return self._decision

    def done(self, record: StepRecord) -> None:
        self._decision = None
        self.stepped_s += record.duration_s
        with self._timed():
            self.controller.learn(record, self._offloading.device.link_usage())
            self._standing.ran(record)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began_s = time.perf_counter()
        with self._lock:
            yield
        self.spent_s += time.perf_counter() - began_s

    @property
    def limits(self) -> PlanLimits:
        return self.controller.limits

    def snapshot(self) -> dict[str, Any]:
        controller = self.controller
        return {
            "policy": controller.policy.name,
            "ttft_objective_s": self.objectives.ttft_s,
            "tpot_objective_s": self.objectives.tpot_s,
            "is_feasible": controller.is_feasible,
            "link_bytes_per_s": controller.link.link.bytes_per_s,
            "controller_share": self.spent_s / self.stepped_s if self.stepped_s else None,
            "looking_share": self.looked_s / self.stepped_s if self.stepped_s else None,
        }


def _between(least: int, most: int, ratio: float) -> list[int]:
    """Numbers that grow by about this ratio, both ends included."""
    num = math.ceil(math.log(most / least, ratio)) if most > least else 0
    return sorted({round(least * (most / least) ** (i / max(1, num))) for i in range(num + 1)})


def _unit_sets_of(policy: str, record: PerformanceRecord) -> list[tuple[int, ...]]:
    return unit_sets(record) if policy == "select-n" else []


def unit_sets(record: PerformanceRecord) -> list[tuple[int, ...]]:
    """The sets of units that a plan may be confined to, beside all of them."""
    names = [record.kinds[kind].name for kind in record.unit_kinds]
    return [among for among in offloadable_sets(names, record.fingerprint.unit).values() if among is not None]


def load_of(
    handles: Mapping[str, RequestHandle],
    progress: Mapping[str, Chunk],
    backlog: Mapping[str, Chunk],
    default: Objectives,
    kv_bytes: Callable[[RequestHandle], int] = lambda handle: 0,
    *,
    most_new: int | None = None,
) -> Load:
    """The requests in flight as the controller sees them, in the order in which they came; `kv_bytes` at their end.

    Of those that hold no KV the first `most_new` (None: all).

    `progress` has, for those that hold KV, the prefill that is left, in the order in which it is computed, `backlog`
    that of the others. A request that has tokens and prefill to do was preempted: it waits, and nothing hurries for its
    first token.
    """
    decoding: list[Decoding] = []
    begun: dict[str, Waiting] = {}
    others: list[Waiting] = []
    kv_tokens = 0
    for ticket, handle in handles.items():
        objectives = handle.objectives or default
        left = progress.get(ticket)
        if left is not None and not left.num_tokens and handle.num_tokens:
            kv_tokens += handle.num_prompt_tokens + handle.num_tokens
            decoding.append(
                Decoding(
                    num_tokens=handle.num_tokens,
                    first_token_s=handle.first_token_s,
                    num_left=handle.max_total_tokens - handle.num_prompt_tokens - handle.num_tokens,
                    tpot_s=objectives.tpot_s,
                )
            )
            continue
        if left is None and most_new is not None and len(others) >= most_new:
            continue
        to_do = left or backlog.get(ticket) or Chunk(handle.num_prompt_tokens + handle.num_tokens, 0)
        is_new = not handle.num_tokens
        request = Waiting(
            prefill_tokens=to_do.num_tokens,
            num_past=to_do.num_past,
            deadline_s=handle.arrived_s + objectives.ttft_s if is_new else math.inf,
            tpot_s=objectives.tpot_s,
            kv_bytes=kv_bytes(handle) if left is None else 0,
            passed_until_s=handle.arrived_s + PASSED_SHARE * objectives.ttft_s if is_new else -math.inf,
            is_sampled=handle.params is not None and not handle.params.is_greedy,
            is_truncated=handle.params is not None and handle.params.is_truncated,
            ticket=ticket,
        )
        if left is None:
            others.append(request)
        else:
            begun[ticket] = request
    holding = [handle for ticket, handle in handles.items() if ticket in progress]
    sampled_share, truncated_share = _sampling_shares(holding or handles.values())
    return Load(
        now_s=time.perf_counter(),
        decoding=decoding,
        waiting=[*(begun[ticket] for ticket in progress if ticket in begun), *others],
        num_begun=len(begun),
        mean_kv_tokens=kv_tokens // len(decoding) + 1 if decoding else 1,
        sampled_share=sampled_share,
        truncated_share=truncated_share,
    )


def _sampling_shares(handles: Iterable[RequestHandle]) -> tuple[float, float]:
    """Of requests, the shares that draw their tokens, and among the likeliest only. Of none: all do, as by default."""
    params = [handle.params for handle in handles if handle.params is not None]
    if not params:
        return 1.0, 0.0
    num_sampled = sum(not each.is_greedy for each in params)
    return num_sampled / len(params), sum(each.is_truncated for each in params) / len(params)
