"""Fields of a wrong type or out of range: each is refused before anything else is asked, by name, in plain words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from deployments.api.errors import ApiError
from deployments.api.protocol import ChatCompletionRequest, CompletionRequest
from deployments.http.body import parsed_body
from tests.support.bodies import problem

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
KINDS = ((ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION))
NO_NUMBERS = [True, False, "5", "nan", "", [1], {"a": 1}]
OUT_OF_RANGE = {
    "max_tokens": [0, -1, 2**31, 10**400, 5.0, 1.5, math.inf, math.nan],
    "temperature": [-0.1, 2.1, 1e39, 10**400, math.inf, -math.inf, math.nan],
    "top_p": [0, -1, 1.1, math.inf, math.nan],
    "top_k": [-2, 2**63, 5.0, 2.5, math.inf, math.nan],
    "seed": [2**63, -(2**63) - 1, 1.0, math.nan],
    "n": [0, 2, 1.0, math.nan],
}
TAKEN: dict[str, list[float]] = {
    "max_tokens": [1, 2**31 - 1],
    "temperature": [0, 2, 0.7],
    "top_p": [1, 0.01],
    "top_k": [0, 2**63 - 1],
    "seed": [2**63 - 1, -(2**63)],
    "n": [1],
}


@pytest.mark.parametrize(("kind", "least"), KINDS)
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_is_a_number_in_its_range(kind, least, name):
    for value in OUT_OF_RANGE[name] + NO_NUMBERS:
        error = problem(kind, {**least, name: value})
        assert (error.param, error.code) == (name, "invalid_value"), value
        assert str(error).startswith(f"{name}: expected "), value
        assert len(str(error)) < 200
    for value in TAKEN[name]:
        assert getattr(parsed_body(json.dumps({**least, name: value}).encode(), kind), name) == value


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms"])
def test_objectives_are_numbers(name):
    for value in [0, -1, 1e10, math.inf, math.nan, *NO_NUMBERS]:
        assert problem(ChatCompletionRequest, {**CHAT, "slo": {name: value}}).param == f"slo.{name}"


@pytest.mark.parametrize("name", ["stream", "ignore_eos", "stream_options.include_usage"])
def test_a_flag_is_true_or_false(name):
    for value in ("yes", "true", "", 1, 0, 1.0, [True]):
        outer, _, inner = name.partition(".")
        error = problem(ChatCompletionRequest, {**CHAT, outer: {inner: value} if inner else value})
        assert str(error) == f"{name}: expected true or false"


def test_json_that_is_no_number_to_others_is_refused_by_name():
    data = b'{"model": "m", "prompt": "hi", "temperature": 1e999}'
    with pytest.raises(ApiError, match=r"temperature: expected a number, at least 0, at most 2, not inf"):
        parsed_body(data, CompletionRequest)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: is empty: expected at least one token"),
        ([], "prompt: is empty: expected at least one token"),
        ([""], "prompt[0]: is empty: expected at least one token"),
        ([[]], "prompt[0]: is empty: expected at least one token"),
        ([5, -1], "prompt[1]: expected at least 0"),
        ([5, 2**31], "prompt[1]: expected at most 2147483647"),
        ([5, 10**30], "prompt[1]: expected at most 2147483647"),
        ([[5, -1]], "prompt[0][1]: expected at least 0"),
        ([[[1]]], "prompt[0][0]: expected a whole number"),
        ([[1, "2"]], "prompt[0][1]: expected a whole number"),
        ([1.0], "prompt[0]: expected a whole number"),
        ([{}], "prompt[0]: expected a whole number"),
        ([None], "prompt[0]: expected a whole number"),
        ([[1], [2]], "prompt: only one prompt per request is served"),
        (5, "prompt: expected text, or a list of token ids"),
    ],
)
def test_a_prompt_is_text_or_token_ids_and_not_empty(prompt, message):
    error = problem(CompletionRequest, {**COMPLETION, "prompt": prompt})
    assert str(error) == message
    assert error.param == message.partition(":")[0]


WRONG_FOR_SOME: tuple[object, ...] = (5, "x", True, 1.5, [], {}, [[]], [{}], ["x", 5], {"a": 1})


def wrong_bodies() -> list[tuple[type, dict[str, Any]]]:
    """Every field, at every depth, with values of every other type, and without what is required."""
    found: list[tuple[type, dict[str, Any]]] = []
    for kind, least in KINDS:
        found += [(kind, {**least, name: value}) for name in kind.model_fields for value in WRONG_FOR_SOME]
        found += [(kind, {name: value for name, value in least.items() if name != left_out}) for left_out in least]
    turns: list[dict[str, object]] = [
        {"role": "user", "content": "x", name: value} for name in ("role", "content") for value in WRONG_FOR_SOME
    ]
    parts: list[object] = [
        {"type": "text", "text": "x", name: value} for name in ("type", "text") for value in WRONG_FOR_SOME
    ]
    turns.append({"role": "user"})
    turns += [{"role": "user", "content": [part]} for part in [*parts, {}, 5, {"type": "text"}]]
    return found + [(ChatCompletionRequest, {**CHAT, "messages": [turn]}) for turn in turns]


def test_no_message_is_about_python():
    messages = set()
    for kind, body in wrong_bodies():
        try:
            parsed_body(json.dumps(body).encode(), kind)
        except ApiError as error:
            messages.add(str(error))
    assert len(messages) > 40
    python = ("tuple", "dictionary", "instance", "Message", "Input", "Unable", "String", "valid", "integer", "List")
    assert [each for each in messages if any(word in each for word in python)] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": 5}, "messages: expected a list"),
        ({"messages": [5]}, "messages[0]: expected an object"),
        ({"slo": 5}, "slo: expected an object"),
        ({"model": 5}, "model: expected text"),
        ({"stop": 5}, "stop: expected text, or a list of texts"),
        ({"stop": [5]}, "stop[0]: expected text"),
        ({"max_tokens": "5"}, "max_tokens: expected a whole number, at least 1, at most 2147483647, not text"),
        ({"temperature": True}, "temperature: expected a number, at least 0, at most 2, not true"),
        ({"n": 2}, "n: expected 1, not 2"),
    ],
)
def test_what_was_expected_is_said_plainly(body, message):
    assert str(problem(ChatCompletionRequest, {**CHAT, **body})) == message


@pytest.mark.parametrize("name", ["<a>", "<text>", "<list>", "<batch>"])
def test_a_name_in_angle_brackets_is_a_name(name):
    assert problem(ChatCompletionRequest, {**CHAT, name: 1}).param == name
    turn = {"role": "user", "content": "x", name: 1}
    assert problem(ChatCompletionRequest, {**CHAT, "messages": [turn]}).param == f"messages[0].{name}"
    with pytest.raises(ApiError) as caught:
        parsed_body(b'{"metadata": {"%s": "\\ud83d"}}' % name.encode(), ChatCompletionRequest)
    assert caught.value.param == f"metadata.{name}"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a\r\nb", r"a\r\nb"),
        ("a\x00\x1b[31m\x7f", r"a\x00\x1b[31m\x7f"),
        ("a\u2028\x85b", r"a\u2028\x85b"),
        ("\u202eabc", r"\u202eabc"),
        ("naïve 名", "naïve 名"),
        ("{param}{message}{what}", "{param}{message}{what}"),
        ("\n" * 100, r"\n" * 32 + "..."),
        ("x" * 65, "x" * 64 + "..."),
    ],
)
def test_what_is_not_printed_is_escaped_wherever_a_name_is_shown(name, plain):
    error = problem(ChatCompletionRequest, {**CHAT, name: 1})
    assert error.param == plain
    assert f"unknown field '{plain}'" in str(error)
    part = {"type": name, "text": "x"}
    body = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
    assert f"a part of type '{plain}'" in str(problem(ChatCompletionRequest, body))


def test_a_path_of_any_length_is_not_repeated_whole():
    depth = 900
    data = b'{"metadata": ' + b'{"%s": ' % (b"x" * 64) * depth + rb'"\ud83d"' + b"}" * depth + b"}"
    with pytest.raises(ApiError) as caught:
        parsed_body(data, ChatCompletionRequest)
    assert caught.value.param is not None
    assert len(caught.value.param) < 300
    assert caught.value.param.startswith("metadata.xxxx")
    assert len(str(caught.value)) < 500


def test_the_ranges_are_read_without_torch():
    code = "import sys, deployments.api.protocol, deployments.http.body; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
