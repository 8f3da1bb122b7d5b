"""A request's prompt to token ids, by the model's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from deployments.messages import ChatMessage, GenerateRequest
from deployments.prompt_length import TextBound
from selectn_core.errors import RequestError, RequestTooLarge

# Tokenised within a few hundredths of a second, template included.
MAX_SHORT_CHARS = 2**15


class PromptEncoder:
    """Prompts to token ids, in two threads: one for short prompts, one for long ones, which keep no short one waiting.

    Both use one tokenizer, which two threads may read at once as long as neither sets its truncation or padding:
    transformers does so at the first call, which is made here.
    """

    def __init__(self, tokenizer: Any, bound: TextBound | None = None) -> None:
        """What is beyond `bound` is refused before it is tokenised."""
        self._tokenizer, self._bound = tokenizer, bound
        self._short = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize-long")
        tokenizer("a")

    async def encode(self, request: GenerateRequest) -> list[int]:
        """`encode_prompt`, off the event loop."""
        threads = self._short if num_chars(request) <= MAX_SHORT_CHARS else self._long
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, encode_prompt, self._tokenizer, request, self._bound)

    def close(self) -> None:
        """Drops what waits."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)


def num_chars(request: GenerateRequest) -> int:
    """Characters of a prompt, or of all its turns; of token ids their number."""
    if isinstance(request.prompt, str):
        return len(request.prompt)
    return sum(len(part.content) if isinstance(part, ChatMessage) else 1 for part in request.prompt)


def encode_prompt(tokenizer: Any, request: GenerateRequest, bound: TextBound | None = None) -> list[int]:
    """The prompt's token ids. Raises RequestError for a prompt this model cannot be given.

    Slow for long prompts, so not for an event loop. A text beyond `bound` is RequestTooLarge at once.
    """
    if isinstance(request.prompt, str):
        ids = _tokenized(tokenizer, request.prompt, bound, field="prompt")
    elif request.prompt and isinstance(request.prompt[0], ChatMessage):
        # The template has written the special tokens itself.
        text = _rendered(tokenizer, request.prompt)
        ids = _tokenized(tokenizer, text, bound, field="messages", add_special_tokens=False)
    else:
        ids = list(_checked_ids(tokenizer, request.prompt))
    if not ids:
        raise RequestError("the prompt has no tokens", field="prompt")
    return ids


def _tokenized(tokenizer: Any, text: str, bound: TextBound | None, *, field: str, **options: Any) -> list[int]:
    refusal = bound.refusal(text) if bound is not None else None
    if refusal is not None:
        raise RequestTooLarge(refusal, field=field)
    return tokenizer(text, **options)["input_ids"]


def _rendered(tokenizer: Any, messages: tuple[Any, ...]) -> str:
    template = tokenizer.chat_template
    if template is None:
        raise RequestError("this model has no chat template; use /v1/completions with a prompt", field="messages")
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(sorted(template))
        raise RequestError(
            f"this model has several chat templates ({names}) and none is the default; "
            "use /v1/completions with a prompt",
            field="messages",
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        # Templates refuse what they cannot render, e.g. two user turns in a row, by raising with a reason.
        raise RequestError(f"the chat template refused the messages: {error}", field="messages") from None
    except Exception as error:  # a template is a program: whatever its expressions raise. What they say may be content
        raise RequestError(
            f"the model's chat template cannot render these messages: {type(error).__name__}", field="messages"
        ) from None


def _checked_ids(tokenizer: Any, ids: tuple[Any, ...]) -> tuple[int, ...]:
    vocab_size = len(tokenizer)
    if any(not 0 <= each < vocab_size for each in ids):
        raise RequestError(f"prompt: token ids must be 0 to {vocab_size - 1}", field="prompt")
    return ids
