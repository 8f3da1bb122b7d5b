"""Fields of other servers' and clients' requests that are not served here, and the values of them that ask for nothing.

A client built for another server sends its defaults along. Those that ask for what is done here anyway are dropped;
any other value is refused by name, since dropping it would change the answer. null is neutral for every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]

# What no answer depends on, whatever the value: notes for the server's operator, hints for caches and transport.
_NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "rid"}
_HINTS = {"prompt_cache_key", "prompt_cache_retention", "cache_prompt", "parallel_tool_calls"}
_HINTS |= {"separate_reasoning", "stream_reasoning"}
# Details of something that is refused unless it is off (mirostat, DRY, XTC, penalties, guided decoding).
_DETAILS = {"mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n"}
_DETAILS |= {"dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "repeat_last_n"}
_DETAILS |= {"guided_decoding_backend", "guided_whitespace_pattern"}
IGNORED_FIELDS = frozenset(_NOTES | _HINTS | _DETAILS)

# Of fields that are served, what other servers call the default.
SERVED_DEFAULTS: Neutral = {"top_k": (-1,), "priority": (0,)}

# What a refusal names first comes first: of "tools" and "tool_choice" the former.
NEUTRAL_VALUES: Neutral = {
    **SERVED_DEFAULTS,
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "verbosity": (),
    "web_search_options": (),
    # vLLM, SGLang
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "custom_params": (),
    "data_parallel_rank": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "ebnf": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (False,),
    "regex": (),
    "repetition_penalty": (1,),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_params": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # llama.cpp
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "id_slot": (-1,),
    "json_schema": (),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_keep": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_penalty": (1,),
    "return_progress": (False,),
    "samplers": (),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
# Whether special tokens are added to the prompt: a chat's template has written them, a completion's prompt has none.
CHAT_NEUTRAL_VALUES: Neutral = {**NEUTRAL_VALUES, "add_special_tokens": (False,)}
# Here logprobs=0 asks for the chosen tokens' own.
COMPLETION_NEUTRAL_VALUES: Neutral = {**NEUTRAL_VALUES, "add_special_tokens": (True,), "logprobs": (False,)}

# Of one turn: what servers and SDKs write into their assistant turns, and clients send back.
MESSAGE_IGNORED = frozenset({"cache_control", "id"})
MESSAGE_NEUTRAL: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "images": ([],),
    "parsed": (),
    "prefix": (False,),
    "provider_specific_fields": ({},),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "refusal": ("",),
    "thinking_blocks": ([],),
    "tool_calls": ([],),
    "tool_call_id": ("",),
}
PART_IGNORED = frozenset({"cache_control"})
PART_NEUTRAL: Neutral = {"annotations": ([],), "logprobs": ([],)}


def changes_nothing(name: str, value: Any, ignored: frozenset[str], neutral: Neutral) -> bool:
    """Whether a request with this field asks for what is done without it."""
    if value is None or name in ignored:
        return True
    # By type too: 0 is neutral for top_logprobs, and in Python False == 0.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral.get(name, ()))
