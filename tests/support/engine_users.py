"""Real processes that each load an engine on a node's shared store and serve, for tests that end them anywhere."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from selectn_core.config import BatchConfig, DeviceConfig, EngineConfig, HostConfig, ModelConfig, OffloadConfig
from selectn_core.requests.sampling import SamplingParams
from selectn_core.start import load_engine
from tests.support.child import Child


def shared_config(checkpoint: str, directory: Path) -> EngineConfig:
    """An engine that offloads some layers of a tiny model and swaps KV."""
    return EngineConfig(
        model=ModelConfig(source=checkpoint),
        device=DeviceConfig(kind="emulated", link_gb_per_s=50),
        batch=BatchConfig(max_batch_tokens=16, max_requests=8, kv_tokens=96, page_size=4),
        offload=OffloadConfig(num_offloaded=3, num_slots=1),
        host=HostConfig(weights="shared_memory", directory=str(directory)),
    )


class EngineUser(Child):
    """A process that says "begun", loads an engine, says which file its weights are in, and serves until it ends."""

    def __init__(self, checkpoint: str, directory: Path) -> None:
        super().__init__(_serve, checkpoint, directory)


def _serve(pipe: Connection, checkpoint: str, directory: Path) -> None:
    pipe.send("begun")
    with load_engine(shared_config(checkpoint, directory)) as engine:
        pipe.send(f"inode {Path(engine.store.location).stat().st_ino}")
        while not pipe.poll():
            for length in (9, 30):
                engine.submit(range(3, 3 + length), SamplingParams(max_tokens=8, ignore_eos=True)).result()
    pipe.send("closed")
