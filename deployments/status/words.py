"""Decisions in plain words: what was known, what was decided, why, and what would have changed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployments.status.schema import Explanation, ShownDecision
from selectn_core.decision_log import LoggedDecision

Inputs = Mapping[str, float | None]

# Why k is not larger, and what would make it so: `LimitedBy`.
INTERVAL_REASONS: Mapping[str, tuple[str, str]] = {
    "everything": (
        "every unit is offloaded",
        "Nothing: there is no more to offload. Tighter objectives or a slower link would bring units back.",
    ),
    "by_hand": (
        "the number was set by hand",
        "Only another number by hand, or offload.num_offloaded: auto, which lets the policy decide again.",
    ),
    "policy": (
        "the policy has one plan, whatever is measured",
        "Another offload.policy: select-n goes by what is measured.",
    ),
    "memory": (
        "requests need the memory that this frees, and no more than that",
        "Requests that end, or that ask for fewer tokens, let units come back. A longer request would offload more.",
    ),
    "bus_share": (
        "the coordinator allows no more of the host bus",
        "A larger share: fewer or less demanding replicas on this bus, or a faster bus.",
    ),
    "queue": (
        "requests wait for memory or for a place, and short steps serve them sooner",
        "A shorter queue: more replicas, fewer requests, or a larger batch.max_requests.",
    ),
    "objective": (
        "with more units offloaded, steps would take longer than the latency objective allows",
        "A looser TPOT objective, a faster link, or fewer tokens in a step would allow more.",
    ),
}
INTERVAL_VERDICTS: Mapping[str, str] = {
    "offload_more": "offload more",
    "offload_fewer": "offload fewer",
    "offload_others": "offload other units, or through other slots",
    "stay": "leave the plan as it is",
}
# Why a request was refused, and what would have let it in: `AdmissionReason`.
ADMISSION_REASONS: Mapping[str, tuple[str, str]] = {
    "late": (
        "its first token would have come after its TTFT objective",
        "A looser TTFT objective, fewer tokens ahead of it, a replica more, or limits.refuse_late: false.",
    ),
    "deadline": (
        "it had waited until its deadline, and no replica had begun it",
        "A replica more, fewer requests, or a longer limits.admission_timeout_s where that was the deadline.",
    ),
    "queue_full": (
        "as many requests waited as may wait",
        "A shorter queue when it came, or a larger limits.max_queued_requests.",
    ),
    "displaced": (
        "the queue was full, and a request of a higher priority, or of a key with fewer requests there, took its place",
        "A shorter queue, a higher priority, fewer requests of its key, or a larger limits.max_queued_requests.",
    ),
    "too_large": (
        "no replica can ever hold so many tokens",
        "A shorter prompt, a smaller max_tokens, or more device memory.",
    ),
    "no_replica": (
        "no replica serves its model now",
        "A replica of that model that runs.",
    ),
}


def shown(decision: LoggedDecision) -> ShownDecision:
    """The decision with its sentence."""
    fields = {name: getattr(decision, name) for name in LoggedDecision.__dataclass_fields__}
    return ShownDecision(**fields, summary=_summary(decision))


def explanation(decision: LoggedDecision) -> Explanation:
    """All that can be said of a decision."""
    known, decided, why, otherwise = _PARTS.get(decision.kind, _of_unknown)(decision)
    return Explanation(decision=shown(decision), known=known, decided=decided, why=why, otherwise=otherwise)


def _summary(decision: LoggedDecision) -> str:
    inputs, reason = decision.inputs, decision.reason
    if decision.kind == "interval":
        return f"{_k(inputs)}: {_short_cause(decision)}"
    if decision.kind == "admission":
        cause, _ = ADMISSION_REASONS.get(reason, (reason, ""))
        return f"refused {_tokens(inputs.get('tokens'))}: {cause}"
    return f"{decision.verdict}: {reason}"


def _short_cause(decision: LoggedDecision) -> str:
    """Why, with the two numbers that say most where it is about the length of steps."""
    held, limit = decision.inputs.get("held_s"), decision.inputs.get("limit_s")
    cause, _ = INTERVAL_REASONS.get(decision.reason, (decision.reason, ""))
    if held is None or limit is None or decision.reason not in ("objective", "queue"):
        return cause
    whose = "the objective allows" if decision.reason == "objective" else "short steps serve those who wait:"
    if decision.verdict == "offload_fewer" and held > limit:
        return f"steps would take {_ms(held)} as it was, {whose} {_ms(limit)}"
    return f"{whose} steps of {_ms(limit)}"


def _k(inputs: Inputs) -> str:
    before, after, units = (_number(inputs.get(name)) for name in ("k_before", "k_after", "num_units"))
    return f"k {after} of {units}" if before == after else f"k {before} to {after} of {units}"


def _of_interval(decision: LoggedDecision) -> tuple[str, str, str, str]:
    inputs = decision.inputs
    cause, otherwise = INTERVAL_REASONS.get(decision.reason, (decision.reason, ""))
    known = _list(
        inputs,
        ("step_tokens", "the step had {} tokens", _number),
        ("step_decodes", "{} requests decoded", _number),
        ("step_kv_tokens", "they had {} keys", _number),
        ("limit_s", "it might take {}", _ms),
        ("held_s", "steps would take {} if the plan stayed", _ms),
        ("predicted_s", "it should take {} under the plan that was chosen", _ms),
        ("link_bytes_per_s", "the link gave {}", _rate),
        ("share_bytes_per_s", "the coordinator allowed {} of the bus", _rate),
        ("max_offloaded_bytes", "at most {} might be offloaded", _bytes),
        ("needed_bytes", "requests needed {} of the units' memory", _bytes),
        ("offloaded_bytes", "the plan offloads {}", _bytes),
        ("freed_bytes", "it frees {}", _bytes),
        ("next_unit_bytes", "the next unit has {}", _bytes),
    )
    slots = _number(inputs.get("slots_after"))
    held, limit = inputs.get("held_s"), inputs.get("limit_s")
    why = f"It does not offload more, since {cause}."
    if decision.verdict == "offload_fewer" and held is not None and limit is not None and held > limit:
        why = f"Steps would have taken {_ms(held)} under the plan that held, and {_ms(limit)} were allowed. {why}"
    decided = f"To {INTERVAL_VERDICTS.get(decision.verdict, decision.verdict)}: {_k(inputs)}, through {slots} slots."
    if inputs.get("is_urgent"):
        decided += " It was urgent: the link gave less than was guaranteed."
    return known, decided, why, otherwise


def _of_admission(decision: LoggedDecision) -> tuple[str, str, str, str]:
    inputs = decision.inputs
    cause, otherwise = ADMISSION_REASONS.get(decision.reason, (decision.reason, ""))
    known = _list(
        inputs,
        ("tokens", "the request could come to {} tokens", _number),
        ("prompt_tokens", "{} of them its prompt's", _number),
        ("ttft_s", "its first token was wanted within {}", _seconds),
        ("waited_s", "it had waited {}", _seconds),
        ("left_s", "it had {} left", _seconds),
        ("num_waiting", "{} requests waited", _number),
        ("queued_tokens", "these had {} tokens", _number),
        ("before_tokens", "{} tokens were to be served before it", _number),
        ("spread_tokens", "the margin was {} tokens", _number),
        ("free_tokens", "replicas could promise {} tokens more", _number),
        ("rate_tokens_per_s", "they gave back {} tokens/s", _number),
        ("longest_tokens", "the longest request that a replica holds has {} tokens", _number),
    )
    decided = "To refuse it"
    if inputs.get("retry_after_s") is not None:
        decided += f", and to have it come again after {_seconds(inputs['retry_after_s'])}"
    return known, f"{decided}.", f"It was refused, since {cause}.", f"{otherwise}{_margin(inputs)}"


def _margin(inputs: Inputs) -> str:
    """By how many tokens it was too late, where that was counted."""
    names = ("before_tokens", "spread_tokens", "tokens", "free_tokens", "rate_tokens_per_s", "left_s")
    before, spread, own, free, rate, left_s = (inputs.get(name) for name in names)
    if None in (before, spread, own, free, rate, left_s):
        return ""
    assert before is not None and spread is not None and own is not None and free is not None  # noqa: PT018
    assert rate is not None and left_s is not None  # noqa: PT018
    return f" {_number(before + spread + own - free - rate * left_s)} tokens fewer before it would have let it in."


def _of_unknown(decision: LoggedDecision) -> tuple[str, str, str, str]:
    known = ", ".join(f"{name} {_number(value)}" for name, value in decision.inputs.items() if value is not None)
    return _sentence(known or "nothing"), _sentence(decision.verdict), _sentence(decision.reason), ""


_PARTS: Mapping[str, Callable[[LoggedDecision], tuple[str, str, str, str]]] = {
    "interval": _of_interval,
    "admission": _of_admission,
}


def _list(inputs: Inputs, *parts: tuple[str, str, Callable[[float | None], str]]) -> str:
    """One sentence of what is there."""
    said = [text.format(show(inputs[name])) for name, text, show in parts if inputs.get(name) is not None]
    return _sentence("; ".join(said) or "only the plan")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _tokens(value: float | None) -> str:
    return f"{_number(value)} tokens"


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.2f} s"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:,.2g} s" if value < 10 else f"{value:,.0f} s"


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e9:,.3g} GB/s"


def _bytes(value: float | None) -> str:
    return "?" if value is None else f"{value / 2**20:,.4g} MiB" if value < 2**30 else f"{value / 2**30:,.3g} GiB"
