"""What steps teach the controller: the bandwidth that the link gives now, and how far the record is off."""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist, median

from selectn_core.device import LinkUsage
from selectn_core.latency.recurrence import Link

# Copies of one step that are believed without a second step; otherwise two steps must agree.
_COPIES_TO_BELIEVE = 4
# Shares of the way to a higher bandwidth: when it was seen, and per step in which nothing was copied.
_UPWARD, _DRIFT = 0.5, 0.02
_GOOD_SHARE = 0.98
# Of a guaranteed share, what arrives while others use theirs.
_SHARED_EFFICIENCY = 0.95
_BROKEN_SHARE = 0.85
# Of a request whose TPOT is to be kept: short ones vary more.
_TOKENS = 8


class LinkEstimate:
    """The bandwidth that the link gives now, from what steps have seen of it.

    Down at once, where several copies agree: a single one may have been unlucky. Up slowly. Where nothing is copied
    nothing is seen, and the estimate drifts back to the record's.
    """

    def __init__(self, nominal: Link, guaranteed_share: float = 1.0) -> None:
        self.nominal = nominal
        self.guaranteed_bytes_per_s = nominal.bytes_per_s * guaranteed_share
        self.share_bytes_per_s = math.inf  # what the coordinator allows
        self._now_bytes_per_s = nominal.bytes_per_s
        self._recent: deque[float] = deque(maxlen=6)
        self._few: deque[float] = deque(maxlen=2)
        self._is_stale = False

    @property
    def link(self) -> Link:
        """The link to plan with."""
        return Link(bytes_per_s=min(self._now_bytes_per_s, self.share_bytes_per_s), copy_s=self.nominal.copy_s)

    @property
    def guaranteed(self) -> Link:
        """What will be there whatever others do, less what sharing costs."""
        is_shared = self.guaranteed_bytes_per_s < self.nominal.bytes_per_s
        share = _SHARED_EFFICIENCY if is_shared else 1.0
        return Link(bytes_per_s=share * self.guaranteed_bytes_per_s, copy_s=self.nominal.copy_s)

    def add(self, usage: LinkUsage) -> None:
        """Takes in the copies of one step."""
        self._is_stale = usage.num_copies == 0 and self._now_bytes_per_s < _GOOD_SHARE * self.nominal.bytes_per_s
        if usage.num_copies == 0:
            self._drift_back()
            return
        seen = usage.share_bytes_per_s
        self._recent.append(seen)
        self._few.append(seen)
        believed = usage.num_copies >= _COPIES_TO_BELIEVE or len(self._few) == self._few.maxlen
        if not believed:
            return
        low = seen if usage.num_copies >= _COPIES_TO_BELIEVE else max(self._few)
        if low < self._now_bytes_per_s:
            self._now_bytes_per_s = low
        else:
            self._now_bytes_per_s += _UPWARD * max(0.0, median(self._recent) - self._now_bytes_per_s)

    def _drift_back(self) -> None:
        missing = self.nominal.bytes_per_s - self._now_bytes_per_s
        self._now_bytes_per_s += max(0.0, _DRIFT * missing)

    @property
    def is_below_guarantee(self) -> bool:
        """Whether the link gives clearly less than what was guaranteed."""
        return self._now_bytes_per_s < _BROKEN_SHARE * self.guaranteed.bytes_per_s

    @property
    def is_stale(self) -> bool:
        """Whether it was once slower than it should be, and has not been seen since."""
        return self._is_stale


class ComputeScale:
    """How far the record is off now: measured over expected compute, in the middle and on the high side.

    The high side is what plans are made with, so that `percentile` percent of requests keep their TPOT. That is a mean
    over the tokens of a request, and means vary less than steps do: where single steps are spread like a normal
    distribution, the mean of n is below that percentile as often as a step is below the quantile whose deviation is
    1/sqrt(n) of it. For 99 percent of requests of `_TOKENS` it is the 79th percentile of steps.
    """

    def __init__(self, percentile: float = 99.0) -> None:
        self._recent: deque[float] = deque([1.0] * 3, maxlen=24)
        self.middle = self.high = 1.0
        self.percentile = percentile

    @property
    def percentile(self) -> float:
        """Of requests, in percent: how many are to keep their objectives."""
        return self._percentile

    @percentile.setter
    def percentile(self, percent: float) -> None:
        normal, self._percentile = NormalDist(), percent
        self._quantile = normal.cdf(normal.inv_cdf(percent / 100) / math.sqrt(_TOKENS)) if percent < 100 else 1.0
        self._update()

    def add(self, ratio: float) -> None:
        """Takes in one step. One alone changes little."""
        self._recent.append(ratio)
        self._update()

    def forget_worst(self) -> None:
        """For what such steps are said to take none is run: unless that is forgotten it stays so for ever."""
        self._recent.remove(max(self._recent))
        self._recent = self._recent or deque([1.0], maxlen=self._recent.maxlen)
        self._update()

    def _update(self) -> None:
        ordered = sorted(self._recent)
        self.middle = ordered[len(ordered) // 2]
        self.high = ordered[min(len(ordered) - 1, int(len(ordered) * self._quantile))]
