"""The queue: bounded, in turn, fair between keys and priorities, and nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import Priority
from deployments.routing.fair_queue import MOST_OWED, PRIORITIES, WEIGHTS, FairQueue, Flow, QueueFull

ARRIVALS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(PRIORITIES), st.integers(1, 1000)), max_size=60)


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    item: int
    key: str
    priority: Priority
    tokens: int


def entry(item: int, key: str = "a", priority: Priority = "normal", tokens: int = 100) -> Entry:
    return Entry(item=item, key=key, priority=priority, tokens=tokens)


def fill(queue: FairQueue[Entry], arrivals) -> list[Entry]:
    """The entries that are in the queue in the end, in the order of their arrival."""
    inside: list[Entry] = []
    for number, (key, priority, tokens) in enumerate(arrivals):
        each = entry(number, key, priority, tokens)
        try:
            victim = queue.push(each)
        except QueueFull:
            continue
        inside.append(each)
        if victim is not None:
            inside.remove(victim)
    return inside


def drain(queue: FairQueue[Entry]) -> list[Entry]:
    return [queue.pop() for _ in range(len(queue))]


@given(ARRIVALS, st.integers(1, 20))
def test_it_is_bounded_and_loses_nobody_else(arrivals, capacity):
    queue: FairQueue[Entry] = FairQueue(capacity)
    inside = fill(queue, arrivals)
    assert len(queue) == len(inside) <= capacity
    assert queue.num_tokens == sum(each.tokens for each in inside)
    assert sorted(each.item for each in drain(queue)) == [each.item for each in inside]


@given(ARRIVALS)
def test_first_come_first_served_within_a_key_and_priority(arrivals):
    queue: FairQueue[Entry] = FairQueue(100)
    fill(queue, arrivals)
    served = drain(queue)
    for key in "abc":
        for priority in PRIORITIES:
            mine = [each.item for each in served if (each.key, each.priority) == (key, priority)]
            assert mine == sorted(mine)


@given(st.lists(st.integers(1, 1000), min_size=60, max_size=60), st.integers(2, 4))
def test_keys_that_wait_are_served_alike(sizes, num_keys):
    """Whatever their sizes, and where smaller ones pass too: no key is ever ahead by more than one largest request."""
    queue: FairQueue[Entry] = FairQueue(1000)
    keys = [f"k{i}" for i in range(num_keys)]
    for number, tokens in enumerate(sizes):
        queue.push(entry(number, keys[number % num_keys], tokens=tokens))
    served = dict.fromkeys(keys, 0)
    waiting = {key: len(sizes) // num_keys for key in keys}
    while all(waiting.values()):
        each = queue.head(below_tokens=median(sizes)) or queue.head()
        assert each is not None
        queue.serve(each)
        served[each.key] += each.tokens
        waiting[each.key] -= 1
        assert max(served.values()) - min(served.values()) <= max(sizes)


@given(ARRIVALS, st.integers(1, 1000))
def test_the_head_below_a_size_is_the_next_keys_first_that_is_smaller(arrivals, below_tokens):
    queue: FairQueue[Entry] = FairQueue(100)
    inside = fill(queue, arrivals)
    head, found = queue.head(), queue.head(below_tokens)
    own = [each for each in inside if head is not None and (each.key, each.priority) == (head.key, head.priority)]
    assert found is next((each for each in own if each.tokens < below_tokens), None)
    if found is not None:
        queue.serve(found)
        assert found not in drain(queue)


def test_who_passes_is_served_and_its_key_comes_later_for_it():
    queue: FairQueue[Entry] = FairQueue(100)
    for number, (key, tokens) in enumerate([("a", 900), ("b", 900), ("a", 50), ("b", 50)]):
        queue.push(entry(number, key, tokens=tokens))
    smaller = queue.head(below_tokens=900)
    assert smaller is not None
    queue.serve(smaller)
    assert [each.item for each in drain(queue)] == [1, 0, 3]


def test_a_flood_of_one_key_does_not_hold_up_another():
    queue: FairQueue[Entry] = FairQueue(100)
    for number in range(50):
        queue.push(entry(number, "flood"))
    queue.push(entry(99, "other"))
    assert 99 in [queue.pop().item for _ in range(2)]


def test_a_key_that_did_not_wait_has_no_credit_for_it_and_one_that_left_keeps_its_debt():
    queue: FairQueue[Entry] = FairQueue(100)
    for number in range(10):
        queue.push(entry(number, "busy"))
    for _ in range(5):
        queue.pop()
    for number in range(20, 30):
        queue.push(entry(number, "late"))
    first = [queue.pop().key for _ in range(6)]
    assert first.count("busy") == 3


def test_a_key_that_was_away_is_owed_a_few_requests_and_no_more():
    queue: FairQueue[Entry] = FairQueue(100)
    queue.push(entry(0, "seldom"))
    for number in range(1, 50):
        queue.push(entry(number, "busy"))
    for _ in range(30):
        queue.pop()
    for number in range(50, 60):
        queue.push(entry(number, "seldom"))
    keys = [queue.pop().key for _ in range(MOST_OWED + 8)]
    assert keys[:MOST_OWED] == ["seldom"] * MOST_OWED
    assert keys[MOST_OWED:].count("seldom") in (4, 5)


def test_a_key_that_comes_less_often_has_its_share_too():
    """Keys send 6 : 3 : 1 of ten times what is served, and whoever would wait long is refused: few wait at any time."""
    rng, queue, served = random.Random(0), FairQueue[Entry](100), dict.fromkeys("abc", 0)
    coming: dict[Flow, float] = {("normal", key): 1e9 for key in "abc"}
    for number in range(20_000):
        (key,) = rng.choices("abc", (6, 3, 1))
        newcomer = entry(number, key, tokens=rng.randint(50, 150))
        queue.push(newcomer)
        if queue.tokens_before(newcomer, coming) + newcomer.tokens > 200:
            queue.discard(newcomer)
        if rng.random() < 0.1 and len(queue):
            each = queue.pop()
            served[each.key] += each.tokens
    assert min(served.values()) >= 0.9 * max(served.values())


@given(st.lists(st.sampled_from(["high", "normal"]), max_size=30))
def test_every_priority_moves_on(arrivals):
    """A low one is served within the tokens that its weight promises, however many important ones come."""
    queue: FairQueue[Entry] = FairQueue(1000)
    for number, priority in enumerate(arrivals * 3):
        queue.push(entry(number, priority=priority))
    queue.push(entry(999, priority="low"))
    most = 2 * sum(WEIGHTS.values())
    served = []
    for number in range(most):
        if not len(queue):
            break
        served.append(queue.pop().item)
        queue.push(entry(2000 + number, priority="high"))
    assert 999 in served


def test_priorities_share_by_weight():
    queue: FairQueue[Entry] = FairQueue(1000)
    for number in range(100):
        for priority in PRIORITIES:
            queue.push(entry(number, priority=priority))
    first = [queue.pop().priority for _ in range(sum(WEIGHTS.values()))]
    assert {priority: first.count(priority) for priority in PRIORITIES} == WEIGHTS


def served_for_a_while(queue: FairQueue[Entry], flows, *, times: int = 100) -> dict:
    """Tokens that each key and priority gets, of requests of 10 that never end."""
    tokens = dict.fromkeys(flows, 0)
    for key, priority in flows:
        queue.push(entry(0, key, priority, tokens=10))
    for number in range(times):
        each = queue.pop()
        tokens[(each.key, each.priority)] += each.tokens
        queue.push(entry(number, each.key, each.priority, tokens=10))
    return tokens


class TestRefund:
    @given(ARRIVALS, st.integers(0, 30), st.sampled_from("abcd"), st.sampled_from(PRIORITIES))
    def test_what_comes_of_nothing_leaves_everybodys_turn_as_it_was(self, arrivals, num_served, key, priority):
        orders = []
        for is_refused in (False, True):
            queue: FairQueue[Entry] = FairQueue(100)
            fill(queue, arrivals)
            for _ in range(min(num_served, len(queue))):
                queue.pop()
            if is_refused:
                refused = entry(999, key, priority, tokens=1000)
                queue.push(refused)
                queue.serve(refused)
                queue.refund(refused)
            orders.append([each.item for each in drain(queue)])
        assert orders[0] == orders[1]

    @pytest.mark.parametrize(
        ("flows", "ratio"),
        [
            ([("a", "normal"), ("b", "normal")], 1),
            ([("a", "normal"), ("a", "low")], 4),
            ([("a", "normal"), ("b", "low")], 4),
        ],
    )
    @pytest.mark.parametrize("after", [0, 1, 10])
    def test_who_asked_for_too_much_has_its_share_all_the_same(self, flows, ratio, after):
        queue: FairQueue[Entry] = FairQueue(100)
        key, priority = flows[0]
        large = entry(999, key, priority, tokens=1_000_000)
        queue.push(large)
        queue.serve(large)
        before = served_for_a_while(queue, flows, times=after)
        queue.refund(large)
        tokens = served_for_a_while(queue, flows)
        first, second = (before[flow] + tokens[flow] for flow in flows)
        # What other priorities got while it was charged they keep.
        lost = 10 * after if flows[0][1] != flows[1][1] else 0
        assert first == pytest.approx(ratio * (second - lost), abs=50)

    def test_who_was_alone_has_no_credit_against_those_who_come_later(self):
        queue: FairQueue[Entry] = FairQueue(100)
        large = entry(999, "a", tokens=1_000_000)
        queue.push(large)
        queue.push(entry(0, "a"))
        queue.push(entry(1, "a"))
        queue.serve(large)
        queue.pop()
        queue.refund(large)
        tokens = served_for_a_while(queue, [("a", "normal"), ("b", "normal")])
        assert abs(tokens["a", "normal"] - tokens["b", "normal"]) <= 2 * 100

    def test_a_key_that_was_forgotten_is_not_remembered_for_it(self):
        queue: FairQueue[Entry] = FairQueue(2)
        each = entry(0, "a")
        queue.push(each)
        queue.serve(each)
        for number in range(5):
            queue.push(entry(number, f"b{number}"))
            queue.pop()
        queue.refund(each)
        assert "a" not in queue._classes["normal"].left


class TestFull:
    def test_the_newest_of_the_key_with_most_goes_for_one_with_fewer(self):
        queue: FairQueue[Entry] = FairQueue(4)
        for number in range(4):
            queue.push(entry(number, "flood"))
        victim = queue.push(entry(9, "other"))
        assert victim is not None
        assert victim.item == 3
        with pytest.raises(QueueFull):
            queue.push(entry(10, "flood"))

    def test_a_lower_priority_goes_for_a_higher_but_keeps_its_share(self):
        queue: FairQueue[Entry] = FairQueue(42)
        for number in range(42):
            queue.push(entry(number, priority="low"))
        pushed_out = []
        for number in range(100, 160):
            try:
                pushed_out.append(queue.push(entry(number, priority="high")))
            except QueueFull:
                break
        left = [each for each in drain(queue) if each.priority == "low"]
        assert [each.item for each in left] == [0, 1]  # 42 * 1/21, the oldest
        assert len(pushed_out) == 40

    def test_one_that_waited_already_comes_back_to_the_front_even_then(self):
        queue: FairQueue[Entry] = FairQueue(1)
        queue.push(entry(1))
        queue.push(entry(0), front=True)
        assert [each.item for each in drain(queue)] == [0, 1]


@given(ARRIVALS, st.integers(0, 30), st.sampled_from("abcd"), st.sampled_from(PRIORITIES))
def test_tokens_before_is_what_is_served_before_if_nobody_comes(arrivals, num_served, key, priority):
    queue: FairQueue[Entry] = FairQueue(100)
    fill(queue, arrivals)
    for _ in range(min(num_served, len(queue))):
        queue.pop()
    newest = entry(999, key, priority)
    queue.push(newest)
    expected = queue.tokens_before(newest, {})
    assert expected <= queue.num_tokens - newest.tokens
    served = drain(queue)
    before = sum(each.tokens for each in served[: served.index(newest)])
    assert abs(expected - before) <= 2 * 1000  # of each other priority the request begun last counts as a mean one


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(PRIORITIES)), min_size=1, max_size=12))
def test_tokens_before_counts_who_will_come_and_be_served_sooner(flows):
    """Requests of some keys and priorities come without end: until ours is served that many tokens are, about."""
    queue: FairQueue[Entry] = FairQueue(1000)
    for number, (key, priority) in enumerate(flows):
        queue.push(entry(number, key, priority))
    ours = entry(999, "c", "normal")
    queue.push(entry(998, "c", "normal"))
    queue.push(ours)
    expected = queue.tokens_before(ours, {(priority, key): 1e9 for key, priority in flows})
    before = 0
    while (served := queue.pop()) is not ours:
        before += served.tokens
        if served.item != 998:
            queue.push(entry(served.item + 1000, served.key, served.priority))
    assert abs(expected - before) <= 100 * (2 + 2)  # one begun last of each key and of each other priority


def test_tokens_before_knows_how_many_will_come():
    queue: FairQueue[Entry] = FairQueue(100)
    queue.push(entry(0, "a"))
    ours = entry(1, "a")
    queue.push(ours)
    assert queue.tokens_before(ours, {}) == 100
    assert queue.tokens_before(ours, {("high", "b"): 50.0}) == 150
    assert queue.tokens_before(ours, {("normal", "b"): 1e9}) == 200  # as far as its own key
    assert queue.tokens_before(ours, {("normal", "a"): 1e9, ("low", "b"): 1e9}) == 100 + 100 / 4  # a fourth


def test_discarding_is_harmless_twice_and_keys_that_left_are_forgotten():
    queue: FairQueue[Entry] = FairQueue(10)
    for number in range(200):
        each = entry(number, key=f"k{number}")
        queue.push(each)
        if number % 2:
            queue.pop()
        else:
            queue.discard(each)
            queue.discard(each)
    assert len(queue) == 0
    assert all(len(each.left) <= 10 for each in queue._classes.values())


def test_an_empty_queue_has_no_head():
    queue: FairQueue[Entry] = FairQueue(1)
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.pop()
