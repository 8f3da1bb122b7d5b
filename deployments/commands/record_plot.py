"""A performance record as a picture: step time and host bytes against the interval, with the objective's line."""

from __future__ import annotations

from pathlib import Path

from selectn_core.errors import ConfigError
from selectn_core.latency.placement import best_slots
from selectn_core.latency.recurrence import predict_step_s
from selectn_core.latency.steps import StepShape
from selectn_core.planning.record import PerformanceRecord

_MAX_SLOTS = 4
_LENGTH = 128


def plot_record(record: PerformanceRecord, max_requests: int, tpot_s: float, path: Path) -> None:
    """Draws the decode step of 1, a few and `max_requests` requests. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'selectn[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times, link = record.step_times(), record.link.link
    ks = range(len(record.unit_kinds) + 1)
    figure, panel = plt.subplots(figsize=(7, 4))
    for batch in sorted({1, max(1, max_requests // 4), max_requests}):
        costs = times.expected(StepShape.decode(batch, _LENGTH))
        plans = [best_slots(k, _MAX_SLOTS, costs, link) for k in ks]
        steps_ms = [1e3 * predict_step_s(costs, plan.offloaded, plan.num_slots, link) for plan in plans]
        panel.plot(ks, steps_ms, label=f"{batch} decoding, {_LENGTH} keys each")
    panel.axhline(tpot_s * 1e3, color="tab:red", linestyle="--", label=f"TPOT objective, {tpot_s * 1e3:.0f} ms")
    panel.set_xlabel("units offloaded, k (interval N = L / k)")
    panel.set_ylabel(f"step time (ms), modelled from {record.provenance} times")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    host = panel.twinx()
    host.plot(ks, [sum(record.unit_bytes[:k]) / 2**20 for k in ks], color="tab:grey", linestyle=":")
    host.set_ylabel("host bytes (MiB), dotted")
    host.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
