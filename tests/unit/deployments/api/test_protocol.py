"""Requests: what is served is read right, what is not is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.api.errors import refused
from deployments.api.neutral_fields import (
    CHAT_NEUTRAL_VALUES,
    COMPLETION_NEUTRAL_VALUES,
    IGNORED_FIELDS,
    MESSAGE_NEUTRAL,
    Neutral,
)
from deployments.api.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    ChatCompletionRequest,
    ChatDelta,
    CompletionRequest,
)
from deployments.http.body import parsed_body
from deployments.messages import ChatMessage, Refused
from tests.support.bodies import problem

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: object) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({**CHAT, **fields})


def completion(**fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate({**COMPLETION, **fields})


def cases(neutral: Neutral) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in neutral.items() for value in (None, *values)]


def test_the_apis_defaults():
    sampling = chat().sampling(None)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
def test_fields_that_change_nothing_are_ignored(name):
    assert chat(**{name: "anything"}) == chat()


@pytest.mark.parametrize(("name", "value"), cases(CHAT_NEUTRAL_VALUES))
def test_fields_of_a_chat_may_say_off(name, value):
    assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(("name", "value"), cases(COMPLETION_NEUTRAL_VALUES))
def test_fields_of_a_completion_may_say_off(name, value):
    assert completion(**{name: value}) == completion()


@pytest.mark.parametrize(
    ("fields", "request_type"),
    [
        # vllm bench serve, with its own defaults
        ({"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": None, "temperature": 0}, "completion"),
        # vLLM's and SGLang's own clients
        (
            {
                **{"min_tokens": 0, "length_penalty": 1.0, "skip_special_tokens": True, "stop_token_ids": []},
                **{"spaces_between_special_tokens": True, "add_generation_prompt": True, "chat_template_kwargs": {}},
                **{"guided_json": None, "guided_regex": None, "truncate_prompt_tokens": None, "priority": 0},
                **{"prompt_logprobs": None, "ignore_eos": False, "request_id": "mine", "rid": "mine"},
            },
            "chat",
        ),
        # llama.cpp's web page
        (
            {
                **{"cache_prompt": True, "dynatemp_range": 0, "dynatemp_exponent": 1, "xtc_probability": 0},
                **{"xtc_threshold": 0.1, "typical_p": 1, "repeat_last_n": 64, "repeat_penalty": 1, "min_p": 0},
                **{
                    "n_predict": -1,
                    "dry_multiplier": 0,
                    "dry_base": 1.75,
                    "dry_penalty_last_n": -1,
                    "timings_per_token": False,
                },
            },
            "chat",
        ),
        # LangChain, LiteLLM and frameworks of agents
        (
            {
                **{"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "user": "u"},
                **{"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {"a": "b"}},
                **{"response_format": {"type": "text"}, "service_tier": "auto", "store": False, "stop": None},
            },
            "chat",
        ),
        ({"best_of": 1, "echo": False, "suffix": None, "stream_options": {"include_usage": False}}, "completion"),
    ],
)
def test_what_other_servers_clients_send_by_default_is_taken(fields, request_type):
    kind, least = (ChatCompletionRequest, CHAT) if request_type == "chat" else (CompletionRequest, COMPLETION)
    taken = parsed_body(json.dumps({**least, **fields}).encode(), kind)
    own = {"temperature"} & fields.keys()
    plain = kind.model_validate({**least, **{name: fields[name] for name in own}})
    assert taken.sampling(None) == plain.sampling(None)
    assert (taken.stop, taken.n, taken.priority, taken.include_usage) == ((), 1, "normal", False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"1": 5}),
        ("frequency_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("best_of", 2),
        ("echo", True),
        ("repetition_penalty", 1.1),
        ("min_p", 0.05),
        ("min_tokens", 1),
        ("skip_special_tokens", False),
        ("stop_token_ids", [2]),
        ("tool_choice", "required"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("add_generation_prompt", False),
        ("add_special_tokens", True),
        ("guided_json", {"type": "object"}),
        ("truncate_prompt_tokens", 5),
        ("mirostat", 2),
        ("use_beam_search", 0),  # 0 is no False
    ],
)
def test_unserved_fields_that_change_the_answer_are_refused_by_name(name, value):
    error = problem(ChatCompletionRequest, {**CHAT, name: value})
    assert (error.status, error.param) == (400, name)
    assert str(error) == f"{name} is not served by this server"


def test_all_that_is_not_served_is_named_and_the_cause_first():
    body = {**CHAT, "tool_choice": {"type": "function"}, "tools": [{"type": "function"}]}
    error = problem(ChatCompletionRequest, body)
    assert (str(error), error.param) == ("tools and tool_choice are not served by this server", "tools")


def test_no_logprobs_differ_from_those_of_the_chosen_tokens():
    assert problem(CompletionRequest, {**COMPLETION, "logprobs": 0}).param == "logprobs"


def test_a_turns_own_fields_are_named_where_they_are():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
    error = problem(ChatCompletionRequest, {**CHAT, "messages": [*CHAT["messages"], turn]})
    assert str(error) == "messages[1]: tool_calls is not served by this server"
    assert error.param == "messages[1].tool_calls"


def test_a_name_of_any_length_is_not_repeated_whole():
    error = problem(ChatCompletionRequest, {**CHAT, "x" * 100_000: 1})
    assert len(str(error)) < 200
    assert error.param is not None
    assert len(error.param) < 200


@pytest.mark.parametrize(
    ("request_type", "body", "message"),
    [
        (ChatCompletionRequest, {**CHAT, "stop": ["a"] * 5}, "stop: at most 4 are allowed, and there are 5"),
        (ChatCompletionRequest, {**CHAT, "stop": ["a" * 1025]}, "stop[0]: expected at most 1024 characters"),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{}] * (MAX_MESSAGES + 1)},
            f"messages: at most {MAX_MESSAGES} are allowed, and there are {MAX_MESSAGES + 1}",
        ),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{"role": "user", "content": [{}] * (MAX_PARTS + 1)}]},
            f"messages[0].content: at most {MAX_PARTS} are allowed, and there are {MAX_PARTS + 1}",
        ),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{"role": "user", "content": 5}]},
            "messages[0].content: expected text, or a list of text parts",
        ),
        (CompletionRequest, {**COMPLETION, "prompt": {}}, "prompt: expected text, or a list of token ids"),
        (CompletionRequest, {**COMPLETION, "prompt": [1, "2"]}, "prompt[1]: expected a whole number"),
        (CompletionRequest, {**COMPLETION, "prompt": [True]}, "prompt[0]: expected a whole number"),
        (CompletionRequest, {"model": "m"}, "prompt: is missing"),
    ],
)
def test_the_message_says_what_is_wrong(request_type, body, message):
    assert str(problem(request_type, body)) == message


def test_an_unknown_field_names_the_nearest_one():
    error = problem(ChatCompletionRequest, {**CHAT, "max_token": 3})
    assert str(error) == "unknown field 'max_token'; did you mean 'max_tokens'?"
    assert error.param == "max_token"


@pytest.mark.parametrize(
    ("request_type", "body", "param"),
    [
        (ChatCompletionRequest, {"model": "m"}, "messages"),
        (ChatCompletionRequest, {**CHAT, "messages": []}, "messages"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "user"}]}, "messages[0].content"),
        (ChatCompletionRequest, {**CHAT, "n": 2}, "n"),
        (ChatCompletionRequest, {**CHAT, "max_tokens": 0}, "max_tokens"),
        (ChatCompletionRequest, {**CHAT, "max_tokens": 10**400}, "max_tokens"),
        (ChatCompletionRequest, {**CHAT, "max_completion_tokens": 2**31}, "max_completion_tokens"),
        (CompletionRequest, {**COMPLETION, "max_tokens": 2**31}, "max_tokens"),
        (ChatCompletionRequest, {**CHAT, "temperature": "hot"}, "temperature"),
        (ChatCompletionRequest, {**CHAT, "stop": ["a"] * 5}, "stop"),
        (ChatCompletionRequest, {**CHAT, "stop": ""}, "stop[0]"),
        (ChatCompletionRequest, {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        (CompletionRequest, {"model": "m"}, "prompt"),
        (CompletionRequest, {**COMPLETION, "prompt": ["a", "b"]}, "prompt"),
        (CompletionRequest, {**COMPLETION, "suffix": "x"}, "suffix"),
    ],
)
def test_the_field_at_fault_is_named(request_type, body, param):
    assert problem(request_type, body).param == param


def test_no_message_repeats_the_prompt():
    secret = "the-secret-prompt"
    image = {"type": "image_url", "image_url": secret}
    body = {**CHAT, "messages": [{"role": "user", "content": [image]}]}
    assert secret not in problem(ChatCompletionRequest, body).body().model_dump_json()


def test_an_image_is_refused_where_it_is():
    body = {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    error = problem(ChatCompletionRequest, body)
    assert error.param == "messages[0].content[0]"
    assert "a part of type 'image_url' is not served" in str(error)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "a"}, ChatMessage(role="user", content="a")),
        ({"role": "developer", "content": "a", "name": "x"}, ChatMessage(role="system", content="a")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ChatMessage(role="user", content="ab"),
        ),
        (
            {"role": "assistant", "content": "a", **dict.fromkeys(MESSAGE_NEUTRAL)},
            ChatMessage(role="assistant", content="a"),
        ),
        (
            {"role": "assistant", "content": None, **{n: values[0] for n, values in MESSAGE_NEUTRAL.items() if values}},
            ChatMessage(role="assistant", content=""),
        ),
        ({"role": "assistant"}, ChatMessage(role="assistant", content="")),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}],
            },
            ChatMessage(role="user", content="a"),
        ),
    ],
)
def test_turns_as_the_template_sees_them(message, expected):
    assert chat(messages=[message]).messages[0].to_chat_message() == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ([2**31 - 1], (2**31 - 1,))],
)
def test_prompts(prompt, expected):
    assert CompletionRequest.model_validate({**COMPLETION, "prompt": prompt}).prompt == expected


def test_the_newer_name_of_max_tokens_wins():
    assert chat(max_tokens=3).output_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).output_tokens == 5


def test_one_stop_string_is_a_list_of_one():
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b"]).stop == ("a", "b")


def test_what_is_generated_by_default():
    assert chat().sampling(None).default_max_tokens is None
    assert completion().sampling(None).default_max_tokens == 16


def test_a_chunk_says_only_what_is_new():
    assert ChatDelta(content="x").model_dump() == {"content": "x"}
    assert ChatDelta().model_dump_json() == "{}"


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        ("invalid", 400, "invalid_request_error"),
        ("overloaded", 429, "rate_limit_error"),
        ("unavailable", 503, "server_error"),
        ("too_large", 400, "invalid_request_error"),
    ],
)
def test_refusals(kind, status, error_type):
    error = refused(Refused(kind=kind, message="m", field="f" if kind == "invalid" else None))
    assert (error.code == "context_length_exceeded") == (kind == "too_large")
    assert error.status == status
    assert error.body().error.type == error_type
    assert ("Retry-After" in error.response().headers) == (status != 400)
