"""From prompts to token ids: what a template or a length refuses, and that long prompts keep no short one waiting."""

from __future__ import annotations

import asyncio
import copy
import threading
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.messages import ChatMessage, GenerateRequest, ModelCard
from deployments.prompt_length import TextBound, text_bound
from deployments.replica.prompting import MAX_SHORT_CHARS, PromptEncoder, encode_prompt
from deployments.replica.replica import check_length
from selectn_core.errors import RequestError, RequestTooLarge
from selectn_core.weights.embedded_model import embedded_model_directory
from tests.support.tokenizers_in_process import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZERS = {"byte level": byte_level_tokenizer, "byte fallback": byte_fallback_tokenizer}
# Characters that some tokenizers drop, merge or compose.
texts = st.text(st.sampled_from("ab \n\t\x04\x13é́ᾂ世🦊=#")) | st.text()


def chat(*contents: str) -> GenerateRequest:
    turns = tuple(ChatMessage(role="user", content=content) for content in contents)
    return GenerateRequest(request_id="r", prompt=turns)


def text(prompt: str) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt=prompt)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "cannot render these messages: TypeError"),
        ("{{ 1 / (messages | length - 1) }}", "cannot render these messages: ZeroDivisionError"),
        ("{{ messages[0].content | round('x') }}", "cannot render these messages: TypeError"),
        ("{{ messages[0].content | fromjson }}", "refused the messages"),
        ("{{ missing.field }}", "refused the messages"),
        ("{% for %}", "refused the messages"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot render these messages: OverflowError"),
        ({"tool_use": "a", "rag": "b"}, "several chat templates (rag, tool_use) and none is the default"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_fails_is_a_request_error(template: Any, message: str) -> None:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = template
    with pytest.raises(RequestError) as caught:
        encode_prompt(tokenizer, chat("a secret"))
    assert message in str(caught.value)
    assert caught.value.field == "messages"
    assert "secret" not in str(caught.value)


def test_one_of_several_templates_is_the_default() -> None:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    expected = encode_prompt(tokenizer, chat("hello"))
    tokenizer.chat_template = {"tool_use": "a", "default": tokenizer.chat_template}
    assert encode_prompt(tokenizer, chat("hello")) == expected


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@given(texts, st.integers(0, 40))
def test_no_text_that_fits_is_refused_by_its_length(make, prompt, times) -> None:
    tokenizer = make()
    num_tokens = len(tokenizer(prompt * times, add_special_tokens=False)["input_ids"])
    bound = text_bound(tokenizer, num_tokens)
    assert bound is not None
    assert bound.refusal(prompt * times) is None


def variant(*, normalizer: Any = None, pre_tokenizer: Any = None, token: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(byte_level_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*([pre_tokenizer] if pre_tokenizer else []), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if token is not None:
        backend.add_special_tokens([token])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


VARIANTS = {
    "NFC": variant(normalizer=normalizers.NFC()),
    "NFKC and lower case": variant(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "strip": variant(normalizer=normalizers.Strip()),
    "white space": variant(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "swallowing": variant(token=AddedToken("ab", lstrip=True, rstrip=True)),
}


@pytest.mark.parametrize("tokenizer", VARIANTS.values(), ids=VARIANTS)
@given(texts, st.integers(0, 40))
def test_nor_by_one_that_drops_white_space_or_composes(tokenizer, prompt, times) -> None:
    num_tokens = len(tokenizer(prompt * times, add_special_tokens=False)["input_ids"])
    bound = text_bound(tokenizer, num_tokens)
    assert bound is not None
    assert bound.refusal(prompt * times) is None


def bytes_alone(normalizer: Any) -> PreTrainedTokenizerFast:
    """Every byte is a token, and there is no other."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("tokenizer", "prompt"),
    [
        (VARIANTS["swallowing"], f"{' ' * 5000}ab{' ' * 5000}"),
        (VARIANTS["white space"], f"{' ' * 5000}x{' ' * 5000}"),
        (VARIANTS["strip"], f"{' ' * 5000}x{' ' * 5000}"),
        (bytes_alone(normalizers.NFC()), unicodedata.normalize("NFD", "\u1f82") * 10),
    ],
)
def test_what_becomes_few_tokens_is_counted_as_that(tokenizer, prompt) -> None:
    num_tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert num_tokens < len(prompt)
    bound = text_bound(tokenizer, num_tokens)
    assert bound is not None
    assert bound.refusal(prompt) is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        variant(normalizer=normalizers.Replace("ab", "")),
        variant(normalizer=normalizers.StripAccents()),
        variant(pre_tokenizer=pre_tokenizers.Split("a", "removed")),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))),
        object(),
    ],
)
def test_where_a_token_may_stand_for_anything_there_is_no_bound(tokenizer) -> None:
    assert text_bound(tokenizer, 10) is None


def test_the_embedded_models_tokenizer_has_a_bound() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(embedded_model_directory()))
    bound = text_bound(tokenizer, 8192)
    assert bound is not None
    assert bound.refusal("x" * (1 << 20)) is not None
    assert bound.refusal("\x04" * (1 << 20)) is None, "it has no token for this character, and drops it"


def test_what_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    class Unused:
        chat_template = None

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("tokenised")

    with pytest.raises(RequestTooLarge, match="11 characters; no text of more than 10 fits"):
        encode_prompt(Unused(), text("x" * 11), TextBound(max_chars=10))
    tokenizer = byte_level_tokenizer()
    with pytest.raises(RequestTooLarge) as caught:
        encode_prompt(tokenizer, chat("x" * 101), TextBound(max_chars=100))
    assert caught.value.field == "messages"


def test_a_card_carries_the_bound() -> None:
    bound = text_bound(byte_level_tokenizer(), 100)
    assert ModelCard(name="m", max_model_len=100, created_unix_s=0, text_bound=bound).text_bound == bound


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    begun, let_go = threading.Event(), threading.Event()

    class Slow:
        """The tokenizer, which long texts hold up."""

        def __call__(self, prompt: str, **options: Any) -> Any:
            if len(prompt) > MAX_SHORT_CHARS:
                begun.set()
                assert let_go.wait(20)
            return byte_level_tokenizer()(prompt, **options)

    async def check() -> None:
        prompts = PromptEncoder(Slow())
        long = [asyncio.create_task(prompts.encode(text("x" * (MAX_SHORT_CHARS + 1)))) for _ in range(3)]
        while not begun.is_set():
            await asyncio.sleep(0)
        assert await prompts.encode(text("hello"))
        assert not any(each.done() for each in long)
        let_go.set()
        assert len({tuple(each) for each in await asyncio.gather(*long)}) == 1
        prompts.close()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_both_threads_may_use_one_tokenizer_that_had_its_own_truncation() -> None:
    """What a tokenizer's file says of truncation and padding is unset at the first call: in use it could not be."""
    backend = Tokenizer.from_str(byte_level_tokenizer().backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    async def check() -> None:
        prompts = PromptEncoder(tokenizer)
        assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == (None, None)
        short, long = "hello world " * 3, "hello world " * 10_000
        asked = [prompts.encode(text(prompt)) for prompt in [short] * 20 + [long] * 2]
        answers = await asyncio.gather(*asked)
        plain = byte_level_tokenizer()
        assert answers[0] == plain(short)["input_ids"]
        assert answers[-1] == plain(long)["input_ids"]
        prompts.close()

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "field"),
    [(10, 90, None), (99, None, None), (100, None, "prompt"), (10, 91, "max_tokens"), (101, 1, "prompt")],
)
def test_what_is_longer_than_a_request_may_be_is_told_which_part(num_prompt_tokens, max_tokens, field) -> None:
    if field is None:
        check_length(num_prompt_tokens, max_tokens, 100)
        return
    with pytest.raises(RequestTooLarge) as caught:
        check_length(num_prompt_tokens, max_tokens, 100)
    assert caught.value.field == field
    assert "None" not in str(caught.value)
