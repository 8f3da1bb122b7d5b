"""One of the checks that need a GPU, by name, in a process of its own: its findings go to a file.

`python -m benchmarks.gpu_checks registration --json FILE`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType

from benchmarks.bench_interval import enough_gib
from benchmarks.gpu_checks import bandwidth, pins, steps
from benchmarks.gpu_checks.finding import Finding
from benchmarks.gpu_checks.steps import MemoryState
from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, ModelConfig
from selectn_core.device.cuda import CudaDevice, kept_back_bytes
from selectn_core.engine.engine import Engine
from selectn_core.weights.checkpoint import load_model

_DEVICE_BYTES = 1 << 30
_MATRIX, _NUM_PRODUCTS = 8192, 400  # a few tenths of a second at hundreds of TFLOP/s
_KV_TOKENS = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=sorted(CHECKS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    findings = CHECKS[arguments.check](arguments.model)
    arguments.json.write_text(json.dumps([each.as_dict() for each in findings]), encoding="utf-8")
    return 0


def registration(model: str) -> list[Finding]:
    with CudaDevice(_DEVICE_BYTES) as device:
        return [pins.read_only_support(), *pins.check_registration(device, pins.driver_flags)]


def link(model: str) -> list[Finding]:
    matrix = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(matrix)

    def compute() -> None:
        for _ in range(_NUM_PRODUCTS):
            torch.mm(matrix, matrix, out=product)

    with CudaDevice(_DEVICE_BYTES) as device:
        return bandwidth.check_bandwidth(device, compute)


def model_steps(model: str) -> list[Finding]:
    """Kernels, lengths and memory of one engine."""
    torch.cuda.init()
    torch.cuda.synchronize()
    before, total_bytes = _memory(0), torch.cuda.mem_get_info()[1]
    engine = _engine(model)
    loaded = _memory(engine.device.allocated_bytes)
    findings = steps.check_kernels(engine, DeviceType.CUDA)
    findings += steps.check_first_seen(
        lambda length: engine.batching.run_step([(1, length)] * steps.BATCH), engine.device.synchronize
    )
    stepped = _memory(engine.device.allocated_bytes)
    engine.close()
    closed = _memory(engine.device.allocated_bytes)
    return findings + steps.memory_findings(before, loaded, stepped, closed, kept_back_bytes(total_bytes))


def _engine(source: str) -> Engine:
    loaded = load_model(ModelConfig(source=source))
    return Engine(
        loaded,
        EngineConfig(
            device=DeviceConfig(kind="cuda", memory_gib=enough_gib(loaded.model, _KV_TOKENS)),
            batch=BatchConfig(max_requests=steps.BATCH, kv_tokens=_KV_TOKENS, prefix_sharing=False),
        ),
    )


def _memory(in_accounts: int) -> MemoryState:
    torch.cuda.synchronize()
    return MemoryState(
        driver_free=torch.cuda.mem_get_info()[0],
        torch_reserved=torch.cuda.memory_reserved(),
        in_accounts=in_accounts,
    )


CHECKS: dict[str, Callable[[str], list[Finding]]] = {
    "registration": registration,
    "link": link,
    "model_steps": model_steps,
}

if __name__ == "__main__":
    sys.exit(main())
