"""Which replica a request goes to, whatever the reports say, and however late they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.routing.ask import Ask
from deployments.routing.board import DOOR_REQUESTS, Board
from deployments.routing.headroom_report import HeadroomReport, Promise
from deployments.routing.prefixes import MAX_PREFIXES, RecentPrefixes, prefix_hashes
from tests.support.clock import Clock
from tests.support.routing import others

ME = "me"
STALE_AFTER_S = 5.0


def report(replica_id: str, capacity: int = 1000, **fields: Any) -> HeadroomReport:
    values = {"reported_s": 1.0, "longest_request_tokens": 2000, "max_requests": 8, **fields}
    return HeadroomReport(replica_id=replica_id, kv_capacity_tokens=capacity, **values)


def ask(request_id: str = "r", tokens: int = 100, **fields: Any) -> Ask:
    values = {"prompt_tokens": tokens // 2, "least_tokens": tokens, **fields}
    return Ask(request_id=request_id, tokens=tokens, **values)


def board_of(*reports: HeadroomReport, clock: Clock | None = None) -> Board:
    board = Board(ME, stale_after_s=STALE_AFTER_S, clock=clock or Clock())
    board.observe({each.replica_id: each for each in reports})
    return board


def ranked(board: Board, wanted: Ask) -> list[str]:
    return [standing.replica_id for standing in board.rank(wanted)]


def test_tokens_are_not_free_where_no_more_requests_may_run():
    full = report("full", promises=others(100, 2), max_requests=2)
    assert board_of(full, report("roomy", promises=others(100, 1), max_requests=2)).free_tokens() == 900


def test_tokens_at_doors_are_those_that_have_not_begun():
    board = board_of(report("a", promises=others(1000)))
    board.place(ask("r1", 70))
    assert board.door_tokens() == 70
    board.begun("r1")
    assert board.door_tokens() == 0


def test_the_objective_is_the_loosest_that_a_replica_has_now():
    clock = Clock()
    board = Board(ME, stale_after_s=STALE_AFTER_S, clock=clock)
    assert (board.ttft_s, board.ttft_range_s) == (None, None)
    board.observe({"a": report("a"), "new": None})
    assert (board.ttft_s, board.ttft_range_s) == (None, None)
    slow = report("slow", ttft_s=4.0, tightest_ttft_s=2.0, loosest_ttft_s=8.0)
    fast = report("fast", ttft_s=2.0, tightest_ttft_s=1.0, loosest_ttft_s=4.0)
    board.observe({"slow": slow, "fast": fast, "a": report("a"), "new": None})
    assert (board.ttft_s, board.ttft_range_s) == (4.0, (1.0, 8.0))
    clock.now_s = STALE_AFTER_S + 1
    board.observe({"slow": slow, "fast": replace(fast, reported_s=2.0, ttft_s=1.0)})
    assert (board.ttft_s, board.ttft_range_s) == (1.0, (1.0, 4.0))
    clock.now_s *= 3
    assert (board.ttft_s, board.ttft_range_s) == (4.0, None), "nobody has said anything else since"


class TestRanking:
    def test_most_room_comes_first(self):
        board = board_of(report("a", promises=others(600)), report("b", promises=others(100)))
        assert ranked(board, ask()) == ["b", "a"]

    def test_capacity_counts_not_the_number_of_requests(self):
        board = board_of(report("small", 500), report("large", 2000, promises=others(1000, requests=5)))
        assert ranked(board, ask())[0] == "large"

    def test_what_was_just_sent_is_debited_at_once_and_credited_at_the_end(self):
        board = board_of(report("a"), report("b", promises=others(300)))
        assert board.place(ask("1", 700)) == "a"
        assert board.place(ask("2", 700)) == "b"
        assert not any(standing.fits for standing in board.rank(ask("3", 500)))
        board.end("1")
        assert board.rank(ask("3", 500))[0].replica_id == "a"

    def test_own_requests_in_a_report_are_not_counted_twice(self):
        board = board_of(report("a"))
        board.place(ask("1", 600))
        mine = Promise(origin=ME, tokens=600, requests=1, sequence=1)
        board.observe({"a": report("a", reported_s=2.0, promises=(mine,))})
        assert board.rank(ask("2", 400))[0].fits
        assert not board.rank(ask("2", 401))[0].fits
        board.place(ask("2", 300))  # after the report
        assert board.rank(ask("3", 100))[0].room_tokens == 100
        board.end("1")  # and this one has ended since
        assert board.rank(ask("3", 100))[0].room_tokens == 700

    def test_no_more_requests_than_run_at_once(self):
        board = board_of(report("a", max_requests=2, promises=others(10, requests=2)))
        assert not board.rank(ask(tokens=1))[0].fits

    def test_an_empty_replica_takes_a_request_longer_than_what_many_may_have(self):
        assert board_of(report("a", 1000)).rank(ask(tokens=1500))[0].fits

    def test_never_to_one_that_can_never_hold_it_or_is_stopping(self):
        board = board_of(report("a", longest_request_tokens=99), report("b", is_draining=True), report("c"))
        assert ranked(board, ask()) == ["c"]
        assert board.could_hold(ask())
        assert not board.could_hold(ask(tokens=5000))
        assert board.longest_request_tokens() == 2000

    def test_a_model_is_looked_for_where_it_is_served_or_may_be(self):
        board = board_of(report("a", model="old"), report("b", 500, model="new", longest_request_tokens=50))
        board.observe({**{name: board._seen[name].report for name in "ab"}, "c": None})
        assert ranked(board, ask(model="old")) == ["a", "c"]
        assert ranked(board, ask(model="new", tokens=50)) == ["b", "c"]
        assert ranked(board, ask(tokens=50)) == ["a", "b", "c"]
        board.forget("c")
        assert [board.has_model(name) for name in ("old", "new", "other")] == [True, True, False]
        assert not board.could_hold(ask(model="new", tokens=60)), "the other one's limit is none of its"
        assert (board.longest_request_tokens("new"), board.longest_request_tokens()) == (50, 2000)

    def test_what_the_model_itself_cannot_do_is_for_a_replica_to_say(self):
        board = board_of(report("a", longest_request_tokens=99, is_model_limit=True))
        assert ranked(board, ask()) == ["a"]

    def test_prefixes_decide_where_room_is_equal_and_only_there(self):
        prompt = prefix_hashes(b"x" * 600)
        equal = board_of(report("a"), report("b", 990, prefixes=prompt))
        assert ranked(equal, ask(prefixes=prompt)) == ["b", "a"]
        unequal = board_of(report("a"), report("b", promises=others(500), prefixes=prompt))
        assert ranked(unequal, ask(prefixes=prompt)) == ["a", "b"]

    def test_one_that_would_be_late_comes_after_one_that_would_not(self):
        late = report("late", 1000, waiting_prefill_tokens=2000, prefill_s_per_token=0.001)
        board = board_of(late, report("b", 300, prefill_s_per_token=0.001))
        assert ranked(board, ask(ttft_s=1.0)) == ["b", "late"]
        assert ranked(board, ask()) == ["late", "b"]

    def test_one_that_misses_its_objective_comes_after_one_that_does_not(self):
        board = board_of(report("slow", 1000, slack=-0.1), report("b", 500, slack=0.1))
        assert ranked(board, ask()) == ["b", "slow"]

    def test_a_full_replica_has_one_of_us_at_its_door(self):
        board = board_of(report("a", promises=others(1000, requests=4)))
        assert board.place(ask("1")) == "a"
        assert board.place(ask("2")) is None
        board.begun("1")
        assert board.place(ask("2")) == "a"

    def test_a_smaller_one_may_wait_beside_it_and_pass(self):
        board = board_of(report("a", promises=others(1000, requests=4)))
        assert board.place(ask("1", 100)) == "a"
        assert board.place(ask("2", 100)) is None
        assert board.place(ask("3", 99)) == "a"
        assert board.place(ask("4", 10)) is None, "no more than one"
        board.begun("3")
        assert board.place(ask("4", 10)) == "a"

    def test_where_places_are_what_is_short_being_smaller_does_not_help(self):
        board = board_of(report("a", promises=others(200, requests=8)))
        assert board.place(ask("1", 100)) == "a"
        assert board.place(ask("2", 50)) is None

    def test_of_a_replica_that_says_nothing_nobody_knows_whether_one_may_pass(self):
        board = board_of()
        board.observe({"a": None})
        assert board.place(ask("1", 100)) == "a"
        assert board.place(ask("2", 10)) is None

    def test_order_is_the_place_first_and_the_rest_behind(self):
        board = board_of(report("a"), report("b"), report("c", 300))
        placed = board.place(ask("1"))
        order = board.order("1")
        assert order[0] == placed
        assert sorted(order) == ["a", "b", "c"]
        assert board.replica_of("1") == placed
        board.moved("1", "c")
        assert board.order("1")[0] == board.replica_of("1") == "c"
        assert board.replica_of("unknown") is None
        board.forget("c")
        assert "c" not in board.order("1")
        assert board.order("unknown") == []

    def test_excluded_replicas_are_not_picked(self):
        board = board_of(report("a"), report("b"))
        assert board.place(ask("1", excluded=frozenset("a"))) == "b"
        assert board.place(ask("2", excluded=frozenset("ab"))) is None


class TestMissingAndStaleReports:
    def test_without_any_report_requests_go_one_after_the_other_to_each_door(self):
        board = Board(ME, stale_after_s=STALE_AFTER_S, clock=Clock())
        board.observe({"a": None, "b": None})
        assert {board.place(ask("1")), board.place(ask("2"))} == {"a", "b"}
        assert board.place(ask("3")) is None
        board.begun("1")
        assert board.place(ask("3")) is not None

    def test_a_stale_report_counts_as_none_but_for_what_never_fits(self):
        clock = Clock()
        board = board_of(report("a"), report("b", longest_request_tokens=10), clock=clock)
        clock.now_s = STALE_AFTER_S + 1
        (standing,) = board.rank(ask())
        assert (standing.replica_id, standing.room_tokens, standing.fits) == ("a", None, False)
        assert board.drain_tokens_per_s() is None

    def test_the_same_report_again_is_not_news(self):
        clock = Clock()
        board = board_of(report("a"), clock=clock)
        clock.now_s = STALE_AFTER_S + 1
        board.observe({"a": report("a")})
        assert board.rank(ask())[0].room_tokens is None
        board.observe({"a": report("a", reported_s=2.0)})
        assert board.rank(ask())[0].room_tokens == 1000

    def test_an_unknown_replica_comes_before_a_full_one_and_after_one_with_room(self):
        board = board_of(report("full", 10, promises=others(10)), report("free"))
        board.observe({"full": report("full", 10, promises=others(10)), "free": report("free"), "new": None})
        assert ranked(board, ask()) == ["free", "new", "full"]

    def test_no_replicas_no_place(self):
        assert Board(ME, stale_after_s=1, clock=Clock()).place(ask()) is None

    @given(
        st.dictionaries(
            st.sampled_from([*HeadroomReport.__dataclass_fields__, "zzz"]),
            st.none() | st.text() | st.integers() | st.lists(st.integers()),
        )
    )
    def test_anything_that_is_no_report_is_none_or_one(self, values):
        found = HeadroomReport.from_json({**report("a").to_json(), **values})
        assert found is None or isinstance(found, HeadroomReport)

    def test_a_report_survives_the_way(self):
        sent = report("a", promises=others(3), prefixes=(1, 2), slack=0.5, drain_tokens_per_s=7.0)
        assert HeadroomReport.from_json(sent.to_json()) == sent
        assert HeadroomReport.from_json({}) is None
        for name in ("drain_tokens_per_s", "reported_s", "slack"):
            for value in (float("nan"), float("inf")):
                assert HeadroomReport.from_json({**sent.to_json(), name: value}) is None

    def test_a_report_that_names_its_model_arrives_whole(self):
        sent = report("a", model="m", max_model_len=8, model_created_unix_s=3)
        assert HeadroomReport.from_json(sent.to_json()) == sent
        for wrong in ({"model": 1}, {"max_model_len": -1}, {"model_created_unix_s": 0.5}):
            assert HeadroomReport.from_json({**sent.to_json(), **wrong}) is None

    def test_an_objective_is_a_time_and_may_be_endless(self):
        sent = report("a", ttft_s=0.5, tightest_ttft_s=0.25, loosest_ttft_s=float("inf"))
        assert HeadroomReport.from_json(sent.to_json()) == sent
        for name in ("ttft_s", "tightest_ttft_s", "loosest_ttft_s"):
            for value in (0.0, -1.0, float("nan"), "1"):
                assert HeadroomReport.from_json({**sent.to_json(), name: value}) is None


def test_a_callers_share_of_what_drains_is_its_share_of_what_is_promised():
    drained = report("a", drain_tokens_per_s=100.0, promises=others(300))
    board = board_of(drained)
    assert board.drain_tokens_per_s() == 50.0  # of two callers
    board.place(ask("1", 900))
    assert board.drain_tokens_per_s() == 75.0


@given(st.binary(max_size=2000), st.binary(max_size=500), st.binary(max_size=500))
def test_equal_beginnings_have_equal_hashes(common, left, right):
    shared = [each for each in prefix_hashes(common + left) if each in prefix_hashes(common + right)]
    assert len(shared) >= len(prefix_hashes(common))
    assert len(prefix_hashes(common * 1000)) <= 8


def test_recent_prefixes_are_bounded_and_the_latest():
    recent = RecentPrefixes(capacity=3)
    recent.add([1, 2])
    recent.add([3, 1, 4])
    assert set(recent.hashes()) == {3, 1, 4}
    read = HeadroomReport.from_json(replace(report("a"), prefixes=tuple(range(999))).to_json())
    assert read is not None
    assert len(read.prefixes) == MAX_PREFIXES


IDS = st.sampled_from(["a", "b", "c"])


class BoardMachine(RuleBasedStateMachine):
    """Requests come and go, reports come late or never: what one caller sends never exceeds what is known to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.board = Board(ME, stale_after_s=STALE_AFTER_S, clock=self.clock)
        self.reports: dict[str, HeadroomReport | None] = {}
        self.placed: dict[str, tuple[str, Ask]] = {}
        self.num = 0

    @rule(replica_id=IDS, capacity=st.integers(0, 400), taken=st.integers(0, 300), known=st.booleans())
    def report_comes(self, replica_id, capacity, taken, known):
        self.num += 1
        fields = {"promises": others(taken), "reported_s": float(self.num), "longest_request_tokens": 500}
        new = report(replica_id, capacity, **fields) if known else None
        self.reports[replica_id] = new or self.reports.get(replica_id)
        self.board.observe(self.reports)

    @rule(replica_id=IDS)
    def replica_goes(self, replica_id):
        self.reports.pop(replica_id, None)
        self.board.forget(replica_id)

    @rule(tokens=st.integers(1, 600))
    def request_comes(self, tokens):
        self.num += 1
        wanted = ask(f"r{self.num}", tokens)
        before = {each.replica_id: each for each in self.board.rank(wanted)}
        place = self.board.place(wanted)
        assert (place is None) == (not any(each.can_take for each in before.values()))
        if place is not None:
            assert before[place].can_take
            assert before[place].fits or not any(each.fits for each in before.values())
            self.placed[wanted.request_id] = (place, wanted)
            known = self.reports[place]
            assert known is None or tokens <= known.longest_request_tokens

    @rule()
    def oldest_begins(self):
        if self.placed:
            self.board.begun(next(iter(self.placed)))

    @rule()
    def oldest_ends(self):
        if self.placed:
            request_id = next(iter(self.placed))
            self.board.end(request_id)
            del self.placed[request_id]

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds):
        self.clock.now_s += seconds

    @invariant()
    def what_was_sent_is_known_by_replica_too(self):
        by_replica = {name: set(there.requests) for name, there in self.board._sent_to.items()}
        places = {place for place, _ in self.placed.values()}
        assert by_replica == {
            name: {key for key, (place, _) in self.placed.items() if place == name} for name in places
        }

    @rule(replica_id=IDS)
    def oldest_went_elsewhere(self, replica_id):
        if self.placed and replica_id in self.reports:
            request_id, (_, wanted) = next(iter(self.placed.items()))
            self.board.moved(request_id, replica_id)
            self.placed[request_id] = (replica_id, wanted)

    @invariant()
    def only_running_replicas_rank_and_free_tokens_are_not_negative(self):
        assert {each.replica_id for each in self.board.rank(ask(tokens=1))} <= set(self.reports)
        assert self.board.free_tokens() >= 0

    @invariant()
    def what_fits_leaves_room_for_it(self):
        for standing in self.board.rank(ask("next", 50)):
            mine = [sent for place, sent in self.placed.values() if place == standing.replica_id]
            if standing.fits and mine:
                known = self.reports[standing.replica_id]
                assert known is not None
                assert sum(each.tokens for each in mine) + 50 + known.promised_tokens <= known.kv_capacity_tokens
            assert standing.num_at_door <= len(mine)


TestBoard = BoardMachine.TestCase


@pytest.mark.parametrize("num_callers", [1, 3])
def test_at_most_so_many_wait_at_the_door_of_a_full_replica(num_callers):
    full = report("a", promises=(Promise(origin="x", tokens=1000, requests=8),))
    boards = [Board(f"caller{i}", stale_after_s=1, clock=Clock()) for i in range(num_callers)]
    for board in boards:
        board.observe({"a": full})
    placed = [board.place(ask(f"{i}")) for board in boards for i in range(5)]
    assert sum(place is not None for place in placed) == num_callers * DOOR_REQUESTS
