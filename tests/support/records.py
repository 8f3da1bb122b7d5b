"""Performance records without a measurement: a model whose steps take what a formula says."""

from __future__ import annotations

from selectn_core.latency.step_times import MeasuredStep
from selectn_core.latency.steps import StepShape
from selectn_core.memory.memory_model import kv_of_tokens
from selectn_core.memory.workspace import Workspace
from selectn_core.planning.record import Fingerprint, LinkRecord, MemoryRecord, PerformanceRecord, UnitKind

MIB = 1 << 20
NUM_LAYERS = 12
BATCHES, LENGTHS, CHUNKS = (1, 2, 4, 8), (64, 256, 1024), (64, 256)


def measured(shape: StepShape, shares: tuple[float, ...]) -> MeasuredStep:
    """A layer takes a millisecond and a little per token and key; `shares` of it are its units'."""
    layer_s = 1e-3 + 4e-6 * shape.num_tokens + 2e-7 * shape.kv_tokens
    step_s = NUM_LAYERS * layer_s + 1e-3
    return MeasuredStep(
        shape=shape,
        kind_s=tuple(share * layer_s for share in shares),
        rest_s=1e-3,
        low_s=step_s,
        high_s=step_s,
        num_samples=5,
    )


def made_record(kinds: dict[str, float], unit: str) -> PerformanceRecord:
    """Layers of 12 MiB, cut into `kinds` with their shares of it, over a link that copies one in six milliseconds."""
    shapes = [StepShape.decode(batch, length) for batch in BATCHES for length in LENGTHS]
    shapes += [StepShape.prefill(chunk, past) for chunk in CHUNKS for past in (0, *LENGTHS)]
    return PerformanceRecord(
        fingerprint=Fingerprint(
            model="abc",
            model_type="llama",
            dtype="float32",
            attention="sdpa",
            unit=unit,
            device="emulated",
            device_name="cpu",
            compute_threads=1,
            link="2 GB/s",
            max_batch_tokens=256,
            max_requests=8,
            page_size=16,
            torch="2",
            transformers="5",
        ),
        provenance="emulated",
        created="2026-01-01T00:00:00+00:00",
        kinds=tuple(UnitKind(name=name, num_bytes=int(share * 12 * MIB)) for name, share in kinds.items()),
        unit_kinds=tuple(range(len(kinds))) * NUM_LAYERS,
        memory=MemoryRecord(
            resident_bytes=20 * MIB,
            num_reserved_sectors=2,
            geometry=kv_of_tokens(8192),
            workspace=Workspace(step_bytes=8 * MIB),
        ),
        link=LinkRecord(
            bytes_per_s=2.0 * MIB * 1e3, copy_s=0.0, busy_bytes_per_s=2.0 * MIB * 1e3, slowdown=0.0, copies=()
        ),
        steps=tuple(measured(shape, tuple(kinds.values())) for shape in shapes),
        is_complete=True,
    )


def layer_record() -> PerformanceRecord:
    return made_record({"LlamaDecoderLayer": 1.0}, "layer")


def block_record() -> PerformanceRecord:
    """The same model: a third of each layer is attention."""
    return made_record({"LlamaAttention": 1 / 3, "LlamaMLP": 2 / 3}, "block")
