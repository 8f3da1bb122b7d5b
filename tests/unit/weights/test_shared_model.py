"""Models whose weights are in a shared store compute what models with weights of their own compute."""

from __future__ import annotations

import logging
import os
import shutil
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from selectn_core.config import DeviceConfig, EngineConfig, HostConfig, ModelConfig, OffloadConfig
from selectn_core.device.host_memory import HostMemory, is_in_memory
from selectn_core.errors import (
    ConfigError,
    DeviceMemoryExceeded,
    HostMemoryExceeded,
    StoreRefused,
    UnsupportedModel,
)
from selectn_core.start import load_engine
from selectn_core.weights import shared_model, store_binding, store_building, store_places
from selectn_core.weights.checkpoint import LoadedModel, load_model, resolve_source
from selectn_core.weights.shared_model import load_on_host, store_fingerprint
from tests.support.engine_users import EngineUser, shared_config
from tests.support.engines import CheckedEngine, engine_config, generate, greedy, make_prompts, random_plans
from tests.support.store_users import store_of
from tests.support.tiny_models import FAMILIES, tiny_model
from tests.support.tmpfs import small_tmpfs_at
from tests.unit.weights.test_checkpoint import write_tiny_gguf

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """The directory of a family's checkpoint, saved once."""

    @cache
    def saved(family: str = "llama", dtype: torch.dtype = torch.float32) -> str:
        path = tmp_path_factory.mktemp("checkpoints") / family
        tiny_model(family, dtype).model.save_pretrained(path)
        return str(path)

    return saved


@pytest.fixture
def host(tmp_path):
    """Stores in a directory that must be empty again after the test."""
    directory = tmp_path / "stores"
    directory.mkdir()
    yield HostConfig(weights="shared_memory", directory=str(directory))
    assert not list(directory.iterdir())


@pytest.fixture(autouse=True)
def nothing_stays_in_shared_memory():
    before = set(SHARED_MEMORY.glob("selectn-store-*"))
    yield
    assert set(SHARED_MEMORY.glob("selectn-store-*")) <= before


def all_tensors(model) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same_tensors(one, other) -> bool:
    a, b = all_tensors(one), all_tensors(other)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def ties(model) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(each) for each in names.values() if len(each) > 1}


def tokens_of(loaded: LoadedModel, num_offloaded: int = 3, before_step=None) -> list[list[int]]:
    """Greedy tokens through the checked engine, which verifies the store after every step."""
    engine = CheckedEngine(loaded, engine_config(num_offloaded))
    engine.before_step = before_step
    handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
    with engine:
        return [handle.result() for handle in handles]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_ties_and_tokens_are_those_of_a_private_copy(checkpoint_of, host, family, dtype) -> None:
    config = ModelConfig(source=checkpoint_of(family, dtype))
    private = load_model(config)
    builder, follower = load_on_host(config, host), load_on_host(config, host)
    assert follower.store is not None
    for shared in (builder, follower):
        assert same_tensors(shared.model, private.model)
        assert ties(shared.model) == ties(private.model)
        assert type(shared.model) is type(private.model)
        assert shared.model.generation_config.to_dict() == private.model.generation_config.to_dict()
        assert not shared.model.training
        assert not any(parameter.requires_grad for parameter in shared.model.parameters())
    expected = tokens_of(private)
    assert tokens_of(builder) == expected
    assert tokens_of(follower, before_step=random_plans(seed=3)) == expected


def test_a_family_of_these_ties_its_embeddings() -> None:
    assert ties(tiny_model("gemma").model), "nothing here would notice that ties come undone"


def test_the_second_does_not_read_the_checkpoint(checkpoint_of, host, monkeypatch) -> None:
    config = ModelConfig(source=checkpoint_of())
    first = load_on_host(config, host)
    monkeypatch.setattr(store_building, "load_weights", lambda _: pytest.fail("the checkpoint is read again"))
    second = load_on_host(config, host)
    assert same_tensors(first.model, second.model)
    store_of(first).close()
    store_of(second).close()


def test_gguf_files_are_shared(tmp_path, host) -> None:
    config = ModelConfig(source=str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    loaded = load_on_host(config, host)
    assert same_tensors(loaded.model, load_model(config).model)
    store_of(loaded).close()


def test_sharded_checkpoints_and_other_dtypes_are_shared(tmp_path, host) -> None:
    tiny_model("qwen2_moe").model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    config = ModelConfig(source=str(tmp_path / "sharded"), dtype="bfloat16")
    loaded = load_on_host(config, host)
    assert loaded.model.dtype == torch.bfloat16
    assert same_tensors(loaded.model, load_model(config).model)
    store_of(loaded).close()


@pytest.mark.parametrize(
    "infinity", ["Infinity", '{"__float__": "Infinity"}'], ids=["of JavaScript", "of transformers"]
)
def test_an_infinite_limit_of_a_time_step_is_shared_too(checkpoint_of, tmp_path, host, infinity) -> None:
    directory = tmp_path / "infinite"
    shutil.copytree(checkpoint_of(), directory)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", f'{{"time_step_limit": [0.0, {infinity}],', 1))
    for loaded in [load_on_host(ModelConfig(source=str(directory)), host) for _ in range(2)]:
        assert loaded.model.config.time_step_limit == [0.0, float("inf")]
        store_of(loaded).close()


def test_a_model_with_an_infinite_limit_by_default_is_made_again_from_its_description() -> None:
    layers = ["attention"] * 2
    config = AutoConfig.for_model(
        "granitemoehybrid", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, intermediate_size=48, shared_intermediate_size=48, layer_types=layers, mamba_n_heads=8,
        mamba_d_head=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert float("inf") in model.config.time_step_limit
    again = store_binding.empty_model(store_building.description_of(model))
    assert tuple(again.config.time_step_limit) == tuple(model.config.time_step_limit)


def test_an_engine_gives_its_store_up(checkpoint_of, host) -> None:
    config = EngineConfig(model=ModelConfig(source=checkpoint_of()), host=host)
    with load_engine(config) as engine:
        assert engine.snapshot()["host_store"].startswith(host.directory)
    assert engine.snapshot()["host_store"] == "private"
    assert torch.isfinite(engine.model.get_input_embeddings().weight).all(), "what is left of the model still works"


@cache
def unloaded_tokens_of_one() -> list[int]:
    return generate("llama", engine_config(0), prompts=make_prompts()[:1])[0]


def test_engines_that_start_at_once_share_one_build(checkpoint_of, host) -> None:
    users = [EngineUser(checkpoint_of(), Path(host.directory)) for _ in range(2)]
    assert [user.says() for user in users] == ["begun"] * 2
    inodes = {user.says() for user in users}
    assert len(inodes) == 1, "they use two files: one of them was built in vain"
    users[0].kill()
    users[1].close()


# From before the store is built to well into serving: an engine of this size is there in about a second.
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(delays_ms=st.lists(st.integers(0, 2500), min_size=1, max_size=2))
def test_replicas_killed_at_any_moment_leave_nothing_that_the_next_start_does_not_clean(
    checkpoint_of, host, delays_ms
) -> None:
    users = [EngineUser(checkpoint_of(), Path(host.directory)) for _ in delays_ms]
    assert {user.says() for user in users} == {"begun"}
    began_s = time.monotonic()
    for delay_ms, user in sorted(zip(delays_ms, users, strict=True), key=lambda pair: pair[0]):
        time.sleep(max(0.0, began_s + delay_ms / 1e3 - time.monotonic()))
        user.kill()
    prompt = make_prompts()[0]
    with load_engine(shared_config(checkpoint_of(), Path(host.directory))) as engine:
        tokens = engine.submit(prompt, greedy()).result()
        engine.store.check_integrity()
    assert tokens == unloaded_tokens_of_one()
    assert not list(Path(host.directory).iterdir())


def test_an_engine_that_cannot_be_gives_its_store_up(checkpoint_of, host) -> None:
    config = EngineConfig(
        model=ModelConfig(source=checkpoint_of()), host=host, device=DeviceConfig(kind="emulated", memory_gib=1e-5)
    )
    with pytest.raises(DeviceMemoryExceeded):
        load_engine(config)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2_moe"])
def test_layers_and_blocks_share_a_store(checkpoint_of, host, family) -> None:
    config = ModelConfig(source=checkpoint_of(family))
    expected = tokens_of(load_model(config))
    loaded = [load_on_host(config, host) for _ in range(2)]
    engines = [
        CheckedEngine(each, engine_config(4, unit=unit)) for each, unit in zip(loaded, ("layer", "block"), strict=True)
    ]
    layers, blocks = engines
    assert layers.snapshot()["host_store"] == blocks.snapshot()["host_store"] != "private"
    shared = blocks.store._shared
    assert shared is not None
    memory = shared.memory
    buffers = [blocks.store.buffer(unit) for unit in blocks.units]
    assert all(memory.data_ptr() < b.data_ptr() < memory.data_ptr() + memory.nbytes for b in buffers)
    for engine in engines:
        handles = [engine.submit(prompt, greedy()) for prompt in make_prompts()]
        with engine:
            assert [handle.result() for handle in handles] == expected


def test_a_changed_weight_is_noticed_at_block_granularity_too(checkpoint_of, host) -> None:
    loaded = load_on_host(ModelConfig(source=checkpoint_of()), host)
    engine = CheckedEngine(loaded, engine_config(4, unit="block"))
    engine.store.check_integrity()
    section = store_of(loaded).sections["model.layers.3"]
    with store_of(loaded).path.open("r+b") as file:
        file.seek(section.offset + 17)
        byte = file.read(1)
        file.seek(section.offset + 17)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(AssertionError, match=r"layers\.3 has changed"):
        engine.store.check_integrity()
    engine.close()


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_a_store_with_another_layout_is_refused(checkpoint_of, host, monkeypatch, unit) -> None:
    offload = OffloadConfig(unit=unit)
    config = EngineConfig(model=ModelConfig(source=checkpoint_of()), host=host, offload=offload)
    older = load_on_host(config.model, host)
    monkeypatch.setattr("selectn_core.weights.units.TENSOR_ALIGNMENT_BYTES", 8192)
    with pytest.raises(StoreRefused, match=r"layers\.0.* laid out otherwise, by another version"):
        load_engine(config)
    store_of(older).close()


def test_a_private_copy_needs_no_store(checkpoint_of, host) -> None:
    private = HostConfig(weights="private", directory=host.directory)
    assert load_on_host(ModelConfig(source=checkpoint_of()), private).store is None


# -- fingerprints -------------------------------------------------------------------------------------------------


def test_the_same_checkpoint_has_the_same_fingerprint(checkpoint_of) -> None:
    resolved = resolve_source(ModelConfig(source=checkpoint_of()))
    named = resolve_source(ModelConfig(source=checkpoint_of() + "/../" + Path(checkpoint_of()).name, served_name="x"))
    assert store_fingerprint(resolved) == store_fingerprint(named)


def test_different_weights_have_different_fingerprints(tmp_path, checkpoint_of) -> None:
    def fingerprint(source: str, **settings) -> str:
        return store_fingerprint(resolve_source(ModelConfig(source=source, **settings)))

    mine = tmp_path / "mine"
    tiny_model().model.save_pretrained(mine)
    seen = {fingerprint(str(mine)), fingerprint(str(mine), dtype="bfloat16"), fingerprint(checkpoint_of())}
    (mine / "notes.txt").write_text("no part of the checkpoint")
    assert fingerprint(str(mine)) in seen
    weights = mine / "model.safetensors"
    os.utime(weights, ns=(time.time_ns(), weights.stat().st_mtime_ns + 1))
    seen.add(fingerprint(str(mine)))
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    seen.add(fingerprint(str(mine)))
    assert len(seen) == 5


def test_commits_of_a_hub_model_have_different_fingerprints(monkeypatch) -> None:
    monkeypatch.setattr(shared_model, "cached_file", lambda *_, revision: f"/cache/snapshots/{revision}/config.json")
    commits = [ModelConfig(source="some/model", revision=revision) for revision in ("aaa", "bbb")]
    assert store_fingerprint(commits[0]) == store_fingerprint(commits[0]) != store_fingerprint(commits[1])


# -- where there is no room ---------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Where `auto` falls back to."""
    directory = tmp_path / "files"
    directory.mkdir()
    monkeypatch.setattr(store_places, "FILES", directory)
    yield directory
    assert not list(directory.iterdir())


@pytest.fixture
def small_tmpfs(tmp_path):
    directory = tmp_path / "shm"
    directory.mkdir()
    with small_tmpfs_at(directory, 64 << 10):
        yield directory
        assert not list(directory.iterdir())


@pytest.mark.parametrize("as_link", [False, True])
def test_a_directory_for_files_that_is_also_for_memory_is_one_place(checkpoint_of, files, tmp_path, as_link) -> None:
    """As two, the process would wait for a lock that it has."""
    directory = files
    if as_link:
        directory = tmp_path / "link"
        directory.symlink_to(files)
    host = HostConfig(directory=str(directory))
    (place,) = store_places.usable_places(host)
    assert place.in_memory == is_in_memory(files)
    loaded = load_on_host(ModelConfig(source=checkpoint_of()), host)
    assert store_of(loaded).path.parent.samefile(files)
    store_of(loaded).close()


def test_small_shared_memory_falls_back_to_a_file_and_says_what_to_set(
    checkpoint_of, small_tmpfs, files, caplog
) -> None:
    config, host = ModelConfig(source=checkpoint_of()), HostConfig(directory=str(small_tmpfs))
    with caplog.at_level(logging.WARNING):
        loaded = load_on_host(config, host)
    assert store_of(loaded).path.parent == files
    assert "has 65,536 bytes free and the weights take" in caplog.text
    assert "docker run --shm-size=2g" in caplog.text
    assert "host.directory" in caplog.text
    second = load_on_host(config, host)
    assert store_of(second).path == store_of(loaded).path
    assert tokens_of(second) == tokens_of(load_model(config))
    store_of(loaded).close()


def test_small_shared_memory_that_was_asked_for_is_an_error(checkpoint_of, small_tmpfs) -> None:
    host = HostConfig(weights="shared_memory", directory=str(small_tmpfs))
    with pytest.raises(HostMemoryExceeded, match="65,536 bytes free and the weights take .*--shm-size"):
        load_on_host(ModelConfig(source=checkpoint_of()), host)


def test_the_cgroups_limit_is_honoured(checkpoint_of, host, files, monkeypatch, caplog) -> None:
    little = HostMemory(available_bytes=4096, limit_bytes=8192, limited_by="/sys/fs/cgroup/pod/memory.max")
    monkeypatch.setattr(store_places, "available_host_memory", lambda: little)
    config = ModelConfig(source=checkpoint_of())
    with pytest.raises(HostMemoryExceeded, match=r"4,096 are left by /sys/fs/cgroup/pod/memory.max: raise that limit"):
        load_on_host(config, host)
    loaded = load_on_host(config, HostConfig(directory=host.directory))
    assert store_of(loaded).path.parent == files
    assert "host.weights to 'file'" in caplog.text
    store_of(loaded).close()


def test_no_room_anywhere_names_every_place(checkpoint_of, host, files, monkeypatch) -> None:
    monkeypatch.setattr(store_places, "free_bytes", lambda _: 17)
    with pytest.raises(HostMemoryExceeded, match=r"stores has 17 bytes free.*; .*files has 17 bytes free"):
        load_on_host(ModelConfig(source=checkpoint_of()), HostConfig(directory=host.directory))


def test_a_file_may_be_asked_for(checkpoint_of, host) -> None:
    loaded = load_on_host(ModelConfig(source=checkpoint_of()), HostConfig(weights="file", directory=host.directory))
    assert str(store_of(loaded).path.parent) == host.directory
    store_of(loaded).close()


def test_a_directory_that_is_not_there_says_so(checkpoint_of) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere is no directory .* set host\.directory"):
        load_on_host(ModelConfig(source=checkpoint_of()), HostConfig(weights="file", directory="/nowhere"))


def test_by_default_it_is_in_shared_memory(checkpoint_of) -> None:
    loaded = load_on_host(ModelConfig(source=checkpoint_of()), HostConfig())
    assert store_of(loaded).path.parent == SHARED_MEMORY
    store_of(loaded).close()


# -- models that cannot be shared ---------------------------------------------------------------------------------


class ForeignModel(LlamaForCausalLM):
    """A model whose code is not transformers' own."""


def test_a_model_with_code_of_its_own_stays_private(checkpoint_of, host, monkeypatch, caplog) -> None:
    foreign = ForeignModel.from_pretrained(checkpoint_of())
    monkeypatch.setattr(store_building, "load_weights", lambda _: foreign)
    config = ModelConfig(source=checkpoint_of())
    loaded = load_on_host(config, HostConfig(directory=host.directory))
    assert loaded.model is foreign
    assert loaded.store is None
    assert "its weights are private to this process" in caplog.text
    with pytest.raises(UnsupportedModel, match=r"not transformers' own.*: set host\.weights to 'private'"):
        load_on_host(config, host)


def test_a_model_with_a_tensor_that_is_neither_parameter_nor_buffer_stays_private(
    checkpoint_of, host, monkeypatch
) -> None:
    describe = store_binding.empty_model

    def with_a_plain_tensor(description):
        model = describe(description)
        model.model.norm.scale = torch.ones(3, device="meta")
        return model

    monkeypatch.setattr(store_building, "empty_model", with_a_plain_tensor)
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.scale is a tensor that is neither"):
        load_on_host(ModelConfig(source=checkpoint_of()), host)


def test_a_configuration_that_leads_to_other_tensors_stays_private(checkpoint_of, host, monkeypatch) -> None:
    description_of = store_building.description_of

    def with_fewer_layers(model):
        description = description_of(model)
        return {**description, "config": {**description["config"], "num_hidden_layers": 2}}

    monkeypatch.setattr(store_building, "description_of", with_fewer_layers)
    with pytest.raises(UnsupportedModel, match="its configuration alone leads to other tensors"):
        load_on_host(ModelConfig(source=checkpoint_of()), host)


class Ledger:
    """Host memory of a node, as the processes that load here ask for it."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.asked: list[tuple[int, str | None, bool]] = []
        self.stores: Path | None = None

    def __call__(self, num_bytes: int, shared_as: str | None) -> None:
        stores = [path for path in self.stores.iterdir() if path.suffix != ".lock"] if self.stores else []
        self.asked.append((num_bytes, shared_as, bool(stores)))
        if num_bytes > self.free_bytes:
            raise HostMemoryExceeded("the node has nothing left")


def test_a_store_is_reserved_before_it_is_written_and_by_everyone_under_one_name(checkpoint_of, host) -> None:
    config, ledger = ModelConfig(source=checkpoint_of()), Ledger(1 << 30)
    ledger.stores = Path(host.directory)
    first, second = load_on_host(config, host, ledger), load_on_host(config, host, ledger)
    before, *after = ledger.asked
    assert not before[2], "it was there before it was reserved"
    assert 0.9 * store_of(first).num_bytes < before[0] <= store_of(first).num_bytes
    assert [each[0] for each in after] == [store_of(first).num_bytes] * 2
    assert {each[1] for each in ledger.asked} == {store_of(first).fingerprint}
    store_of(first).close()
    store_of(second).close()


def test_what_the_node_refuses_goes_to_a_file_or_says_why(checkpoint_of, host, files) -> None:
    config, nothing = ModelConfig(source=checkpoint_of()), Ledger(0)
    with pytest.raises(HostMemoryExceeded, match="nothing left"):
        load_on_host(config, HostConfig(weights="shared_memory", directory=host.directory), nothing)
    with pytest.raises(HostMemoryExceeded, match="nothing left"):
        load_on_host(config, HostConfig(weights="private"), nothing)
    assert not [path for path in Path(host.directory).iterdir() if path.suffix != ".lock"]
    loaded = load_on_host(config, HostConfig(directory=host.directory), nothing)
    assert store_of(loaded).path.parent == files
    store_of(loaded).close()
