"""What the accounts say of host memory, against what the kernel says of this process (/proc/self/smaps)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from selectn_core.config import EngineConfig, HostConfig, ModelConfig
from selectn_core.engine.engine import Engine
from selectn_core.weights.checkpoint import LoadedModel
from selectn_core.weights.shared_model import load_on_host
from tests.support.engines import CheckedEngine, engine_config, greedy, make_prompts
from tests.support.tiny_models import tiny_model

PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """A range of this process's addresses, the file behind it ("" for none), and its bytes in memory."""

    addresses: range
    file: str
    resident_bytes: int


def mappings() -> Iterator[Mapping]:
    header = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)$")
    for line in Path("/proc/self/smaps").read_text().splitlines():
        match = header.match(line)
        if match:
            addresses, file = range(int(match[1], 16), int(match[2], 16)), match[3]
        elif line.startswith("Rss:"):
            yield Mapping(addresses=addresses, file=file, resident_bytes=int(line.split()[1]) << 10)


def mapped_bytes(tensor: torch.Tensor, file: str) -> int:
    """Bytes of `tensor` that lie in mappings of `file`, or of memory without one."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    overlaps = (
        min(end, mapping.addresses.stop) - max(start, mapping.addresses.start)
        for mapping in mappings()
        if (mapping.file == file if file else not mapping.file.startswith("/"))
    )
    return sum(max(0, overlap) for overlap in overlaps)


@pytest.fixture
def checkpoint(tmp_path) -> ModelConfig:
    tiny_model().model.save_pretrained(tmp_path / "checkpoint")
    return ModelConfig(source=str(tmp_path / "checkpoint"))


def serve_more_than_fits(engine: CheckedEngine) -> int:
    """The most bytes of KV that were swapped to host memory while requests ran that do not fit together."""
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, engine.snapshot()["memory"]["host"]["kv_swap_used_bytes"])

    engine.before_schedule = lambda _: watch()
    handles = [engine.submit(prompt, greedy(24)) for prompt in make_prompts((26, 33, 41))]
    with engine:
        for handle in handles:
            handle.result()
        check_host_account(engine)
    return most


def check_host_account(engine: Engine) -> None:
    host, store = engine.snapshot()["memory"]["host"], engine.store.location
    shared_file = "" if store == "private" else store
    buffers = [engine.store.buffer(unit) for unit in engine.units]
    engine.store.check_integrity()  # reads every byte: what is mapped is in memory now
    assert sum(mapped_bytes(buffer, shared_file) for buffer in buffers) == host["weights_bytes"]
    if shared_file:
        mine = [mapping for mapping in mappings() if mapping.file == shared_file]
        size = Path(shared_file).stat().st_size
        assert sum(len(mapping.addresses) for mapping in mine) == -(-size // PAGE_BYTES) * PAGE_BYTES
        assert host["weights_bytes"] <= sum(mapping.resident_bytes for mapping in mine) <= size + PAGE_BYTES
    swap = engine.batching.swap
    if host["kv_swap_bytes"]:
        assert mapped_bytes(swap._cpu_tensor, "") == host["kv_swap_bytes"]
    else:
        assert not hasattr(swap, "_cpu_tensor")


@pytest.mark.parametrize("weights", ["shared_memory", "private"])
@pytest.mark.parametrize("kv_gib", [0.0, 1e-4, 1.0])
def test_the_host_account_is_what_the_kernel_says(checkpoint, tmp_path, weights: str, kv_gib: float) -> None:
    directory = tmp_path / "stores"
    directory.mkdir()
    host = HostConfig(weights=weights, directory=str(directory), kv_gib=kv_gib)
    settings = engine_config(2, 1, kv_gib=kv_gib, kv_tokens=72, page_size=4)
    loaded: LoadedModel = load_on_host(checkpoint, host)
    config = EngineConfig(
        model=checkpoint, device=settings.device, batch=settings.batch, offload=settings.offload, host=host
    )
    engine = CheckedEngine(loaded, config)
    swapped = serve_more_than_fits(engine)
    assert (swapped > 0) == (kv_gib > 0)
    assert swapped <= engine.batching.swap.capacity_bytes
    assert engine.snapshot()["memory"]["host"]["kv_swap_used_bytes"] == 0
    assert not list(directory.iterdir())
