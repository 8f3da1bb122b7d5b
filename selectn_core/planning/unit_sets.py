"""Which of a model's units a plan may keep to where units are unequal: sets by size, and few at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np

from selectn_core.latency.recurrence import StepCosts

_MOST_SIZES = 6
_MOST_FEW = 2048
# Distances that differ by less of a step are equal.
_RESOLUTION = 1e9


def size_sets(unit_bytes: Sequence[int]) -> list[tuple[int, ...]]:
    """All units; those of each size; and for each size those that have at most, and at least, so many bytes.

    A slot is as large as the largest unit that passes through it, so that small units are best among themselves, and
    large ones are worth their slots only where many of them pass. More than `_MOST_SIZES` sizes are grouped: the widest
    gaps between them, relative to the smaller one, divide the groups.
    """
    everything = tuple(range(len(unit_bytes)))
    sets = [everything]
    for low, high in _groups(sorted(set(unit_bytes))):
        sets.append(tuple(unit for unit in everything if low <= unit_bytes[unit] <= high))
        sets.append(tuple(unit for unit in everything if unit_bytes[unit] <= high))
        sets.append(tuple(unit for unit in everything if unit_bytes[unit] >= low))
    return list(dict.fromkeys(sets))


def unequal_few(costs: StepCosts) -> list[tuple[int, ...]]:
    """Every two units, and where there are few every three, of a step with unequal ones; those that are alike once.

    Alike are those of equal sizes, times and distances. A step with few copies has room for them only where much is
    computed between, which even spacing may miss: what is wanted then are some two, whichever. None where all units are
    alike; no more than `_MOST_FEW` of two and of three each, evenly chosen.
    """
    if len(costs.distinct) < 2:
        return []
    num_units = len(costs.compute_s)
    chosen = _distinct(costs, 2)
    if math.comb(num_units, 3) <= _MOST_FEW:
        chosen += _distinct(costs, 3)
    return chosen


def _distinct(costs: StepCosts, count: int) -> list[tuple[int, ...]]:
    kind_of = {kind: i for i, kind in enumerate(costs.distinct)}
    kinds = np.array([kind_of[kind] for kind in zip(costs.compute_s, costs.unit_bytes, strict=True)])
    several = _several(len(kinds), count)  # [num_choices, count]
    if not len(several):
        return []
    gaps_s = np.diff(np.array(costs.starts_s)[several], axis=1)
    keys = np.hstack([kinds[several], np.rint(gaps_s / costs.unloaded_s * _RESOLUTION)])
    order = np.lexsort(keys.T)  # stable: of those alike the first comes first
    is_new = np.append(True, (np.diff(keys[order], axis=0) != 0).any(axis=1))
    found = several[np.sort(order[is_new])]
    return [tuple(units) for units in found[:: -(-len(found) // _MOST_FEW)].tolist()]


@lru_cache(maxsize=8)
def _several(num_units: int, count: int) -> np.ndarray:  # [num_choices, count]
    return np.array([*combinations(range(num_units), count)], dtype=np.intp).reshape(-1, count)


def _groups(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The smallest and the largest of each group of ascending sizes."""
    gaps = [larger / max(1, smaller) for smaller, larger in pairwise(sizes)]
    widest = sorted(range(len(gaps)), key=lambda i: gaps[i], reverse=True)[: _MOST_SIZES - 1]
    begins = [0, *sorted(i + 1 for i in widest)]
    return [(sizes[first], sizes[last - 1]) for first, last in pairwise([*begins, len(sizes)])]
