"""Counters never go back, and labels never grow without bound."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from cluster.metrics.meters import OTHER, BoundedLabels, Meters
from tests.support.meters import Kept, KeptMeters


def test_labels_do_not_grow_without_bound() -> None:
    labels = BoundedLabels(2)
    assert [labels.admit(name) for name in ("a", "b", "c", "a", "d", "b")] == [True, True, False, True, False, True]


def test_a_million_values_of_a_label_are_a_few_series() -> None:
    meters = KeptMeters("ingress", max_values=4)
    for number in range(1_000_000):
        meters.add("selectn_admissions", 1, verdict=f"reason-{number}")
    values = meters._made["selectn_admissions"].values
    assert len(values) == 5
    assert values[(OTHER,)] == 1_000_000 - 4


@given(st.lists(st.integers(0, 100), max_size=20))
def test_a_total_that_begins_again_counts_on(steps: list[int]) -> None:
    meters, counted, total = KeptMeters("replica", model_name="m"), 0, 0
    for step in steps:
        if step > 90:  # what is counted elsewhere has begun again
            total = 0
        total += step
        counted += step
        meters.total("vllm_num_preemptions", total)
    assert (meters.of("vllm_num_preemptions") or 0) <= counted
    assert (meters.of("vllm_num_preemptions") or 0) >= total


def test_nothing_is_added_where_nothing_has_come() -> None:
    meters = KeptMeters("replica", model_name="m")
    meters.add("vllm_generation_tokens", 0)
    meters.total("vllm_num_preemptions", 0)
    assert meters.told == set()


class AtStart(Kept):
    """Also keeps the 0 with which a counter begins."""

    begun: ClassVar[set[tuple[str, ...]]] = set()

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.begun.add((self.metric.name, *(tags or {}).values()))
        super().inc(value, tags)


def test_counters_are_there_from_the_start_with_the_labels_that_will_come() -> None:
    """A counter that appears with a value has not grown, to Prometheus: a first burst would be missed."""
    AtStart.begun = set()
    Meters("replica", {"model_name": "m"}, make=AtStart)
    Meters("ingress", make=AtStart)
    assert AtStart.begun >= {
        ("vllm_num_preemptions",),
        ("selectn_slo_requests", "both", "false"),
        ("selectn_ingress_unserved_requests", "refused", "false"),
        ("vllm_request_success", "error"),
    }
