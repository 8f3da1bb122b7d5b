"""Decisions in plain words."""

from __future__ import annotations

import pytest

from deployments.routing.admission_facts import ADMISSION_REASONS
from deployments.status import words
from deployments.status.words import explanation, shown
from selectn_core.decision_log import LoggedDecision
from selectn_core.offload.control import LIMITS
from selectn_core.offload.interval_facts import INTERVAL_VERDICTS
from tests.support.statuses import admission_decision, interval_decision


def test_every_reason_and_every_verdict_has_its_words() -> None:
    assert set(words.INTERVAL_REASONS) == set(LIMITS)
    assert set(words.INTERVAL_VERDICTS) == set(INTERVAL_VERDICTS)
    assert set(words.ADMISSION_REASONS) == set(ADMISSION_REASONS)


def test_an_interval_decision_says_what_was_known_decided_why_and_what_would_have_changed_it() -> None:
    said = explanation(interval_decision())
    assert said.decision.summary == "k 15 to 12 of 30: steps would take 231 ms as it was, the objective allows 190 ms"
    assert said.known.startswith("The step had 9 tokens; 8 requests decoded; they had 1,600 keys; it might take 190 ms")
    assert "the coordinator allowed 2 GB/s of the bus" in said.known
    assert said.decided == "To offload fewer: k 15 to 12 of 30, through 2 slots."
    assert said.why.startswith(
        "Steps would have taken 231 ms under the plan that held, and 190 ms were allowed. It does"
    )
    assert "latency objective" in said.why
    assert "looser TPOT objective" in said.otherwise


def test_the_sentence_is_about_what_limits_it() -> None:
    assert shown(interval_decision(held_s=0.1)).summary.endswith("the objective allows steps of 190 ms")
    assert shown(interval_decision("queue")).summary.endswith("short steps serve those who wait: 190 ms")
    assert shown(interval_decision("memory")).summary.endswith(
        "requests need the memory that this frees, and no more than that"
    )
    assert shown(interval_decision(held_s=None)).summary.endswith("longer than the latency objective allows")
    assert shown(interval_decision(k_before=12)).summary.startswith("k 12 of 30: ")


def test_an_urgent_one_says_so() -> None:
    assert "guaranteed" in explanation(interval_decision(is_urgent=1.0)).decided


def test_a_refusal_says_by_how_much_it_was_late() -> None:
    said = explanation(admission_decision())
    # 1200 before it + 775 of margin + 500 of its own + 300 that were promised already - 400/s for 1.5 s
    assert said.otherwise.endswith(" 2,175 tokens fewer before it would have let it in.")
    assert said.decided == "To refuse it, and to have it come again after 4 s."
    assert "its first token was wanted within 2 s" in said.known


def test_what_was_not_looked_at_is_not_mentioned() -> None:
    said = explanation(admission_decision("queue_full", before_tokens=None, spread_tokens=None, free_tokens=None))
    assert "margin" not in said.known
    assert "tokens fewer" not in said.otherwise


@pytest.mark.parametrize("kind", ["interval", "admission", "scaling"])
def test_what_it_does_not_know_it_shows_as_it_is(kind) -> None:
    """Of a newer version, or of a kind that nothing decides yet."""
    decision = LoggedDecision(
        id=f"{kind[0]}-x-1", kind=kind, unix_s=0.0, verdict="other", reason="news", inputs={"n": 1.0}
    )
    assert "news" in shown(decision).summary
    assert "news" in explanation(decision).why.lower()
