"""The files of a checkpoint, found and looked at before anything is loaded from them: no tensor is read here."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from selectn_core.config import ModelConfig
from selectn_core.errors import ConfigError, UnsupportedModel
from selectn_core.weights.load_errors import blaming, one_line

CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_GIT_LFS = b"version https://git-lfs"
_FORBIDDEN_CODE = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """Where a tensor is, and in which type, as its file's format calls it."""

    file: Path
    dtype: str


class CheckpointFiles:
    """The files of a directory, or of a hub repository, from which each is fetched when it is asked for."""

    def __init__(self, resolved: ModelConfig) -> None:
        self.source, self._revision = resolved.source, resolved.revision
        self.is_local = Path(resolved.source).is_dir()

    def find(self, name: str) -> Path | None:
        """The file of this name, if there is one; in a directory a broken link counts, and is refused when read."""
        if self.is_local:
            path = Path(self.source) / name
            return path if os.path.lexists(path) else None
        try:
            return Path(str(cached_file(self.source, name, revision=self._revision)))
        except OSError:  # not there, or the hub cannot be reached: whoever needs the file says which
            return None

    def get(self, name: str) -> Path:
        """The file of this name. Raises ConfigError, saying what there is instead."""
        path = self.find(name)
        if path is not None:
            return path
        if self.is_local:
            raise ConfigError(f"{self.source}: has no {name}: {self._what_there_is()}")
        with blaming(f"model.source={self.source!r} cannot be loaded"):
            return Path(str(cached_file(self.source, name, revision=self._revision)))

    def _what_there_is(self) -> str:
        with blaming(self.source):
            names = sorted(path.name for path in Path(self.source).iterdir())
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        if ggufs:
            return f"set model.source to one of its GGUF files ({_some(ggufs)}), by its whole path"
        return f"it has {_some(names)}" if names else "the directory is empty"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    refuse_placeholder(path)
    with blaming(path):
        data = path.read_bytes()
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ConfigError(f"{path}: is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def refuse_placeholder(path: Path) -> None:
    """Raises ConfigError unless this is a file that can be opened and holds what its name says, for all we can see."""
    with blaming(path), path.open("rb") as file:
        start = file.read(len(_GIT_LFS))
    if not start:
        raise ConfigError(f"{path}: is empty")
    if start == _GIT_LFS:
        raise ConfigError(f"{path}: is a git-lfs pointer, not the file itself: run `git lfs pull` in its directory")


def refuse_adapter(files: CheckpointFiles) -> None:
    """Raises UnsupportedModel for an adapter, alone or beside a base model: it would not be applied."""
    path = files.find(ADAPTER_CONFIG)
    if path is None:
        return
    adapter = read_object(path)
    kind, base = adapter.get("peft_type", "unknown"), adapter.get("base_model_name_or_path", "unknown")
    raise UnsupportedModel(
        f"{path}: is a {kind} adapter (of {base}), which is not applied here: merge it into its base model (peft: "
        "merge_and_unload) and serve that, or remove the file to serve the base model beside it"
    )


def weight_files(files: CheckpointFiles, config: Mapping[str, Any]) -> list[Path]:
    """The files that transformers will load, an index followed. Raises ConfigError."""
    named = config.get("transformers_weights")
    if named is not None:
        _refuse_outside(files.get(CONFIG), named)
    for name in _WEIGHTS if named is None else (named,):
        path = files.find(name)
        if path is not None:
            return _shards(files, path) if name.endswith(".index.json") else [path]
    wanted = " or ".join(_WEIGHTS) if named is None else named
    if not files.is_local:
        raise ConfigError(f"model.source={files.source!r}: has no {wanted}, or the hub cannot be reached")
    found = sorted(path.name for path in Path(files.source).iterdir())
    raise ConfigError(f"{files.source}: has no {wanted}: it has {_some(found)}")


def read_headers(paths: Sequence[Path]) -> dict[str, StoredAs]:
    """Every tensor in these files, by name. Raises ConfigError for a file that is damaged, or a name that is twice."""
    stored: dict[str, StoredAs] = {}
    for path in paths:
        refuse_placeholder(path)
        for name, dtype in (_safetensors if path.suffix == ".safetensors" else _pickled)(path).items():
            if (other := stored.setdefault(name, StoredAs(file=path, dtype=dtype))).file != path:
                raise ConfigError(f"{path}: {name} is in another of the shards too, in {other.file.name}")
    return stored


def _shards(files: CheckpointFiles, index: Path) -> list[Path]:
    values = read_object(index)
    weight_map = values.get("weight_map")
    if not isinstance(values.get("metadata"), dict):
        raise ConfigError(f"{index}: expected an object 'metadata', which may be empty")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{index}: expected an object 'weight_map' from the names of tensors to names of files")
    names = sorted(set(weight_map.values()))
    if not names:
        raise ConfigError(f"{index}: its weight_map is empty")
    for name in names:
        _refuse_outside(index, name)
    found = {name: files.find(name) for name in names}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise ConfigError(f"{index}: names files that are not there: {_some(absent)}")
    return [path for path in found.values() if path is not None]


def _refuse_outside(path: Path, name: object) -> None:
    inside = isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not inside:
        raise ConfigError(f"{path}: names a file outside its directory: {name!r}")


def _safetensors(path: Path) -> dict[str, str]:
    with (
        blaming(f"{path}: cannot be read as safetensors, it is cut off or damaged"),
        safe_open(path, framework="pt") as file,
    ):
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, it is no dict


def _pickled(path: Path) -> dict[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # of many kinds, whose words are about how to run the code in the file
        if forbidden := _FORBIDDEN_CODE.search(str(error)):
            raise ConfigError(f"{path}: refused, it would run code when it is read ({forbidden[1]})") from None
        raise ConfigError(f"{path}: is no PyTorch checkpoint, or cut off or damaged ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected tensors by name, found a {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{path}: expected tensors by name, found {name!r}, a {type(value).__name__}")
    return {name: str(value.dtype).removeprefix("torch.") for name, value in values.items()}


def _some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
