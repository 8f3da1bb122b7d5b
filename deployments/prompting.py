"""A request's prompt to token ids, by the model's own tokenizer and chat template."""

from __future__ import annotations

from typing import Any

import jinja2

from deployments.messages import ChatMessage, GenerateRequest
from selectn_core.errors import RequestError


def encode_prompt(tokenizer: Any, request: GenerateRequest) -> list[int]:
    """The prompt's token ids. Raises RequestError for a prompt this model cannot be given.

    Slow for long prompts, so not for an event loop; holds no state, but a tokenizer is not thread-safe.
    """
    if isinstance(request.prompt, str):
        ids = tokenizer(request.prompt)["input_ids"]
    elif request.prompt and isinstance(request.prompt[0], ChatMessage):
        ids = _encode_chat(tokenizer, request.prompt)
    else:
        ids = _checked_ids(tokenizer, request.prompt)
    if not ids:
        raise RequestError("the prompt has no tokens", field="prompt")
    return list(ids)


def _encode_chat(tokenizer: Any, messages: tuple[Any, ...]) -> list[int]:
    if tokenizer.chat_template is None:
        raise RequestError("this model has no chat template; use /v1/completions with a prompt", field="messages")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        # Templates refuse what they cannot render, e.g. two user turns in a row, by raising with a reason.
        raise RequestError(f"the chat template refused the messages: {error}", field="messages") from None
    # The template has written the special tokens itself.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _checked_ids(tokenizer: Any, ids: tuple[Any, ...]) -> tuple[int, ...]:
    vocab_size = len(tokenizer)
    if any(not 0 <= each < vocab_size for each in ids):
        raise RequestError(f"prompt: token ids must be 0 to {vocab_size - 1}", field="prompt")
    return ids
