"""What the demo found, for people and as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from deployments.commands.chat_client import Answer
from deployments.config import AppArgs


@dataclass(frozen=True, kw_only=True)
class Report:
    """The demo's result. Bytes are bytes; `step_over_bound` is median measured step / T_bound.

    T_bound of a step takes the compute term from that step's own time without its waits for copies, and the
    link term from the bandwidth that the link had. `provenance` says what the times are worth.
    """

    device: str
    provenance: str
    model: str
    answers: list[dict[str, Any]]
    steering: dict[str, Any]
    tokens_equal_reference: bool
    slo: dict[str, float]
    slo_attained: dict[str, bool]
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    interval_history: list[list[int]]
    unit: str
    num_layers: int
    num_units: int
    num_offloaded: int
    num_slots: int
    host_bytes: int
    offloaded_bytes: int
    device_bytes: int
    device_capacity_bytes: int
    kv_bytes: int
    memory: dict[str, dict[str, int]]
    link_busy_share: float
    link_gb_per_s: float
    step_over_bound: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def build_report(
    args: AppArgs,
    answers: list[Answer],
    reference: list[Answer],
    *,
    before: dict[str, Any],
    after: dict[str, Any],
    generating_s: float,
) -> Report:
    """Puts answers and the replica's two snapshots together."""
    ttft_ms = _spread([answer.ttft_s * 1e3 for answer in answers])
    tpot_ms = _spread([answer.tpot_s * 1e3 for answer in answers])
    slo = {f"{name}_ms": after["objectives"][f"{name}_s"] * 1e3 for name in ("ttft", "tpot")}
    link_bytes = after["link_bytes"] - before["link_bytes"]
    busy_s = after["link_busy_s"] - before["link_busy_s"]
    same_keys = ("unit", "num_layers", "num_units", "num_offloaded", "num_slots")
    same_bytes = ("host_bytes", "offloaded_bytes", "device_bytes")
    return Report(
        **{key: after[key] for key in (*same_keys, *same_bytes, "device", "provenance", "model", "interval_history")},
        device_capacity_bytes=after["device_capacity_bytes"],
        kv_bytes=after["kv_bytes"],
        memory=after["memory"],
        steering=after["steering"],
        step_over_bound=round(after["step_over_bound"], 4),
        answers=[_with_reference(answer, other) for answer, other in zip(answers, reference, strict=True)],
        tokens_equal_reference=all(
            (answer.text, answer.num_tokens) == (other.text, other.num_tokens)
            for answer, other in zip(answers, reference, strict=True)
        ),
        slo=slo,
        slo_attained={"ttft": ttft_ms["max"] <= slo["ttft_ms"], "tpot": tpot_ms["max"] <= slo["tpot_ms"]},
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        link_busy_share=round(busy_s / generating_s, 4),
        link_gb_per_s=round(link_bytes / busy_s / 1e9, 3) if busy_s else 0.0,
    )


def render(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [
        "",
        f"Select-N demo: {report.model} on the {report.device} device ({report.provenance} figures)",
        "",
    ]
    for answer in report.answers:
        lines.append(f"  Q  {answer['question']}")
        lines.append(textwrap.fill(answer["text"].strip(), 100, initial_indent="  A  ", subsequent_indent="     "))
        lines.append(
            f"     {answer['num_tokens']} tokens, TTFT {answer['ttft_ms']:.0f} ms, TPOT {answer['tpot_ms']:.0f} ms"
        )
    lines.append("")
    lines.extend(f"  {name:<22}{value}" for name, value in _rows(report))
    return "\n".join(lines)


def _rows(report: Report) -> list[tuple[str, str]]:
    counts = [count for _, count in report.interval_history]
    history = f"{min(counts)} to {max(counts)} of {report.num_units}, {len(counts) - 1} changes"
    same = "equal to those without offloading" if report.tokens_equal_reference else "DIFFERENT without offloading"
    return [
        ("answers", same),
        ("TTFT", _against(report.ttft_ms, report.slo["ttft_ms"], report.slo_attained["ttft"])),
        ("TPOT", _against(report.tpot_ms, report.slo["tpot_ms"], report.slo_attained["tpot"])),
        (
            "policy",
            f"{report.steering['policy']}: step times predicted to within {report.steering['prediction_error']:.1%} "
            f"(mean), deciding took {report.steering['controller_share']:.2%} of the time",
        ),
        (f"{report.unit}s in host memory", f"{history}; now through {report.num_slots} slots"),
        ("host memory", f"{_mib(report.host_bytes)} of weights, {_mib(report.offloaded_bytes)} only there"),
        (
            "device memory",
            f"{_mib(report.device_capacity_bytes)}: " + _owners(report.memory["device"]),
        ),
        ("host memory by owner", _owners(report.memory["host"])),
        ("link", f"busy {report.link_busy_share:.0%} of the time, at {report.link_gb_per_s:.2f} GB/s"),
        ("step over its bound", f"{report.step_over_bound:.3f} (median)"),
    ]


def _owners(account: dict[str, int]) -> str:
    parts = [f"{name.removesuffix('_bytes').replace('_', ' ')} {_mib(held)}" for name, held in account.items() if held]
    return ", ".join(parts)


def _against(spread: dict[str, float], objective_ms: float, attained: bool) -> str:
    verdict = "attained" if attained else "missed"
    return f"median {spread['median']:.0f} ms, worst {spread['max']:.0f} ms; objective {objective_ms:.0f} ms: {verdict}"


def _with_reference(answer: Answer, reference: Answer) -> dict[str, Any]:
    return {
        "question": answer.question,
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "ttft_ms": round(answer.ttft_s * 1e3, 1),
        "tpot_ms": round(answer.tpot_s * 1e3, 1),
        "reference_text": reference.text,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
