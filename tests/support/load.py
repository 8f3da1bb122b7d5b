"""Clients that ask over HTTP while things fail, and compare every answer with what the model itself computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.replica.detokenizer import Detokenizer
from deployments.routing.prefixes import prefix_hashes
from tests.support.waiting import wait_until

TIMEOUT_S = 150
NUM_CLIENTS = {"whole": 2, "stream": 2}
LOAD_TOKENS, LONG_TOKENS = 8, 80
PROMPTS = [f"request number {number}" for number in range(4)]
# From 128 bytes on replicas report which prompts they have let in: so long requests can be found.
_FILLER = ", which goes on for long enough to be told from every other one by its first hundred and twenty-eight bytes"


class Reference:
    """Greedy answers, computed by transformers with nothing of this project but the way tokens become text."""

    def __init__(self, checkpoint: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    @torch.no_grad()
    def text(self, prompt: str, num_tokens: int) -> str:
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        detokenizer, past, text = Detokenizer(self._tokenizer, prompt_ids), None, ""
        ids = torch.tensor([prompt_ids])
        for _ in range(num_tokens):
            output = self._model(ids, past_key_values=past, use_cache=True)
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            text += detokenizer.push([int(ids)])
        return text + detokenizer.finish()


@dataclass(kw_only=True)
class Answer:
    """What a client has got so far. `error` is the body or the event that says why there is no more."""

    prompt: str
    is_stream: bool
    model: str = "tiny"
    status: int | None = None
    retry_after: str | None = None
    text: str = ""
    error: dict[str, Any] | None = None
    is_complete: bool = False

    def read(self, client: httpx.Client, num_tokens: int) -> None:
        """Asks, and reads to the end."""
        body = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.is_stream,
        }
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                self.status, self.retry_after = response.status_code, response.headers.get("Retry-After")
                if response.status_code != 200:
                    self.error = json.loads(response.read())["error"]
                elif self.is_stream:
                    self._read_events(response)
                else:
                    self.text = json.loads(response.read())["choices"][0]["text"]
                    self.is_complete = True
        except httpx.HTTPError as error:
            self.error = {"code": "connection", "message": repr(error)}

    def _read_events(self, response: httpx.Response) -> None:
        for line in filter(None, response.iter_lines()):
            event = line.removeprefix("data: ")
            if event == "[DONE]":
                self.is_complete = True
            elif "error" in (message := json.loads(event)):
                self.error = message["error"]
            else:
                self.text += message["choices"][0]["text"]

    def problem(self, expected: str) -> str | None:
        """What is wrong: other text than expected, or an end that is none. An error that says so is not."""
        if self.is_complete and self.text == expected and self.error is None:
            return None
        if not self.is_complete and self.error is not None and expected.startswith(self.text):
            return None
        return f"{self} instead of {expected!r}"


def http_client(base_url: str) -> httpx.Client:
    return httpx.Client(base_url=base_url, timeout=TIMEOUT_S, trust_env=False)


class Load:
    """Clients that ask one thing after another, half of them for streams, from `with` to its end or `stop`."""

    def __init__(self, base_url: str, reference: Reference) -> None:
        self.base_url, self.reference = base_url, reference
        self.num_answers = 0
        self.wrong: list[str] = []
        self._lost: list[Answer] = []
        self._expected = {prompt: reference.text(prompt, LOAD_TOKENS) for prompt in PROMPTS}
        self._should_end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(kind == "stream", number))
            for kind, count in NUM_CLIENTS.items()
            for number in range(count)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when every client has its last answer. Idempotent."""
        self._should_end.set()
        for thread in self._threads:
            thread.join()

    def take_lost(self) -> list[Answer]:
        """Requests that ended with an error since this was last asked."""
        lost, self._lost = self._lost, []
        return lost

    def wait_for_more(self, num_answers: int = 6) -> None:
        """Returns when there are a few more whole answers."""
        wanted = self.num_answers + num_answers
        wait_until(lambda: self.num_answers >= wanted, TIMEOUT_S, "answers")

    def _run(self, is_stream: bool, number: int) -> None:
        with http_client(self.base_url) as client:
            while not self._should_end.is_set():
                answer = Answer(prompt=PROMPTS[number % len(PROMPTS)], is_stream=is_stream)
                number += 1
                answer.read(client, LOAD_TOKENS)
                problem = answer.problem(self._expected[answer.prompt])
                if problem is not None:
                    self.wrong.append(problem)
                elif answer.is_complete:
                    self.num_answers += 1
                if answer.error is not None:
                    self._lost.append(answer)
                    self._should_end.wait(0.2)


@dataclass(eq=False)
class LongRequest:
    """A request long enough to be under way when something fails; read by a thread of its own."""

    answer: Answer
    expected: str
    thread: threading.Thread = field(init=False, repr=False)

    def start(self, base_url: str) -> None:
        self.thread = threading.Thread(target=self._read, args=(base_url,))
        self.thread.start()

    def _read(self, base_url: str) -> None:
        with http_client(base_url) as client:
            self.answer.read(client, LONG_TOKENS)

    @property
    def has_begun(self) -> bool:
        """Whether the client has seen any text."""
        return bool(self.answer.text)

    @property
    def prefix_hash(self) -> int:
        """By which a replica says that it has let this prompt in."""
        return prefix_hashes(self.answer.prompt.encode())[0]

    def end(self) -> Answer:
        """The answer, when there will be no more of it. Raises AssertionError for text that is not the model's."""
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive(), f"no end of {self.answer}"
        problem = self.answer.problem(self.expected)
        assert problem is None, problem
        return self.answer


class LongRequests:
    """Long requests with prompts that nobody has used before."""

    def __init__(self, base_url: str, reference: Reference) -> None:
        self._base_url, self._reference = base_url, reference
        self._number = 0

    def start(self, *are_streams: bool) -> list[LongRequest]:
        """One for each, all at once. What the model itself answers takes as long as a request: it comes first."""
        requests = [self._next(is_stream=each) for each in are_streams]
        for request in requests:
            request.start(self._base_url)
        return requests

    def _next(self, *, is_stream: bool) -> LongRequest:
        self._number += 1
        prompt = f"long request number {self._number:03d}{_FILLER}"
        return LongRequest(Answer(prompt=prompt, is_stream=is_stream), self._reference.text(prompt, LONG_TOKENS))


def hosts(requests: Sequence[LongRequest], prefixes: dict[str, tuple[int, ...]]) -> dict[LongRequest, str]:
    """Which replica has which request, by the prompts that each replica says it has let in."""
    return {
        request: replica_id
        for request in requests
        for replica_id, there in prefixes.items()
        if request.prefix_hash in there
    }
