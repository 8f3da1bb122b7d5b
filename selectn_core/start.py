"""From a configuration to an engine: loads the model, finds or measures its performance record, and steers by it.

Apart from the engine, which knows nothing of profiling.
"""

from __future__ import annotations

from selectn_core.config import EngineConfig
from selectn_core.engine.engine import Engine
from selectn_core.offload.executor import Executor
from selectn_core.offload.overlapped import OverlappedExecutor
from selectn_core.profiling.profiler import OnProgress
from selectn_core.profiling.record_cache import performance_record
from selectn_core.weights.shared_model import load_on_host
from selectn_core.weights.store_places import ReserveHost, reserve_nothing


def load_engine(
    config: EngineConfig,
    *,
    executor_class: type[Executor] = OverlappedExecutor,
    on_progress: OnProgress = lambda share, what: None,
    reserve_host: ReserveHost = reserve_nothing,
) -> Engine:
    """Loads the configured model and builds an engine on it, steered by the configured policy.

    A policy needs a performance record. The first start on a machine makes one, within a minute, and later starts
    find it in the cache (`performance_record`). `on_progress` is told how far that is. `reserve_host` is asked
    before weights take host memory.
    """
    engine = load_unsteered_engine(config, executor_class=executor_class, reserve_host=reserve_host)
    if config.offload.num_offloaded == "auto":
        try:
            engine.steer(performance_record(engine, on_progress=on_progress))
        except BaseException:
            engine.close()
            raise
    return engine


def load_unsteered_engine(
    config: EngineConfig,
    *,
    executor_class: type[Executor] = OverlappedExecutor,
    reserve_host: ReserveHost = reserve_nothing,
) -> Engine:
    """As `load_engine`, without a policy: the fewest units are offloaded, or the configured number."""
    loaded = load_on_host(config.model, config.host, reserve_host)
    try:
        return Engine(loaded, config, executor_class=executor_class, reserve_host=reserve_host)
    except BaseException:
        if loaded.store is not None:
            loaded.store.close()
        raise
