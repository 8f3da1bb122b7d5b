"""Small requests on a device that holds every layer but the KV cache of two of them: more means offloading.

What such a load may be, from a record measured on a device with room: how much memory that device has, and how many
requests per second can be served within an objective.
"""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from selectn_core.config import BatchConfig, EngineConfig
from selectn_core.control.load import PLANNED_SHARE
from selectn_core.control.policies import Frontier, SelectN, Situation
from selectn_core.control.steering import unit_sets
from selectn_core.latency.placement import freed_bytes
from selectn_core.latency.recurrence import Link
from selectn_core.latency.step_times import slowed
from selectn_core.latency.steps import StepShape
from selectn_core.memory.memory_model import MemoryModel
from selectn_core.planning.record import PerformanceRecord
from selectn_core.profiling.record_cache import measured_record
from selectn_core.start import load_unsteered_engine

PROMPT_TOKENS, NEW_TOKENS, MAX_REQUESTS = 16, 32, 24
REQUEST_TOKENS = PROMPT_TOKENS + NEW_TOKENS
HELD_REQUESTS = 2
ROOMY_GIB = 1.5
FULL_STEP = StepShape.decode(MAX_REQUESTS, PROMPT_TOKENS + NEW_TOKENS // 2)
BATCH = BatchConfig(
    max_requests=MAX_REQUESTS, max_waiting=4096, page_size=16, kv_tokens=REQUEST_TOKENS, prefix_sharing=False
)
MAX_CORRECTIONS = 4


def with_memory(config: EngineConfig, memory_gib: float) -> EngineConfig:
    """The same on a device of this size."""
    return replace(config, device=replace(config.device, memory_gib=memory_gib))


def roomy_record(config: EngineConfig, budget_s: float) -> PerformanceRecord:
    """Measured on a device of `ROOMY_GIB`, for requests of up to twice `REQUEST_TOKENS`."""
    engine = load_unsteered_engine(with_memory(config, ROOMY_GIB))
    try:
        with tqdm(total=100, desc=f"profiling {config.offload.unit}s", unit="%") as bar:

            def show(share: float, what: str) -> None:
                bar.update(round(share * 100) - bar.n)

            return measured_record(engine, budget_s=budget_s, max_length=2 * REQUEST_TOKENS, on_progress=show)
    finally:
        engine.close()


def device_gib(config: EngineConfig, record: PerformanceRecord) -> float:
    """The device that holds every layer and the KV of `HELD_REQUESTS`; what activations take depends on its size."""
    memory = record.memory
    model = MemoryModel(
        resident_bytes=memory.resident_bytes,
        kv=memory.geometry,
        workspace=memory.workspace,
        num_reserved_sectors=memory.num_reserved_sectors,
    )
    kv_sectors = HELD_REQUESTS * memory.geometry.sectors_for_request(REQUEST_TOKENS)
    wanted = sum(model.unit_sectors(record.unit_bytes)) + kv_sectors
    gib = model.device_bytes_for(wanted) / 2**30
    for _ in range(MAX_CORRECTIONS):
        engine = load_unsteered_engine(with_memory(config, gib))
        missing, per_sector = wanted - engine.arena.num_sectors, engine.workspace.bytes_per_sector
        engine.close()
        if missing == 0:
            break
        gib += missing * (memory.geometry.sector_bytes + per_sector) / 2**30
    return gib


def capacity(record: PerformanceRecord, tpot_s: float, *, guaranteed_share: float, usual_share: float) -> float:
    """Requests per second that Select-N can serve at this TPOT (modelled).

    What they need must be freed with the bus share that is guaranteed; it is copied with the usual one, and slows
    compute meanwhile as the record says.
    """
    times, link, geometry = record.step_times(), record.link.link, record.memory.geometry
    policy = SelectN(Frontier(record.unit_bytes, unit_sets(record)))
    guaranteed = Link(bytes_per_s=guaranteed_share * link.bytes_per_s, copy_s=link.copy_s)
    limit_s, best = PLANNED_SHARE * tpot_s, 1 / (NEW_TOKENS * tpot_s)
    for batch in range(1, MAX_REQUESTS + 1):
        costs = times.expected(StepShape.decode(batch, PROMPT_TOKENS + NEW_TOKENS // 2))
        plan = policy.choose(Situation(costs=costs, link=guaranteed, limit_s=limit_s))
        copied_bytes = sum(record.unit_bytes[unit] for unit in plan.offloaded)
        needed_sectors = max(0, batch - HELD_REQUESTS) * geometry.sectors_for_request(REQUEST_TOKENS)
        # In its NEW_TOKENS steps a batch takes in as many prompts as it has requests: so much of each step is prefill.
        prefill_s = times.expected_s(StepShape.prefill(PROMPT_TOKENS)) * batch / NEW_TOKENS
        factor = slowed(costs.unloaded_s, copied_bytes, link, record.link.slowdown)
        step_s = max(factor * (costs.unloaded_s + prefill_s), copied_bytes / (usual_share * link.bytes_per_s))
        if needed_sectors * geometry.sector_bytes > freed_bytes(plan, record.unit_bytes) or step_s > limit_s:
            break
        best = batch / (NEW_TOKENS * step_s)
    return best
