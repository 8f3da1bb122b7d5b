"""An ingress's metrics: what admission said, and how long requests waited for it, as Ray's metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cluster.metrics.meters import Meters

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class IngressMetrics:
    """Hears of admissions (`AdmissionEvents`), and sets gauges once a second for as long as the process lives."""

    def __init__(self, meters: Meters, num_waiting: Callable[[], int], num_replicas: Callable[[], int]) -> None:
        """`num_waiting` requests wait for a place, on `num_replicas` replicas that are known; from any thread."""
        self._meters, self._num_waiting, self._num_replicas = meters, num_waiting, num_replicas
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def admitted(self, waited_s: float) -> None:
        self._meters.add("selectn_admissions", 1, verdict="admitted")
        self._meters.observe("selectn_ingress_queue_seconds", waited_s)

    def started(self, ttft_s: float) -> None:
        self._meters.observe("selectn_ingress_time_to_first_token_seconds", ttft_s)

    def refused(self, reason: str, status: int) -> None:
        self._meters.add("selectn_admissions", 1, verdict=reason)
        self._meters.add("vllm_admission_rejections", 1, reason=reason)
        if status in (429, 503):  # offered, and not served: `Offered.refused`
            self._meters.add("selectn_ingress_unserved_requests", 1, outcome="refused", met="false")

    def given_up(self, *, met: bool | None) -> None:
        self._meters.add("selectn_admissions", 1, verdict="given_up")
        if met is not None:
            self._meters.add("selectn_ingress_unserved_requests", 1, outcome="cancelled", met=str(met).lower())

    def publish(self) -> None:
        """Sets the gauges."""
        self._meters.set("selectn_ingress_waiting_requests", self._num_waiting())
        self._meters.set("selectn_ingress_known_replicas", self._num_replicas())

    def _run(self) -> None:
        never, is_failing = threading.Event(), False
        while not never.wait(PERIOD_S):
            try:
                self.publish()
                is_failing = False
            except Exception:
                if not is_failing:
                    logger.exception("this ingress's metrics are not published")
                is_failing = True
