"""A model that costs next to nothing and whose greedy text is known: what remains is the path from engine to client.

A Llama of 4 layers, hidden size 256, float32, with seeded random weights and a byte-level tokenizer. Its head is made
so that every character of `CYCLE` is followed by the next one, and the last by the first, whatever the batch: the
layers add to that too little to change it. Each token is one character, so that a text shows by itself whether one
of its tokens was lost, doubled, or came out of order.
"""

from __future__ import annotations

import string
from pathlib import Path

CYCLE = string.ascii_letters + string.digits + "-_"
PROMPT_TOKENS = 32
MAX_MODEL_LEN = 2048
END = "<|end|>"
# What is said, and nothing else: the last character decides what follows.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def prompt(client: int, number: int) -> str:
    """A prompt of `PROMPT_TOKENS` tokens, another one for every request."""
    return f"{client}.{number}".ljust(PROMPT_TOKENS - 1, ".") + CYCLE[(client * 7 + number) % len(CYCLE)]


def continuation(text: str, num_tokens: int) -> str:
    """What the model says after `text`."""
    first = CYCLE.index(text[-1]) + 1
    return (CYCLE * (num_tokens // len(CYCLE) + 2))[first : first + num_tokens]


def save(directory: Path) -> Path:
    """Saves the checkpoint, the same every time, and returns the directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {char: number for number, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=vocab[END],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.normal_()
        head.zero_()
        for char, after in zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True):
            head[vocab[after]] = embedding[vocab[char]]
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory
