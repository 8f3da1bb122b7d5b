"""A checkpoint that is broken is refused in one line that says which file and what is wrong, before it is loaded."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from transformers import PreTrainedModel

from selectn_core.config import HostConfig, ModelConfig
from selectn_core.errors import ConfigError, SelectNError
from selectn_core.weights.checkpoint import load_model
from selectn_core.weights.shared_model import load_on_host
from tests.support.broken_checkpoints import CASES, CONFIG, Broken
from tests.support.store_users import store_of
from tests.support.tiny_models import tiny_model
from tests.support.tokenizers_in_process import byte_level_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint with nothing wrong with it."""
    path = tmp_path_factory.mktemp("good") / "tiny"
    tiny_model().model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def connect(*_: object) -> None:
        pytest.fail("somebody is asked over the network for what is on this disk")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def built(monkeypatch) -> list[PreTrainedModel]:
    """The models whose weights have been read, or made up where they are missing."""
    models: list[PreTrainedModel] = []
    initialize = PreTrainedModel.initialize_weights

    def counted(model: PreTrainedModel) -> None:
        if model.device.type != "meta":
            models.append(model)
        initialize(model)

    monkeypatch.setattr(PreTrainedModel, "initialize_weights", counted)
    return models


def refused(config: ModelConfig, stores: Path) -> list[SelectNError]:
    """The errors of both ways to load: a copy of this process's own, and the node's shared one."""
    errors = []
    for load in (load_model, lambda config: load_on_host(config, shared_in(stores))):
        with pytest.raises(SelectNError) as caught:
            load(config)
        errors.append(caught.value)
    assert not list(stores.iterdir()), "a store was left behind"
    return errors


def shared_in(directory: Path) -> HostConfig:
    return HostConfig(weights="shared_memory", directory=str(directory))


def stores(tmp_path: Path) -> Path:
    (tmp_path / "stores").mkdir(exist_ok=True)
    return tmp_path / "stores"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_in_one_line_before_it_is_loaded(case: Broken, good, tmp_path, built, capsys) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(good, directory)
    case.build(directory)
    for error in refused(ModelConfig(source=str(directory)), stores(tmp_path)):
        said = str(error)
        assert type(error) is case.error, said
        assert not [word for word in case.words if word not in said.replace(str(directory), "")], said
        assert str(directory) in said
        assert "\n" not in said
        assert "Traceback" not in said
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__
    assert bool(built) is case.loads_weights
    assert "this must never be run" not in capsys.readouterr().out


def test_the_good_one_loads_both_ways(good, tmp_path, built) -> None:
    load_model(ModelConfig(source=str(good)))
    loaded = load_on_host(ModelConfig(source=str(good)), shared_in(stores(tmp_path)))
    assert loaded.tokenizer is not None
    store_of(loaded).close()
    assert len(built) == 2


# -- what is no checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file.txt", "neither a directory nor a .gguf file"),
        ("loop", "symbolic links"),
        ("nowhere", "No such file"),
        ("x" * 300, "too long"),
        ("missing", "no such directory"),
    ],
)
def test_a_source_that_is_no_directory_says_what_it_is(tmp_path, name, words) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("not-there")
    for error in refused(ModelConfig(source=str(tmp_path / name)), stores(tmp_path)):
        assert type(error) is ConfigError
        assert words in str(error)
        assert name in str(error)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/model", "a\0b", "not/a/hub/id", "a b/c"])
def test_a_source_that_cannot_be_anything_says_so(tmp_path, source) -> None:
    for error in refused(ModelConfig(source=source), stores(tmp_path)):
        assert type(error) is ConfigError
        assert repr(source) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", [CONFIG, "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_file_that_may_not_be_read_says_so(good, tmp_path, name) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(good, directory)
    (directory / name).chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:3]):  # pytest's own, which are its user's alone
        parent.chmod(0o755)
    config = ModelConfig(source=str(directory))
    if os.geteuid() == 0:  # may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=f"{name}: Permission denied"):
            load_model(config)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


# -- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The directory of a snapshot of someone/model in the hub's cache, which is all that can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--someone--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_model_in_the_hubs_cache_loads(good, hub, tmp_path) -> None:
    shutil.copytree(good, hub)
    config = ModelConfig(source="someone/model")
    private = load_model(config)
    loaded = load_on_host(config, shared_in(stores(tmp_path)))
    assert private.tokenizer is not None
    assert loaded.tokenizer is not None
    assert loaded.name == "someone/model"
    store_of(loaded).close()


BROKEN_AT_THE_HUB = [
    *("one_matrix_left_out", "a_shard_that_is_not_there", "float8_without_a_word", "modelopt"),
    *("an_adapter_beside_its_base", "weights_as_git_lfs_left_them", "a_config_that_is_a_list"),
    *("a_tokenizer_config_that_is_a_list", "two_templates_and_no_default"),
]


@pytest.mark.parametrize("name", BROKEN_AT_THE_HUB)
def test_a_broken_model_in_the_hubs_cache_is_refused(good, hub, tmp_path, name) -> None:
    (case,) = [each for each in CASES if each.name == name]
    shutil.copytree(good, hub)
    case.build(hub)
    for error in refused(ModelConfig(source="someone/model"), stores(tmp_path)):
        assert type(error) is case.error, str(error)
        assert not [word for word in case.words if word not in str(error)], str(error)
        assert "\n" not in str(error)


def test_a_model_that_is_not_at_the_hub_says_so(hub, tmp_path) -> None:
    for error in refused(ModelConfig(source="someone/else"), stores(tmp_path)):
        assert type(error) is ConfigError
        assert str(error).startswith("model.source='someone/else' cannot be loaded: ")
        assert "\n" not in str(error)
