"""The status as text for a terminal: tables as wide as what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

NONE = "-"
MOST_DECISIONS = 10
# What a terminal would obey is shown instead: names come from elsewhere.
_CONTROL = dict.fromkeys((*range(32), 127, *range(128, 160)), "?")


def render_status(status: Mapping[str, Any]) -> str:
    """`/status.json` for people."""
    at = datetime.fromtimestamp(status["unix_s"]).astimezone().isoformat(timespec="seconds")
    lines = [f"status at {at}, gathered in {status['gathered_s']:.2f} s by ingress {_text(status['ingress_id'])}"]
    lines += [f"PROBLEM: {_text(each)}" for each in status["problems"]]
    lines += _section("replicas", _REPLICA, [_replica(each) for each in status["replicas"]])
    lines += [f"  {line}" for each in status["replicas"] for line in _replica_lines(each)]
    lines += _section("ingresses", _INGRESS, [_ingress(each) for each in status["ingresses"]])
    lines += _section("nodes", _NODE, [_node(each) for each in status["nodes"]])
    there = [(node["name"], node["facts"]) for node in status["nodes"] if node["facts"]]
    lines += _section("host buses", _BUS, [_bus(name, bus) for name, facts in there for bus in facts["buses"]])
    lines += _section("GPUs", _GPU, [_gpu(name, gpu) for name, facts in there for gpu in facts["gpus"]])
    lines += ["", f"coordinator: {_coordinator(status['coordinator'])}"]
    return "\n".join([*lines, "", render_decisions(status["decisions"][:MOST_DECISIONS])])


def render_decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    """The latest decisions, newest first, a line each."""
    if not decisions:
        return "decisions: none yet"
    rows = [(_clock(each["unix_s"]), _text(each["id"]), _text(each["summary"])) for each in decisions]
    return "\n".join(["decisions", *(f"  {line}" for line in _table(rows))])


def render_explanation(explanation: Mapping[str, Any]) -> str:
    """A decision in plain words."""
    decision = explanation["decision"]
    at = datetime.fromtimestamp(decision["unix_s"]).astimezone().isoformat(timespec="milliseconds")
    whose = f", request {_text(decision['request_id'])}" if decision["request_id"] else ""
    parts = (("known", "known"), ("decided", "decided"), ("why", "why"), ("otherwise", "what would have changed it"))
    head = f"{_text(decision['id'])}: {_text(decision['kind'])} decision at {at}{whose}"
    return "\n".join([head, *(f"  {title}: {_text(explanation[name])}" for name, title in parts if explanation[name])])


_REPLICA = (
    "replica",
    "state",
    "k",
    "limited by",
    "share of bus",
    "TTFT",
    "TPOT",
    "both met",
    "run",
    "wait",
    "headroom",
)


def _replica(replica: Mapping[str, Any]) -> Sequence[str]:
    its = replica["facts"]
    if its is None:
        return (_text(replica["id"]), "SILENT", *[NONE] * (len(_REPLICA) - 2))
    attained = its["attainment"]
    return (
        _text(replica["id"]),
        _text(its["state"]) if replica["problem"] is None else "SILENT",
        f"{its['k']}/{its['num_units']}",
        _text(its["limited_by"]).replace("_", " "),
        _rate(its["share_bytes_per_s"]),
        f"{_seconds(attained['ttft_s'])}/{_seconds(its['ttft_objective_s'])}",
        f"{_seconds(attained['tpot_s'])}/{_seconds(its['tpot_objective_s'])}",
        _percent(attained["attained"]),
        str(its["num_running"]),
        str(its["num_waiting"] + its["num_at_door"]),
        f"{its['headroom_tokens']:,} tokens",
    )


def _replica_lines(replica: Mapping[str, Any]) -> list[str]:
    """What has no column: memory, what the start took, and what is wrong."""
    its, name = replica["facts"], _text(replica["id"])
    old = f"; what is shown is {_seconds(replica['age_s'])} old" if its is not None else ""
    silent = [f"{name}: {_text(replica['problem'])}{old}"] if replica["problem"] is not None else []
    if its is None:
        return silent
    phases = ", ".join(f"{_text(phase)} {_seconds(seconds)}" for phase, seconds in its["startup_s"].items())
    device = f"{_bytes(its['device_bytes'])} of {_bytes(its['device_capacity_bytes'])} of device memory"
    offloaded = f"{_bytes(its['offloaded_bytes'])} of {_bytes(its['host_bytes'])} of weights offloaded"
    lines = [*silent, f"{name}: {_text(its['model'])}; {device}; {offloaded}; start took {phases or NONE}"]
    return lines + [f"{name}: PROBLEM: {_text(each)}" for each in its["problems"]]


_INGRESS = ("ingress", "wait", "refused", "left while waiting")


def _ingress(ingress: Mapping[str, Any]) -> Sequence[str]:
    outcomes = ingress["attainment"]["outcomes"]
    counts = (ingress["num_waiting"], outcomes.get("refused", 0), outcomes.get("cancelled", 0))
    return (_text(ingress["id"]), *(f"{each:,}" for each in counts))


_NODE = ("node", "host memory available", "pressure", "reserved", "sample's age")


def _node(node: Mapping[str, Any]) -> Sequence[str]:
    its = node["facts"]
    if its is None:
        return (_text(node["name"]), f"NOT SHOWN: {_text(node['problem'])}", NONE, NONE, NONE)
    reserved, capacity = its["ledger_reserved_bytes"], its["ledger_capacity_bytes"]
    return (
        _text(node["name"]),
        f"{_bytes(its['host_available_bytes'])} of {_bytes(its['host_limit_bytes'])}",
        NONE if its["pressure_percent"] is None else f"{its['pressure_percent']:g} %",
        _bytes(reserved) + (f" of {_bytes(capacity)}" if capacity is not None else ""),
        _seconds(its["age_s"]),
    )


_BUS = ("bus", "node", "carries", "committed", "replicas")


def _bus(node: str, bus: Mapping[str, Any]) -> Sequence[str]:
    carries = f"{_rate(bus['bytes_per_s'])}, {_text(bus['rate_from']).replace('_', ' ')}"
    count = NONE if bus["num_replicas"] is None else str(bus["num_replicas"])
    return (_text(bus["name"]), _text(node), carries, _rate(bus["committed_bytes_per_s"]), count)


_GPU = ("GPU", "node", "memory", "compute", "PCIe", "temperature", "power", "trouble")


def _gpu(node: str, gpu: Mapping[str, Any]) -> Sequence[str]:
    def number(name: str, unit: str) -> str:
        return NONE if gpu[name] is None else f"{gpu[name]:.0f} {unit}"

    width = NONE if gpu["pcie_width"] is None else f"x{gpu['pcie_width']}"
    return (
        f"{gpu['index']} {_text(gpu['name'] or '')}".strip(),
        _text(node),
        f"{_bytes(gpu['memory_used_bytes'])} of {_bytes(gpu['memory_total_bytes'])}",
        number("compute_percent", "%"),
        NONE if gpu["pcie_generation"] is None else f"{gpu['pcie_generation']} {width}",
        number("temperature_c", "C"),
        number("power_w", "W"),
        _text(gpu["trouble"] or NONE),
    )


def _coordinator(its: Mapping[str, Any]) -> str:
    if its["problem"]:
        return _text(its["problem"])
    settling = "; it has just started, and raises no share yet" if its["is_settling"] else ""
    report = f"oldest report {_seconds(its['oldest_report_s'])} old"
    return f"{its['num_nodes']} nodes report, {its['num_replicas']} replicas share buses, {report}{settling}"


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["", f"{title}: none"]
    return ["", title, *(f"  {line}" for line in _table([columns, *rows]))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _text(value: Any) -> str:
    return str(value).translate(_CONTROL)


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S")


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f} %"


def _bytes(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 2**20:,.1f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{value / 1e9:.3g} GB/s"
