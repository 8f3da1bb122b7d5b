"""A tiny random Llama with a byte-level tokenizer beside it, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tokenizers_in_process import END, VOCAB_SIZE, byte_level_tokenizer

NUM_LAYERS = 4
MAX_MODEL_LEN = 1024


def save_tiny_llama(directory: Path) -> Path:
    """Saves the checkpoint, the same every time, and returns the directory."""
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        # Far from zero, so that every layer matters and greedy choices are not ties.
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
