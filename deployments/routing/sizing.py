"""What a request will take, before the replica that has the tokenizer has seen it."""

from __future__ import annotations

from deployments.messages import ChatMessage, GenerateRequest
from deployments.routing.ask import Ask
from deployments.routing.prefixes import prefix_hashes

# Until a replica has said how many tokens a prompt had: few texts have more.
FIRST_TOKENS_PER_BYTE = 0.3
TEMPLATE_TOKENS_PER_MESSAGE = 8
SMOOTHING = 0.1


def prompt_bytes(request: GenerateRequest) -> bytes:
    """The prompt as bytes; equal beginnings of conversations are equal beginnings of these."""
    if isinstance(request.prompt, str):
        return request.prompt.encode(errors="replace")
    return b"".join(
        f"{part.role}\0{part.content}\0".encode(errors="replace")
        if isinstance(part, ChatMessage)
        else part.to_bytes(8, "big", signed=True)
        for part in request.prompt
        if isinstance(part, ChatMessage) or abs(part) < 1 << 62
    )


class PromptSizes:
    """Tokens of prompts, estimated by their bytes, and better so with every prompt that was counted."""

    def __init__(self, default_max_tokens: int) -> None:
        self._default_max_tokens = default_max_tokens
        self._tokens_per_byte = FIRST_TOKENS_PER_BYTE

    def ask(self, request: GenerateRequest, ttft_s: float | None = None, longest_tokens: int | None = None) -> Ask:
        """What the request needs: exact for token ids, an estimate for text, whose replica counts again.

        `longest_tokens` is what a request may have at all: for more than that nobody is charged, as it is refused.
        """
        data, max_tokens = prompt_bytes(request), request.sampling.max_tokens
        default = request.sampling.default_max_tokens or self._default_max_tokens
        exact = prompt_tokens = _exact(request)
        if prompt_tokens is None:
            prompt_tokens = 1 + round(len(data) * self._tokens_per_byte) + _template_tokens(request)
        tokens = prompt_tokens + (default if max_tokens is None else max_tokens)
        return Ask(
            request_id=request.request_id,
            tokens=tokens if longest_tokens is None else min(tokens, longest_tokens),
            least_tokens=(1 if exact is None else exact) + (1 if max_tokens is None else max_tokens),
            prompt_tokens=prompt_tokens,
            ttft_s=ttft_s,
            prefixes=prefix_hashes(data),
            model=request.model,
        )

    def counted(self, request: GenerateRequest, num_prompt_tokens: int) -> None:
        """The replica has counted the prompt's tokens."""
        num_bytes = len(prompt_bytes(request))
        if _exact(request) is None and num_bytes:
            ratio = max(0, num_prompt_tokens - _template_tokens(request)) / num_bytes
            self._tokens_per_byte += SMOOTHING * (min(1.5, ratio) - self._tokens_per_byte)


def _exact(request: GenerateRequest) -> int | None:
    is_ids = not isinstance(request.prompt, str) and not any(isinstance(p, ChatMessage) for p in request.prompt)
    return len(request.prompt) if is_ids else None


def _template_tokens(request: GenerateRequest) -> int:
    return 0 if isinstance(request.prompt, str) else TEMPLATE_TOKENS_PER_MESSAGE * len(request.prompt)
