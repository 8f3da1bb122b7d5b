"""Meters that keep what they are told, for tests of what becomes a metric; real runs export real ones."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from cluster.metrics.meters import ALMOST_NOTHING, Meters
from cluster.metrics.table import Metric, Owner


class Kept:
    """A metric: of a counter the sums, of a gauge the last values, of a histogram all values; each by its labels."""

    def __init__(self, metric: Metric, defaults: dict[str, str]) -> None:
        self.metric, self.defaults = metric, defaults
        self.values: dict[tuple[str, ...], Any] = defaultdict(list if metric.kind == "histogram" else float)

    def _key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        labels = {**self.defaults, **(tags or {})}
        assert set(labels) == set(self.metric.all_labels), f"{self.metric.name} with {labels}"
        return tuple(labels[label] for label in self.metric.labels)

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses it"
        if value != ALMOST_NOTHING:
            self.values[self._key(tags)] += value

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._key(tags)] = value

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._key(tags)].append(value)


class KeptMeters(Meters):
    def __init__(self, owner: Owner, *, max_values: int = 64, **labels: str) -> None:
        super().__init__(owner, labels, make=Kept, max_values=max_values)

    def of(self, name: str, *labels: str) -> Any:
        """What a metric has for these labels."""
        return self._made[name].values.get(labels)

    @property
    def told(self) -> set[str]:
        """The metrics that have a value."""
        return {name for name, kept in self._made.items() if kept.values}
