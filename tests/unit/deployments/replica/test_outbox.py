"""An outbox: whatever is put, taken and forgotten in between, every character leaves once and in order."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import Finished
from deployments.replica.outbox import Outbox

END = Finished(reason="length", num_output_tokens=3)
INBOXES = st.integers(1, 3)
ACTIONS = st.lists(
    st.tuples(st.just("put"), INBOXES, st.text("ab", max_size=3))
    | st.tuples(st.just("end"), INBOXES)
    | st.tuples(st.just("forget"), INBOXES)
    | st.tuples(st.just("take")),
    max_size=40,
)


@given(ACTIONS)
def test_each_text_leaves_once_in_order_and_merged(actions) -> None:
    outbox = Outbox()
    put, left, ended = defaultdict[int, str](str), defaultdict[int, str](str), dict[int, int]()

    def take() -> None:
        pieces = outbox.take()
        assert len({inbox for inbox, _, _ in pieces}) == len(pieces) <= 3
        for inbox, text, end in pieces:
            left[inbox] += text
            if end is not None:
                ended[inbox] += 1
        assert left == {inbox: put[inbox] for inbox in left}

    for name, *given_ in actions:
        if name == "take":
            take()
        elif name == "forget":
            outbox.forget(given_[0])
            put[given_[0]] = left[given_[0]]  # the rest is not wanted
            ended[given_[0]] = 1
        elif given_[0] not in ended:
            text, end = (given_[1], None) if name == "put" else ("", END)
            outbox.put(given_[0], text, end)
            put[given_[0]] += text
            if end is not None:
                ended[given_[0]] = 0
    take()
    assert all(times == 1 for times in ended.values())
    assert {inbox: text for inbox, text in put.items() if text} == {inbox: text for inbox, text in left.items() if text}
    assert not outbox


def test_nothing_follows_an_end() -> None:
    outbox = Outbox()
    outbox.put(1, "a", END)
    with pytest.raises(AssertionError):
        outbox.put(1, "b", None)
