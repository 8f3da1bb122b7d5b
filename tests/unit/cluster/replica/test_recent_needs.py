"""What requests need is kept for a while: those that come and go make no new demand."""

from __future__ import annotations

from cluster.replica.recent_needs import RecentNeeds


def test_what_requests_want_rises_at_once_and_falls_when_it_has_fallen_far():
    needs, asked = RecentNeeds(), []
    for wanted in (1, 8, 7, 9, 8, 7, 0):
        needs.add(needed=0, wanted=wanted)
        asked.append(needs.wanted)
    assert asked == [2, 10, 10, 11, 11, 11, 0]


def test_what_was_guaranteed_counts_for_ten_reports_more():
    needs = RecentNeeds()
    needs.add(needed=3, wanted=0)
    for _ in range(9):
        needs.add(needed=1, wanted=0)
        assert needs.needed == 3
    needs.add(needed=1, wanted=0)
    assert needs.needed == 1
