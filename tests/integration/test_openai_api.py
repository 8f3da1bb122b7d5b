"""The OpenAI client against a running server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.integration.conftest import MODEL
from tests.support.tiny_checkpoint import MAX_MODEL_LEN
from tests.support.tokenizers_in_process import byte_level_tokenizer

PROMPT = "The quick brown fox"
MESSAGES: list[dict[str, object]] = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "select-n")
    assert model.max_model_len == MAX_MODEL_LEN
    assert client.models.retrieve(MODEL) == model


def test_chat(client):
    completion = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    (choice,) = completion.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    tokenizer = byte_level_tokenizer()
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert completion.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert completion.usage.completion_tokens == 24
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 24


def test_a_streamed_chat_is_the_same_in_pieces(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    chunks = list(
        client.chat.completions.create(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-2]} == {None}
    assert chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_from_text_list_and_tokens_agree(client):
    ids = byte_level_tokenizer()(PROMPT)["input_ids"]
    prompts = (PROMPT, [PROMPT], ids, [ids])
    answers = [client.completions.create(prompt=prompt, **GREEDY) for prompt in prompts]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert {answer.usage.prompt_tokens for answer in answers} == {len(ids)}


def test_a_streamed_completion_is_the_same_in_pieces(client):
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_seed_gives_the_same_answer_again(client):
    def answer(seed: int) -> str:
        settings = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 1.5}
        return client.completions.create(seed=seed, **settings).choices[0].text

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(client, stream):
    whole = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    answer = client.completions.create(prompt=PROMPT, stop=["never found", stop], stream=stream, **GREEDY)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_chat_without_max_tokens_gets_the_default(client):
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage.completion_tokens == 256


def test_a_completion_without_max_tokens_gets_what_is_left(client):
    settings = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
    assert client.completions.create(prompt=PROMPT, **settings).usage.completion_tokens == 16
    answer = client.completions.create(prompt=[5] * (MAX_MODEL_LEN - 1), **settings)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "length")


def test_an_assistants_turn_may_come_back_as_another_server_wrote_it(client):
    turns: list[dict[str, object]] = [
        *MESSAGES,
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "and then?"},
    ]
    plain = client.chat.completions.create(messages=turns, **GREEDY)
    turns[1] = {**turns[1], "annotations": [], "tool_calls": [], "reasoning_content": "", "refusal": None}
    assert client.chat.completions.create(messages=turns, **GREEDY).choices == plain.choices


def test_the_wire_format_of_a_stream(http):
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 3}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert json.loads(lines[-2][6:])["choices"][0]["delta"] == {}


def test_many_streams_at_once_are_each_as_one_alone(client):
    """Of different lengths, so that they end while others run; characters of several tokens are cut by steps."""
    prompts = [f"{index} {PROMPT} ろ🦊" for index in range(32)]

    def settings(index: int) -> dict:
        return {**GREEDY, "prompt": prompts[index], "max_tokens": 8 + 3 * index}

    def streamed(index: int) -> tuple[str, str]:
        chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **settings(index))]
        assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
        return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason

    alone = [client.completions.create(**settings(index)).choices[0] for index in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, range(32)))
    assert together == [(choice.text, choice.finish_reason) for choice in alone]


def test_a_request_may_name_its_own_objectives(client):
    answer = client.completions.create(
        model=MODEL, prompt="one", max_tokens=3, extra_body={"slo": {"ttft_ms": 80_000, "tpot_ms": 8000}}
    )
    assert answer.usage.completion_tokens <= 3


def test_health(http):
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert http.head("/health").status_code == 200


def test_the_list_of_models_with_a_slash_at_its_end(http):
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.head(f"/v1/models/{MODEL}").status_code == 200


def test_the_schema_says_what_a_body_is(http):
    paths = http.get("/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "max_tokens", "slo"} <= schema["properties"].keys()
    assert "$ref" not in json.dumps(schema)


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"temperature": 3}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
            ({"messages": [{"role": "user", "content": "x " * MAX_MODEL_LEN}]}, "messages"),
            ({"seed": 2**63}, "seed"),
            ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"n": 2}, "n"),
            ({"extra_body": {"slo": {"tpot_ms": 1}}}, "slo.tpot_ms"),
            ({"extra_body": {"slo": {"ttft_ms": -1}}}, "slo.ttft_ms"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_400_names_the_field(self, client, fields, param, stream):
        request = {"model": MODEL, "messages": MESSAGES, "stream": stream, **fields}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**request)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["message"]

    @pytest.mark.parametrize(
        ("prompt", "param"), [("", "prompt"), ([], "prompt"), ([10**6], "prompt"), ([-1], "prompt[0]")]
    )
    def test_400_for_prompts_without_meaning(self, client, prompt, param):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=prompt)
        assert caught.value.param == param

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
            ({"prompt": "x" * 19_000}, "prompt"),
            ({"prompt": "x " * 600}, "prompt"),
            ({"prompt": "x", "max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ],
    )
    def test_what_can_never_fit_is_said_to_be_too_long(self, client, fields, param):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, **fields)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)

    def test_the_template_says_why_it_refuses(self, client):
        with pytest.raises(openai.BadRequestError, match="the first turn must not be the assistant's"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "assistant", "content": "x"}])

    def test_404_for_another_model(self, client):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError, match="this server serves 'tiny'"):
            client.models.retrieve("org/gpt-9")

    @pytest.mark.parametrize(
        ("method", "path", "content", "status", "code"),
        [
            ("GET", "/v1/nothing", None, 404, "not_found"),
            ("GET", "/v1/completions", None, 405, "method_not_allowed"),
            ("POST", "/v1/completions", b'{"model": ', 400, "invalid_json"),
            ("POST", "/v1/completions", b"[]", 400, "invalid_value"),
            ("POST", "/v1/completions", rb'{"model": "tiny", "prompt": "\ud83d"}', 400, "invalid_value"),
            ("POST", "/v1/completions", rb'{"model": "\ud83d", "prompt": "x"}', 400, "invalid_value"),
            ("POST", "/v1/completions", rb'{"\ud83d": 1}', 400, "invalid_value"),
            ("OPTIONS", "/v1/completions", None, 405, "method_not_allowed"),
            ("POST", "/v1/completions", b'"' + b"x" * 30_000 + b'"', 413, "body_too_large"),
        ],
    )
    def test_every_failure_has_the_openai_shape(self, http, method, path, content, status, code):
        headers = {"Content-Type": "application/json"}
        response = http.request(method, path, content=content, headers=headers)
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert error["message"]
        assert (response.headers.get("Allow") == "POST") == (status == 405)

    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"Content-Type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
            ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "unsupported_encoding"),
        ],
    )
    def test_415_names_the_header(self, http, headers, code):
        response = http.post("/v1/completions", content=b'{"model": "tiny", "prompt": "x"}', headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, code)
        assert next(value for value in reversed(headers.values())) in response.json()["error"]["message"]
