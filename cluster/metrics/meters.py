"""The metrics of one process, as Ray's: set, added to and observed by name, with labels that cannot grow without bound.

A room of its own because Ray's metrics are made once for a process and forget nothing: here is what must not happen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from cluster.metrics.table import BY_NAME, Metric, Owner, of_owner

logger = logging.getLogger(__name__)

# Values of one label; names of buses and GPUs come from outside, and each is a series of its own.
MAX_VALUES = 64
OTHER = "other"
# Ray's counters take no 0. This is lost in any sum.
ALMOST_NOTHING = 1e-300


class BoundedLabels:
    """Lets the first values of a label pass."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()
        self._warned = False

    def admit(self, value: str) -> bool:
        """Whether the value has a series of its own."""
        if value in self._seen:
            return True
        if len(self._seen) < self._limit:
            self._seen.add(value)
            return True
        if not self._warned:
            self._warned = True
            logger.warning("more than %d values of a metric's label: later ones are left out", self._limit)
        return False


class Meters:
    """What one process of a kind exports. From one thread at a time."""

    def __init__(
        self,
        owner: Owner,
        defaults: Mapping[str, str] | None = None,
        *,
        max_values: int = MAX_VALUES,
        make: Callable[[Metric, dict[str, str]], Any] | None = None,
    ) -> None:
        """`defaults` are the values of the owner's own labels, `make` makes a metric (None: Ray's)."""
        made = make or _made
        self._made: dict[str, Any] = {metric.name: made(metric, dict(defaults or {})) for metric in of_owner(owner)}
        self._labels: dict[tuple[str, str], BoundedLabels] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}
        self._max_values = max_values
        for metric in of_owner(owner):
            for values in metric.known:  # there from the start, so that a rate begins at 0
                labels = dict(zip(metric.labels, values, strict=True))
                self._made[metric.name].inc(ALMOST_NOTHING, tags=self._tags(metric.name, labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge's value. One that is not set again is gone after some tens of seconds."""
        self._made[name].set(value, tags=self._tags(name, labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        self._made[name].observe(value, tags=self._tags(name, labels))

    def add(self, name: str, value: float, **labels: str) -> None:
        """Adds to a counter; nothing where nothing has come."""
        if value > 0:
            self._made[name].inc(value, tags=self._tags(name, labels))

    def total(self, name: str, value: float, **labels: str) -> None:
        """Brings a counter to a total that is counted elsewhere. One that begins again from 0 counts on from there."""
        key = (name, tuple(labels.values()))
        before = self._totals.get(key, 0.0)
        self._totals[key] = value
        self.add(name, value - before if value >= before else value, **labels)

    def _tags(self, name: str, labels: dict[str, str]) -> dict[str, str] | None:
        return {label: self._bounded(name, label, value) for label, value in labels.items()} or None

    def _bounded(self, name: str, label: str, value: str) -> str:
        bounded = self._labels.setdefault((name, label), BoundedLabels(self._max_values + len(BY_NAME[name].known)))
        return value if bounded.admit(value) else OTHER


def _made(metric: Metric, defaults: dict[str, str]) -> Any:
    from ray.util import metrics as ray_metrics

    keys = metric.all_labels
    if metric.kind == "histogram":
        made: Any = ray_metrics.Histogram(
            metric.name, description=metric.means, boundaries=list(metric.buckets), tag_keys=keys
        )
    else:
        kinds = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}
        made = kinds[metric.kind](metric.name, description=metric.means, tag_keys=keys)
    return made.set_default_tags(defaults)
