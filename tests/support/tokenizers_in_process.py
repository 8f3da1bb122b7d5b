"""Tokenizers of the two common kinds, built in the process: no file, no network."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 448
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the first turn must not be the assistant\\'s') }}{% endif %}"
    "<|{{ 'assistant' if message['role'] == 'assistant' else 'user' }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "いろはにほへと ちりぬるを 我が世 誰ぞ 常ならむ",
    "Съешь же ещё этих мягких французских булок",
    "🦊🐶🦊🐶 👩‍👩‍👧 €1,234.56 ½ ≥ 3",
)


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, and some merged tokens begin or end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, USER, ASSISTANT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: spaces are part of words, the first is dropped, and unknown characters are bytes."""
    words = ["<unk>", "▁Hello", "▁world", "▁", "a"]
    vocab = {token: index for index, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
