"""Every private name of transformers that selectn_core/batching/ stands on is where it was.

When an upgrade breaks one of these, read the new source, fix that file, and move the pin in pyproject.toml.
"""

from __future__ import annotations

import inspect
import tomllib
from importlib.metadata import version

import pytest
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching.cache import (
    ATTN_TYPE_TO_ALLOCATOR,
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    CachePool,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_pool import RegularTrees
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import (
    TMP_TOKEN_ID,
    FutureRequestState,
    GenerationOutput,
    RequestState,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import stream_context

from selectn_core.config import DeviceConfig, EngineConfig
from selectn_core.engine.engine import Engine
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model

PLACE = "selectn_core/batching/"

SIGNATURES = [
    (get_model_conversion_mapping, ("model", "key_mapping", "hf_quantizer", "add_legacy")),
    (
        rename_source_key,
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict", "reverse"),
    ),
    (FIFOScheduler.__init__, ("self", "cache", "safety_margin", "max_requests_per_batch")),
    (FIFOScheduler.schedule_batch, ("self", "token_budget", "cache_budget")),
    (FIFOScheduler._get_waiting_candidates, ("self",)),
    (OutputRouter.deliver, ("self", "output")),
    (OutputRouter.deliver_batch, ("self", "outputs")),
    (OutputRouter.fail_and_deliver, ("self", "state", "error")),
    (ContinuousBatchingLogitsProcessorList.check_kwargs, ("self", "kwargs")),
    (
        ContinuousBatchingLogitsProcessorList.prepare_tensor_args,
        ("self", "requests_in_batch", "arg_storage"),
    ),
    (ContinuousBatchingLogitsProcessorList.__call__, ("self", "input_ids", "scores", "logits_processor_args")),
    (ContinuousBatchProcessor.prepare_next_batch, ("self",)),
    (ContinuousBatchProcessor.update_batch, ("self",)),
    (ContinuousBatchingManager._generation_step, ("self",)),
    (ContinuousBatchingManager.cancel_request, ("self", "request_id")),
    (PagedAttentionCache.evict_cached_blocks, ("self",)),
    (PagedAttentionCache.search_prefix_match, ("self", "request_id", "prompt_ids")),
    (
        ContinuousBatchingIOs.prepare_batch_tensors,
        (
            "self",
            "requests_in_batch",
            "logits_processors",
            "use_decode_fast_path",
            "num_q_tokens",
            "max_kv_read",
            "use_padding",
        ),
    ),
    (ContinuousBatchingIOs.get_model_kwargs, ("self", "use_padding")),
    (CacheAllocator.get_seqlen_k, ("self", "past_length", "query_length")),
    (group_layers_by_attn_type, ("config",)),
    (cache_module.find_head_dim, ("config",)),
    (cache_module.find_num_key_value_heads, ("config",)),
    (
        FullAttentionCacheAllocator.get_bytes_per_page,
        ("num_key_value_heads", "head_dim", "cache_dtype", "page_size"),
    ),
    (PreTrainedModel._can_set_attn_implementation, ()),
    (CacheAllocator.copy_blocks, ("self", "source_block_ids", "dest_block_ids")),
    (CacheAllocator.register_cache_tensor, ("self", "bytes_per_sector", "non_trash_bytes", "cache_tensor", "pool")),
    (CachePool.__init__, ("self", "num_sectors", "num_allocators", "num_reserved_sectors")),
    (CachePool.reset, ("self",)),
    (CachePool.allocate_sector, ("self", "index")),
    (CachePool.get_free_blocks, ("self", "index", "num_blocks")),
    (
        OffloadingManager.__init__,
        (
            "self",
            "cache",
            "scheduler",
            "cpu_offload_space_gib",
            "safety_threshold",
            "compute_stream",
            "distributed_helper",
        ),
    ),
    (OffloadingManager.offload_requests, ("self",)),
    (PagedAttentionCache.count_storable_requests, ("self", "list_blocks_needed")),
    (OffloadingManager.restore_scheduled_requests, ("self", "requests_in_batch")),
    (OffloadingManager._offload_to_cpu, ("self", "victims", "victim_block_tables")),
    (OffloadingManager._reserve_cpu_blocks, ("self", "block_counts")),
    (OffloadingManager.free_request_cpu_cache, ("self", "state")),
]


@pytest.fixture(scope="module")
def engine():
    engine = Engine(tiny_model("mistral"), EngineConfig(device=DeviceConfig(kind="emulated", link_gb_per_s=50)))
    yield engine
    engine.close()


@pytest.mark.parametrize(("function", "parameters"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signature(function, parameters) -> None:
    found = tuple(inspect.signature(function).parameters)
    assert found == parameters, f"{function.__qualname__} has changed: see {PLACE}"


def test_manager_parameters() -> None:
    wanted = {"input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id", "logit_processor_kwargs"}
    assert wanted <= set(inspect.signature(ContinuousBatchingManager.add_request).parameters), f"see {PLACE}"
    assert {"block", "hard_stop"} <= set(inspect.signature(ContinuousBatchingManager.stop).parameters), f"see {PLACE}"


def test_objects_have_what_is_used(engine) -> None:
    """Attributes of live objects: most are set in constructors, where a class does not show them."""
    manager, processor = engine.batching._manager, engine.batching._processor
    cache = processor.cache
    allocator = next(iter(cache.cache_allocators.values()))
    request = RequestState(request_id="r", initial_tokens=[1])
    used = {
        manager: "output_router logit_processor batch_processor background_thread_status continuous_batching_config "
        "_generation_step _generation_thread is_running start stop warmup add_request",
        manager.background_thread_status: "fatal_error",
        processor: "cache scheduler prepare_next_batch update_batch inputs_and_outputs model_runner",
        processor.model_runner: "inputs_and_outputs",
        processor.inputs_and_outputs: "requests_in_batch num_request_in_batch num_q_tokens total_seqlen_q max_length_q "
        "use_block_table max_kv_read _bulk_input_tensor static_inputs input_ids position_ids cumulative_seqlens_q "
        "logits_indices cumulative_seqlens_k total_seqlen_k max_length_k device prepare_batch_update "
        "compute_stream",
        processor.scheduler: "active_requests waiting_requests schedule_batch block_new_requests starved_requests",
        cache: "cache_tensor cache_allocators layer_to_allocator num_sectors bytes_per_sector pool use_prefix_sharing",
        cache.pool: "num_free_sectors try_to_free_sectors free_sectors _free_blocks",
        allocator: "cache_tensor _copy_view _kv_token_views _kv_page_views register_cache_tensor bytes_per_block "
        "tokens_per_page layer_type sliding_window blocks_per_sector block_table index ledger "
        "block_physical_stride write_trash_index",
        allocator.ledger: "shared_ref_counts hash_to_block block_to_hash cached_blocks",
        RegularTrees(2): "trees _length delete_full_trees",
        FutureRequestState(request, True, {}, 1): "state query_length has_new_token complete_blocks",
    }
    for owner, names in used.items():
        missing = [name for name in names.split() if not hasattr(owner, name)]
        assert not missing, f"{type(owner).__name__} no longer has {missing}: see {PLACE}"
    for name in [
        "initial_tokens",
        "generated_tokens",
        "position_offset",
        "tokens_to_process",
        "logit_processor_kwargs",
        "is_cpu_offloaded",
    ]:
        assert hasattr(request, name), f"RequestState no longer has {name}: see {PLACE}"
    for name in ["request_id", "generated_tokens", "error", "is_finished"]:
        assert hasattr(GenerationOutput(request_id="r"), name), f"GenerationOutput no longer has {name}: see {PLACE}"


def test_the_processor_asks_its_offloading_manager() -> None:
    """It is replaced: preemption and restoring must go through it."""
    source = inspect.getsource(ContinuousBatchProcessor.prepare_next_batch)
    for call in ("self.offloading_manager.offload_requests()", "self.offloading_manager.restore_scheduled_requests("):
        assert call in source, f"{call} is gone: see {PLACE}"
    for name in ("_cpu_pool", "_cpu_views", "_request_id_to_cpu_blocks"):
        assert name in inspect.getsource(OffloadingManager), f"{name} is gone: see {PLACE}"


def test_preemption_asks_what_can_be_stored() -> None:
    """Until as much can be stored as starves, it preempts what starves: that is how the newest is chosen here."""
    source = inspect.getsource(OffloadingManager.offload_requests)
    for part in (
        "while starved and num_active - len(offloaded) > 1:",
        "self.cache.count_storable_requests(list_blocks_needed)",
        "if num_storable == len(starved):",
        "starved.pop()",
        "self._offload_to_cpu(offloaded, offloaded_block_tables)",
    ):
        assert part in source, f"{part} is gone: see {PLACE}"


def test_a_step_computes_on_a_stream_that_can_be_made_to_wait(engine) -> None:
    """Inputs are laid out on the current stream, and what follows runs on `compute_stream`, within `stream_context`."""
    assert engine.batching._processor.inputs_and_outputs.compute_stream is None, "on the CPU there is one stream"
    with stream_context(None):
        source = inspect.getsource(ModelRunner.compute_batch)
    for part in ("compute_stream = self.inputs_and_outputs.compute_stream", "with stream_context(compute_stream):"):
        assert part in source, f"{part} is gone: see {PLACE}"
    source = inspect.getsource(ContinuousBatchProcessor._generation_step)
    kwargs, compute = source.index("get_model_kwargs("), source.index("compute_batch(")
    assert kwargs < compute, f"a step asks for its inputs when it has computed: see {PLACE}"
    source = inspect.getsource(ContinuousBatchingIOs.retrieve_device_outputs)
    assert "self.compute_stream.synchronize()" in source, f"the host does not wait for a step any more: see {PLACE}"


def test_caches_find_their_shape_where_it_is_replaced(engine) -> None:
    """Allocators by attention type, which read no more of a configuration than what is put in its place."""
    source = inspect.getsource(PagedAttentionCache.__init__)
    for part in ("ATTN_TYPE_TO_ALLOCATOR[attn_type](", "find_num_key_value_heads(config)", "find_head_dim(config)"):
        assert part in source, f"{part} is gone: see {PLACE}"
    assert "torch.zeros(non_trash_bytes + trash_bytes, dtype=torch.uint8" in source, f"see WithoutMemory in {PLACE}"
    assert set(ATTN_TYPE_TO_ALLOCATOR) == {"full_attention", "sliding_attention"}
    assert all(isinstance(each, type) for each in ATTN_TYPE_TO_ALLOCATOR.values()), "a patch was left behind"
    assert isinstance(engine.model._is_stateful, bool)
    assert isinstance(engine.model.config._attn_implementation, str)


def test_free_sectors_are_used_as_ours_can_be() -> None:
    """What takes the place of the pool's list has no more of a list's ways than these."""
    assert "self.free_sectors.pop()" in inspect.getsource(CachePool.allocate_sector), f"see {PLACE}"
    own = inspect.getsource(CachePool.try_to_free_sectors)  # which is replaced
    for part in ("_free_blocks.delete_full_trees()", "self.free_sectors.append(root)"):
        assert part in own, f"{part} is gone: see {PLACE}"
    uses = inspect.getsource(CachePool).count("self.free_sectors")
    assert uses == 4, f"free sectors are used otherwise, too: see {PLACE}"


def test_the_scheduler_registry_is_a_dict_and_is_left_as_it_was(engine) -> None:
    assert SCHEDULER_MAPPING["fifo"] is FIFOScheduler
    assert set(SCHEDULER_MAPPING) == {"fifo", "prefill_first"}


def test_a_failed_step_keeps_the_processor(engine) -> None:
    """The supervisor restarts the same manager: start() must reset the processor, not build another one."""
    source = inspect.getsource(ContinuousBatchingManager._create_batch_processor)
    assert "batch_processor.reset()" in source, f"a restart builds a new processor: see {PLACE}"


def test_transformers_is_the_pinned_release() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"transformers=={version('transformers')}" in pyproject["project"]["dependencies"]


def test_inputs_are_laid_out_by_ours(engine) -> None:
    """Wherever transformers lays them out it asks the object whose two methods are replaced, and pads nothing."""
    processor = engine.batching._processor
    assert processor.model_runner.inputs_and_outputs is processor.inputs_and_outputs
    assert processor.model_runner.pad_inputs is False
    assert processor.inputs_and_outputs.attention_mask is None
    source = inspect.getsource(ContinuousBatchingIOs.prepare_batch_tensors)
    for part in ("state.position_offset += query_length", "state.tokens_to_process = [TMP_TOKEN_ID]"):
        assert part in source, f"{part} is gone: see {PLACE}"
    assert isinstance(TMP_TOKEN_ID, int)
    for name in ("prepare_batch_tensors", "get_model_kwargs"):
        assert name in vars(processor.inputs_and_outputs), f"{name} is not replaced: see {PLACE}"
