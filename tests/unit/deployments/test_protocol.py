"""Requests: what is served is read right, what is not is refused by name."""

from __future__ import annotations

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from deployments.errors import ApiError, invalid_body, refused
from deployments.messages import ChatMessage, Refused
from deployments.protocol import NEUTRAL_VALUES, ChatCompletionRequest, ChatDelta, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: object) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({**CHAT, **fields})


def problem(request: type, body: dict) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        request.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return invalid_body(RequestValidationError(errors))


def test_the_apis_defaults():
    sampling = chat().sampling(None)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "safety_identifier"])
def test_fields_that_change_nothing_are_ignored(name):
    assert chat(**{name: "anything"}) == chat()


@pytest.mark.parametrize(("name", "values"), NEUTRAL_VALUES.items())
def test_unserved_fields_may_say_off(name, values):
    for value in (None, *values):
        assert chat(**{name: value}) == chat()


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
    ],
)
def test_unserved_fields_that_change_the_answer_are_refused_by_name(name, value):
    error = problem(ChatCompletionRequest, {**CHAT, name: value})
    assert (error.status, error.param) == (400, name)
    assert str(error) == f"{name} is not served by this server"


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
    assert problem(ChatCompletionRequest, body).param.startswith("messages[0].content")


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
            {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None},
            ChatMessage(role="assistant", content="a"),
        ),
    ],
)
def test_turns_as_the_template_sees_them(message, expected):
    assert chat(messages=[message]).messages[0].to_chat_message() == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ([], ())],
)
def test_prompts(prompt, expected):
    assert CompletionRequest.model_validate({**COMPLETION, "prompt": prompt}).prompt == expected


def test_the_newer_name_of_max_tokens_wins():
    assert chat(max_tokens=3).output_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).output_tokens == 5


def test_one_stop_string_is_a_list_of_one():
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b"]).stop == ("a", "b")


def test_a_chunk_says_only_what_is_new():
    assert ChatDelta(content="x").model_dump() == {"content": "x"}
    assert ChatDelta().model_dump_json() == "{}"


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        ("invalid", 400, "invalid_request_error"),
        ("overloaded", 429, "rate_limit_error"),
        ("unavailable", 503, "server_error"),
    ],
)
def test_refusals(kind, status, error_type):
    error = refused(Refused(kind=kind, message="m", field="f" if kind == "invalid" else None))
    assert error.status == status
    assert error.body().error.type == error_type
    assert ("Retry-After" in error.response().headers) == (status != 400)
