"""The log of decisions: bounded, numbered, and in words only for who asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from selectn_core.decision_log import PREFIXES, DecisionLog, id_of, parts_of


@dataclass
class Counted:
    """Facts that count how often they are looked at."""

    value: float
    num_looks: int = 0
    verdict: str = "stay"
    reason: str = "objective"
    request_id: str | None = None

    @property
    def inputs(self) -> Mapping[str, float | None]:
        self.num_looks += 1
        return {"value": self.value, "nothing": None}


def test_it_keeps_the_latest_and_their_numbers() -> None:
    now_s = [0.0]
    log = DecisionLog("interval", capacity=3, clock=lambda: now_s[0])
    for number in range(1, 6):
        now_s[0] = float(number)
        assert log.add(Counted(float(number))) == number
    assert [each.id for each in log.latest("r")] == ["i-r-5", "i-r-4", "i-r-3"]
    assert [each.unix_s for each in log.latest("r", 2)] == [5.0, 4.0]
    assert log.find("r", "i-r-2") is None, "it is not kept any more"
    found = log.find("r", "i-r-4")
    assert found is not None
    assert (found.inputs["value"], found.kind) == (4.0, "interval")


def test_whoever_decides_waits_for_no_words() -> None:
    log, facts = DecisionLog("admission"), Counted(1.0)
    log.add(facts)
    assert facts.num_looks == 0
    log.latest("a")
    assert facts.num_looks == 1


def test_a_place_answers_for_its_own_only() -> None:
    log = DecisionLog("interval")
    log.add(Counted(1.0))
    assert log.find("r", "i-other-1") is None
    assert log.find("r", "a-r-1") is None


def test_what_is_endless_is_no_number() -> None:
    log = DecisionLog("interval")
    log.add(Counted(math.inf))
    assert log.latest("r")[0].inputs == {"value": None, "nothing": None}


def test_an_id_names_kind_and_place() -> None:
    for kind in PREFIXES:
        assert parts_of(id_of(kind, "a-b", 12)) == (kind, "a-b")
    for wrong in ("", "i", "i-", "i-r", "i-r-", "i--1", "x-r-1", "i-r-1x", "i-r--", "i-r-\u00b2"):
        assert parts_of(wrong) is None, wrong
