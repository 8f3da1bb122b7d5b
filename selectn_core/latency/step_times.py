"""How long a step of any shape computes, from the steps that were measured: as expected, and at the slowest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from selectn_core.errors import NotMeasured
from selectn_core.latency.prediction_cache import Remembered
from selectn_core.latency.recurrence import Link, StepCosts
from selectn_core.latency.steps import StepShape

# Sliding windows of the attention in units: the most keys that a token sees, None for all.
Windows = Sequence[int | None]
_MOST_SHAPES = 1024


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """One shape, measured `num_samples` times with nothing waiting for copies; seconds.

    `kind_s[i]` is the median of one unit of kind i, `rest_s` of the time outside the units. `low_s` and `high_s` are
    the shortest and the longest whole step: the spread.
    """

    shape: StepShape
    kind_s: tuple[float, ...]
    rest_s: float
    low_s: float
    high_s: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class SamplingTimes:
    """Seconds that a step has more where `n` rows are sampled: `call_s + n * row_s`, and more for those with top_p."""

    call_s: float = 0.0
    row_s: float = 0.0
    truncated_row_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """What sampling adds to a step of this shape."""
        if not shape.num_sampled:
            return 0.0
        return self.call_s + shape.num_sampled * self.row_s + shape.num_truncated * self.truncated_row_s


class StepTimes:
    """Answers for every shape from a few measured ones.

    `expected` fits them: a unit's time is a piecewise linear function of the step's tokens (through every number of
    tokens that was measured) plus non-negative multiples of its requests and, for each type of attention in it, the
    keys of its decoding requests, and the keys and query-key pairs of its prefills, as far as it reads them.
    `conservative` fits nothing: it is what some step that is at least as large in every respect has taken at worst.
    What sampling takes comes on top, as part of the rest of the step.
    """

    def __init__(
        self,
        steps: Sequence[MeasuredStep],
        unit_kinds: Sequence[int],
        unit_bytes: Sequence[int],
        kind_windows: Sequence[Windows] | None = None,
        *,
        sampling: SamplingTimes | None = None,
    ) -> None:
        """`unit_kinds[l]` is the kind of unit l, an index into every step's `kind_s`.

        `kind_windows[i]` are the sliding windows of the attention that a unit of kind i may have; None: all have one
        that reads every key. `sampling` None: it is free.
        """
        if not steps:
            raise NotMeasured("the performance record holds no steps: run `selectn profile`")
        self.steps = tuple(steps)
        self.sampling = sampling or SamplingTimes()
        self._unit_kinds, self.unit_bytes = tuple(unit_kinds), tuple(unit_bytes)
        self._num_of_kind = [self._unit_kinds.count(kind) for kind in range(len(steps[0].kind_s))]
        num_kinds = len(steps[0].kind_s)
        self._kind_windows = tuple(kind_windows or [(None,)] * num_kinds)
        self._windows = tuple(dict.fromkeys(window for windows in self._kind_windows for window in windows))
        self._sizes = np.array([step.shape.sizes(self._windows) for step in steps])
        self._knots = sorted({step.shape.num_tokens for step in steps})
        self._coefficients = self._fit()  # [num_kinds + 1][num_features]
        self._known = Remembered(_MOST_SHAPES)
        high_s = np.array([step.high_s for step in steps])
        self._slowest_s = [float(high_s[(self._sizes <= sizes).all(axis=1)].max()) for sizes in self._sizes]

    def expected(self, shape: StepShape) -> StepCosts:
        """What a step of this shape probably costs; beyond the grid, the fit goes on as a straight line."""
        return self._known.get(shape, lambda: self._expected(shape))

    def _expected(self, shape: StepShape) -> StepCosts:
        # Plain numbers: numpy's calls take ten times as long for so few, in the middle of every step.
        features = self._features(shape)
        *kind_s, rest_s = (sum(column[i] * value for i, value in features) for column in self._coefficients)
        return self._costs(kind_s, rest_s + self.sampling.seconds(shape))

    def expected_s(self, shape: StepShape) -> float:
        """Seconds of the whole step with every unit resident, as `expected`."""
        return self.expected(shape).unloaded_s

    def conservative(self, shape: StepShape) -> StepCosts:
        """The costs of the cheapest measured step that covers `shape`, at the worst of all that it covers itself.

        Raises NotMeasured where no measured step is that large.
        """
        covering = np.flatnonzero((self._sizes >= shape.sizes(self._windows)).all(axis=1)).tolist()
        if not covering:
            raise NotMeasured(
                f"no step as large as {shape} was measured: run `selectn profile` with a larger "
                "--max-length, or batch.max_requests and batch.max_batch_tokens in the configuration"
            )
        best = min(covering, key=lambda i: self._slowest_s[i])
        step = self.steps[best]
        scale = self._slowest_s[best] / self._median_s(step)
        return self._costs([t * scale for t in step.kind_s], step.rest_s * scale + self.sampling.seconds(shape))

    def median_error(self) -> float:
        """Of the steps that were measured, the median error of `expected` relative to the measured time."""
        return float(np.median([self.error(step) for step in self.steps]))

    def error(self, step: MeasuredStep) -> float:
        """How far `expected` is from a measured step, relative to it."""
        return abs(self.expected_s(step.shape) / self._median_s(step) - 1)

    def _costs(self, kind_s: Sequence[float], rest_s: float) -> StepCosts:
        return StepCosts(
            compute_s=tuple(kind_s[kind] for kind in self._unit_kinds), unit_bytes=self.unit_bytes, rest_s=rest_s
        )

    def _median_s(self, step: MeasuredStep) -> float:
        return step.rest_s + sum(n * t for n, t in zip(self._num_of_kind, step.kind_s, strict=True))

    def _fit(self) -> list[list[float]]:
        features = np.zeros((len(self.steps), len(self._knots) + 1 + 3 * len(self._windows)))
        for row, step in zip(features, self.steps, strict=True):
            for i, value in self._features(step.shape):
                row[i] = value
        targets = np.array([[*step.kind_s, step.rest_s] for step in self.steps])
        columns = []
        for target, windows in zip(targets.T, [*self._kind_windows, self._windows], strict=True):
            # Relative errors count, not absolute ones: the short steps are the many.
            weights = 1 / np.maximum(target, max(1e-9, target.max() * 1e-3))
            mine = self._columns(windows)
            column = np.zeros(features.shape[1])
            column[mine] = nnls(features[:, mine] * weights[:, None], target * weights)[0]
            columns.append(column.tolist())
        return columns

    def _columns(self, windows: Windows) -> list[int]:
        """The features that the time of units with this attention may depend on."""
        common = len(self._knots) + 1
        return [*range(common)] + [
            common + i for i in range(3 * len(self._windows)) if self._windows[i // 3] in windows
        ]

    def _features(self, shape: StepShape) -> list[tuple[int, float]]:
        """Those that are not 0, each with its index: hats of the knots, then requests, then three of each window."""
        features = [*self._hats(shape.num_tokens), (len(self._knots), float(shape.num_requests))]
        for i, window in enumerate(self._windows):
            read, first = shape.attended(window), len(self._knots) + 1 + 3 * i
            features += [
                (first, read.decode_kv_tokens / 1e3),
                (first + 1, (read.kv_tokens - read.decode_kv_tokens) / 1e3),
                (first + 2, read.prefill_pairs / 1e6),
            ]
        return features

    def _hats(self, num_tokens: int) -> list[tuple[int, float]]:
        """The weights of the two knots between which `num_tokens` lies; beyond the last one, in proportion to it."""
        knots = self._knots
        right = bisect_right(knots, num_tokens)
        if right == len(knots):
            return [(right - 1, num_tokens / knots[-1])]
        if right == 0:
            return [(0, 1.0)]
        share = (num_tokens - knots[right - 1]) / (knots[right] - knots[right - 1])
        return [(right - 1, 1 - share), (right, share)]


def slowed(unloaded_s: float, copied_bytes: int, link: Link, slowdown: float) -> float:
    """By what factor compute takes longer while the link copies that much in every step.

    Device memory (on the emulated device the CPU's) serves both. `slowdown` is relative, at a link that is always busy.
    """
    return 1 + slowdown * min(1.0, copied_bytes / link.bytes_per_s / unloaded_s)


def while_copying(costs: StepCosts, copied_bytes: int, link: Link, slowdown: float) -> StepCosts:
    """The costs while the link copies that much in every step (`slowed`)."""
    if slowdown == 0 or copied_bytes == 0:
        return costs
    return scaled(costs, slowed(costs.unloaded_s, copied_bytes, link, slowdown))


def scaled(costs: StepCosts, factor: float) -> StepCosts:
    """Every time multiplied by `factor`."""
    return StepCosts(
        compute_s=tuple(t * factor for t in costs.compute_s),
        unit_bytes=costs.unit_bytes,
        rest_s=costs.rest_s * factor,
    )
