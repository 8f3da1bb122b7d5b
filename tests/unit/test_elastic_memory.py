"""Weights and KV pages share device memory: whatever moves between them, tokens stay and no byte is lost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectn_core.requests import RequestHandle
from tests.tiny_models import FAMILIES, NUM_LAYERS, tiny_model
from tests.unit.engines import CheckedEngine, engine_config, greedy, make_prompts

PROMPTS = make_prompts((3, 9, 17, 26, 33, 41))
MOST_TOKENS = 24
GIB = 1 << 30


@cache
def reference(family: str, prompt: int) -> list[int]:
    """What transformers' own `generate` gives."""
    model = tiny_model(family).model
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPTS[prompt]])
    tokens = model.generate(ids, max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=0)
    return tokens[0, ids.shape[1] :].tolist()


def build(family: str = "llama", num_offloaded: Any = 0, **batch: Any) -> CheckedEngine:
    """Resident layers leave 48 tokens to the KV cache: fewer than two of the longer requests want."""
    settings = {"kv_tokens": 48, "page_size": 4, "max_requests": 6, **batch}
    return CheckedEngine(tiny_model(family), engine_config(num_offloaded, 1, **settings))


class Script:
    """One action before each step is scheduled; the rest when nothing is left to schedule."""

    def __init__(self, engine: CheckedEngine, actions: list[tuple[str, int, int]]) -> None:
        self.requests: list[tuple[int, int, RequestHandle]] = []  # (prompt, number of tokens, handle)
        self._actions = iter(actions)
        self._engine = engine
        engine.before_schedule = lambda _: self.act()

    def act(self) -> bool:
        """Carries out the next action; False after the last."""
        kind, first, second = next(self._actions, ("end", 0, 0))
        if kind == "submit":
            prompt, num_tokens = first % len(PROMPTS), 1 + second % MOST_TOKENS
            self.requests.append((prompt, num_tokens, self._engine.submit(PROMPTS[prompt], greedy(num_tokens))))
        elif kind == "plan":
            self._engine.set_num_offloaded(first % (NUM_LAYERS + 1), 1 + second % 3)
        elif kind == "cancel" and self.requests:
            self.requests[first % len(self.requests)][2].cancel()
        return kind != "end"

    def run(self) -> Iterator[tuple[int, int, list[int], str]]:
        """(prompt, number of tokens, tokens, finish reason) of every request."""
        position = 0
        while position < len(self.requests) or self.act():
            for prompt, num_tokens, handle in self.requests[position:]:
                events = list(handle)
                tokens = [token for event in events for token in event.token_ids]
                yield prompt, num_tokens, tokens, str(events[-1].finish_reason)
                position += 1


KINDS = ("submit", "submit", "submit", "plan", "plan", "cancel", "wait")
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), min_size=5, max_size=40)


# Nothing, six sectors of llama, and enough for every request that is preempted.
HOST_KV_GIB = (0.0, 12288 / GIB, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(actions=ACTIONS, prefix_sharing=st.booleans(), kv_gib=st.sampled_from(HOST_KV_GIB))
def test_any_sequence_of_plans_requests_and_cancellations(
    family: str, actions: Any, prefix_sharing: bool, kv_gib: float
) -> None:
    engine = build(family, prefix_sharing=prefix_sharing, kv_gib=kv_gib)
    script = Script(engine, [("submit", 5, MOST_TOKENS - 1), *actions])
    script.act()
    with engine:
        for prompt, num_tokens, tokens, reason in script.run():
            assert tokens == reference(family, prompt)[: len(tokens)]
            assert reason == "cancelled" or (reason, len(tokens)) == ("length", num_tokens)
    engine.batching.check_integrity()
    assert engine.arena.weight_bytes == 0
