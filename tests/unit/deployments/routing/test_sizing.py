"""What a request will take, estimated without a tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import ChatMessage, GenerateRequest, Sampling
from deployments.routing.prefixes import prefix_hashes
from deployments.routing.sizing import PromptSizes, prompt_bytes


def request(prompt, max_tokens: int | None = 10) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt=prompt, sampling=Sampling(max_tokens=max_tokens))


def test_token_ids_are_counted_exactly():
    ask = PromptSizes(256).ask(request((1, 2, 3)), 1.0)
    assert (ask.tokens, ask.prompt_tokens, ask.least_tokens, ask.ttft_s) == (13, 3, 13, 1.0)


def test_text_is_certain_to_need_its_output_only():
    ask = PromptSizes(256).ask(request("x" * 1000))
    assert ask.least_tokens == 11
    assert ask.tokens > 100


def test_without_max_tokens_the_default_is_taken_and_cut_to_what_is_possible():
    sizes = PromptSizes(256)
    assert sizes.ask(request((1,) * 100, None)).tokens == 356
    assert sizes.ask(request((1,) * 100, None), longest_tokens=200).tokens == 200


@pytest.mark.parametrize("max_tokens", [None, 10, 2**31 - 1])
@pytest.mark.parametrize("prompt", [(1,) * 100, (1,) * 5000, "x" * 100_000])
def test_nobody_is_charged_more_than_a_request_may_have(prompt, max_tokens):
    ask = PromptSizes(256).ask(request(prompt, max_tokens), longest_tokens=200)
    assert ask.tokens <= 200
    assert ask.least_tokens == PromptSizes(256).ask(request(prompt, max_tokens)).least_tokens, "it is refused by this"


@given(st.floats(0.1, 1.0))
def test_estimates_follow_what_is_counted(tokens_per_byte):
    sizes, prompt = PromptSizes(256), request("x" * 2000)
    for _ in range(100):
        sizes.counted(prompt, round(2000 * tokens_per_byte))
    assert abs(sizes.ask(prompt).prompt_tokens - 2000 * tokens_per_byte) <= 0.1 * 2000 * tokens_per_byte + 2


@given(st.lists(st.text(max_size=300), min_size=1, max_size=4), st.text(max_size=300))
def test_a_conversation_that_goes_on_keeps_its_prefixes(turns, more):
    messages = tuple(ChatMessage(role="user", content=text) for text in turns)
    before = prefix_hashes(prompt_bytes(request(messages)))
    after = prefix_hashes(prompt_bytes(request((*messages, ChatMessage(role="user", content=more)))))
    assert after[: len(before)] == before


@given(st.lists(st.integers()))
def test_any_token_ids_have_bytes(ids):
    assert isinstance(prompt_bytes(request(tuple(ids))), bytes)
