"""Whether a checkpoint's tensors are a model's, one for one: what transformers merges or drops without a word.

It stacks the experts that it finds, whatever their numbers are, and of two tensors for one parameter it takes one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from selectn_core.errors import ConfigError
from selectn_core.weights.checkpoint_config import PLAIN_DTYPES, num_experts
from selectn_core.weights.checkpoint_files import StoredAs
from selectn_core.weights.load_errors import listed

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
_NUMBERS = re.compile(r"\d+")


def refuse_experts_of_other_numbers(path: Path, config: PreTrainedConfig, stored: Mapping[str, StoredAs]) -> None:
    """Raises ConfigError unless the experts of every layer are numbered from 0, as many as `config` has, each whole."""
    found: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for name in stored:
        if match := _EXPERT.match(name):
            found[match[1]].add((match[2], match[3]))
    field, count = num_experts(config) or ("", 0)
    said = f"{path}: {field}={count}, and the checkpoint" if count else f"{path}: the checkpoint"
    for experts, tensors in found.items():
        numbers = [str(i) for i in range(count or len({number for number, _ in tensors}))]
        parts = sorted({part for _, part in tensors})
        missing = [f"{experts}.{i}.{part}" for part in parts for i in numbers if (i, part) not in tensors]
        left_over = [f"{experts}.{i}.{part}" for i, part in sorted(tensors) if i not in set(numbers)]
        if missing or left_over:
            what = "; ".join(filter(None, [listed("missing", missing), listed("left over", left_over)]))
            where = stored[left_over[0]].file if left_over else next(iter(stored.values())).file
            raise ConfigError(f"{said} has other experts in {where.name}: {what}")


def refuse_what_is_not_taken(model: PreTrainedModel, stored: Mapping[str, StoredAs], *, is_quantised: bool) -> None:
    """Raises ConfigError for two tensors that are one parameter of `model`, or one of another type than its floats."""
    own = model.state_dict()
    first: dict[tuple[str, str], str] = {}
    for name, target, part in _targets(model, own, stored):
        wanted, tensor = own[target], stored[name]
        if (other := first.setdefault((target, part), name)) != name:
            raise ConfigError(
                f"{tensor.file}: {name} and {other} (in {stored[other].file.name}) are the same parameter, twice: "
                f"{target}, of which one would be left over"
            )
        if wanted.is_floating_point() and tensor.dtype not in PLAIN_DTYPES and not is_quantised:
            raise ConfigError(f"{tensor.file}: {name} is stored as {tensor.dtype}, and is a weight: expected floats")


def _targets(model: PreTrainedModel, own: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Of each name that is taken: the parameter that it becomes, and which part of it, as transformers renames them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    found = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, own)
        if target in own:
            # Parts of one kind are told apart by their numbers alone, whatever their prefix is.
            found.append((name, target, f"{pattern} {_NUMBERS.findall(name)}" if pattern is not None else ""))
    return found
