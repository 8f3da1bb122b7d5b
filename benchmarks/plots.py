"""Pictures of benchmark results, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_intervals(samples: list[dict[str, Any]], provenance: str, path: Path) -> None:
    """Step time against offloaded layers: measured, predicted and T_bound, one panel per batch and bandwidth."""
    batches = sorted({sample["batch"] for sample in samples})
    links = sorted({sample["link_gb_per_s"] for sample in samples})
    figure, panels = plt.subplots(
        len(links), len(batches), figsize=(4 * len(batches), 3 * len(links)), squeeze=False, sharex=True
    )
    for row, link in zip(panels, links, strict=True):
        for panel, batch in zip(row, batches, strict=True):
            mine = [s for s in samples if (s["batch"], s["link_gb_per_s"]) == (batch, link)]
            ks = [sample["k"] for sample in mine]
            panel.plot(ks, [s["bound_s"] * 1e3 for s in mine], color="tab:grey", label="T_bound")
            panel.plot(ks, [s["predicted_s"] * 1e3 for s in mine], "--", color="tab:blue", label="recurrence")
            panel.plot(ks, [s["measured_s"] * 1e3 for s in mine], ".", color="tab:red", label=provenance)
            panel.set_title(f"batch {batch}, link {link:g} GB/s", fontsize=10)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("layers offloaded (k)")
    figure.supylabel("step time (ms)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_capacity(rows: list[dict[str, Any]], objective_ms: float, path: Path) -> None:
    """Tokens/s and mean batch by side, and the TPOT that 95 % of the requests had against the objective."""
    names = [row["side"] for row in rows]
    panels_of = (
        ("tokens/s", [row["tokens_per_s"] for row in rows]),
        ("mean batch", [row["mean_batch"] for row in rows]),
        ("TPOT p95 (ms)", [row["tpot_p95_s"] * 1e3 for row in rows]),
    )
    colors = ["tab:green" if row["attained"] >= 0.95 else "tab:grey" for row in rows]
    figure, panels = plt.subplots(1, len(panels_of), figsize=(12, 3.6), sharey=True)
    for panel, (title, values) in zip(panels, panels_of, strict=True):
        panel.barh(names, values, color=colors)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, axis="x")
    panels[-1].axvline(objective_ms, color="tab:red", linestyle="--", label="objective")
    panels[-1].legend(fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(
        "The same requests, all but the first in one device memory (emulated); grey: misses the objective", fontsize=10
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_enumeration(samples: list[dict[str, Any]], path: Path) -> None:
    """Layers freed against copy over compute time for three sizes, and how far even placement is from T_bound."""
    freed = [s for s in samples if s["what"] == "freed" and s["rest"] == 0]
    bound = [s for s in samples if s["what"] == "bound"]
    sizes = [n for n in (32, 40, 80) if any(s["num_layers"] == n for s in freed)]
    figure, panels = plt.subplots(1, len(sizes) + 1, figsize=(4 * len(sizes) + 4, 3.6))
    lines = (
        ("paper", "paper: integer N, one slot", "tab:grey", "s-"),
        ("any_k_one_slot", "any k, one slot", "tab:orange", "^-"),
        ("best_slots", "any k, best S", "tab:blue", "o-"),
        ("blocks", "blocks, best S", "tab:green", "d--"),
    )
    for panel, size in zip(panels, sizes, strict=False):
        mine = [s for s in freed if s["num_layers"] == size]
        for key, label, color, style in lines:
            panel.plot([s["copy_ratio"] for s in mine], [s[key] for s in mine], style, color=color, label=label, ms=4)
        panel.set(title=f"L = {size}", xscale="log", ylim=(0, None), xlabel="r = copy / compute of a layer")
    panels[0].set_ylabel("layers freed, step <= 1.1 x unloaded")
    panels[0].legend(fontsize=7)
    for rest, style in ((0.0, "-"), (4.0, "--")):
        for slots, color in ((1, "tab:grey"), (2, "tab:blue"), (3, "tab:green")):
            mine = [s for s in bound if (s["rest"], s["num_slots"]) == (rest, slots)]
            label = f"S = {slots}, R = {rest:g} layers"
            panels[-1].plot(
                [s["copy_ratio"] for s in mine], [s["worst"] for s in mine], style, color=color, label=label
            )
    panels[-1].set(title="worst step over T_bound, every L and k", xscale="log", xlabel="r")
    panels[-1].legend(fontsize=7)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.suptitle("Even placement by the recurrence (modelled)", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_bandwidth_step(samples: list[dict[str, Any]], path: Path) -> None:
    """Every step's duration against TPOT, and the units offloaded, while a second process takes half of the bus."""
    figure, panels = plt.subplots(len(samples), 1, figsize=(10, 2.6 * len(samples)), squeeze=False, sharex=True)
    for panel, sample in zip(panels[:, 0], samples, strict=True):
        began_s = [row[0] for row in sample["steps"]]
        panel.plot(began_s, [row[1] * 1e3 for row in sample["steps"]], ".", markersize=3, label="step (ms)")
        panel.axhline(sample["tpot_ms"], color="tab:red", linestyle="--", label="TPOT objective")
        panel.axvspan(*sample["changes_s"], color="tab:grey", alpha=0.2, label="half of the bus is taken")
        panel.set_ylim(0, 2.5 * sample["tpot_ms"])
        panel.set_title(f"{sample['policy']}, TPOT {sample['multiple']:g} x unloaded (emulated)", fontsize=10)
        offloaded = panel.twinx()
        offloaded.step(began_s, [row[4] for row in sample["steps"]], color="tab:green", where="post", linewidth=1)
        offloaded.set_ylabel("units offloaded", color="tab:green")
        offloaded.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8, loc="upper left")
    figure.supxlabel("seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
