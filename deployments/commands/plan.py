"""`selectn plan`: what may be offloaded within latency objectives, and what that takes, before anything starts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.commands.emit import SERVERS, emitted, require_layers
from deployments.commands.file_options import file_name
from selectn_core.bounds import Bounds, require_number
from selectn_core.config import MAX_SLOTS, MOST_GB_PER_S, MOST_GIB, MOST_MS, MOST_TOKENS
from selectn_core.errors import ConfigError, Infeasible

if TYPE_CHECKING:
    from selectn_core.planning.planner import Largest, Planner, Workload
    from selectn_core.planning.record import PerformanceRecord
    from selectn_core.planning.search import PlanRange

EXIT_OK, EXIT_INFEASIBLE = 0, 3
_GIB = 1 << 30

EXAMPLES = """\
examples:
  selectn plan --record record.yaml --tpot-ms 60 --ttft-ms 900 --batch 8 --seq 1024 --device-gib 0.4
      the interval range and the choice, for 8 requests at a time that are 1024 tokens long when they end
  selectn plan --record layers.yaml --record blocks.yaml --tpot-ms 60 --seq 1024 --device-gib 0.4 --largest-batch
      how many requests at a time, with layers or with their attention and MLP blocks as units, whichever frees more
  selectn plan --record record.yaml --batch 8 --seq 1024 --device-gib 0.4 --tightest --json
      the smallest TPOT that this device can promise, as JSON
  selectn plan --record record.yaml --tpot-ms 60 --batch 8 --seq 1024 --emit vllm
      the flags of vLLM that offload as nearly the same layers; on stderr, what is lost there
exit code: 0 if there is a plan, 3 if there is none (the message says what limits and what would be enough), 2 for a
wrong call, a record that cannot be used, or a step larger than what was measured
"""


def register(commands: Any) -> None:
    """Adds the command to `selectn`."""
    parser = commands.add_parser(
        "plan",
        help="what can be offloaded within latency objectives, from a performance record",
        description="Reads what `selectn profile` measured, says which intervals meet the objectives and fit memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--record",
        type=file_name,
        action="append",
        metavar="FILE",
        help="a performance record, one per granularity of units (default: the only one in the cache)",
    )
    parser.add_argument("--tpot-ms", type=float, metavar="MS", help="time per output token at most")
    parser.add_argument("--ttft-ms", type=float, metavar="MS", help="time to first token at most, once it is its turn")
    parser.add_argument("--batch", type=int, default=1, help="requests at a time (%(default)s)")
    parser.add_argument(
        "--seq", type=int, default=512, help="tokens of each when it ends, prompt included (%(default)s)"
    )
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="of them in the prompt (all)")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="prefill tokens in a step (as in the record)")
    parser.add_argument(
        "--admitted",
        type=int,
        default=0,
        metavar="TOKENS",
        help="prefill tokens beside decoding requests (%(default)s)",
    )
    parser.add_argument("--device-gib", type=float, metavar="GIB", help="device memory (as much as it takes)")
    parser.add_argument("--host-gib", type=float, metavar="GIB", help="host memory for weights (as much as it takes)")
    parser.add_argument("--link-gbps", type=float, metavar="GB/S", help="host link, 10^9 bytes/s (as in the record)")
    parser.add_argument("--max-slots", type=int, default=4, help="most slots (%(default)s)")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--largest-batch", action="store_true", help="ask how large the batch may be")
    question.add_argument("--longest-input", action="store_true", help="ask how long requests may be")
    question.add_argument("--tightest", action="store_true", help="ask how small TPOT may be, and TTFT if it is given")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--emit", choices=SERVERS, help="print flags with which another server follows the plan")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers the question. Raises SelectNError for whatever the user can put right."""
    _check(args)
    records = _records(args)
    if args.emit:
        require_layers(records)
    planner = _planner(args, records)
    workload = _workload(args, records[0].fingerprint.max_batch_tokens)
    try:
        answer = _answer(args, planner, workload)
    except Infeasible as error:
        if args.json:
            print(json.dumps({"feasible": False, "limiting": error.limiting, "changes": _changes(error)}, indent=2))
        else:
            print(f"not feasible: {error}", file=sys.stderr if args.emit else sys.stdout)
        return EXIT_INFEASIBLE
    if args.emit:
        return _emit(args.emit, answer, planner, _notes(records))
    heading = {"feasible": True, "provenance": records[0].provenance, "notes": _notes(records)}
    shown = {**heading, **answer.asked, **_asked(answer.workload), **_plan(answer.found, planner)}
    print(json.dumps(_finite(shown), indent=2) if args.json else _table(shown))
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The plan, the workload that it is for, and what else was asked for."""

    found: PlanRange
    workload: Workload
    asked: dict[str, Any]


def _emit(server: str, answer: _Answer, planner: Planner, notes: list[str]) -> int:
    """Flags to stdout, what is lost to stderr."""
    result = emitted(server, answer.found, planner, answer.workload)
    for note in (*result.notes, *notes):
        print(f"note: {note}", file=sys.stderr)
    if not result.fits:
        return EXIT_INFEASIBLE
    print(result.line)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    most = {"tpot_ms": MOST_MS, "ttft_ms": MOST_MS, "device_gib": MOST_GIB, "host_gib": MOST_GIB}
    for name, at_most in {**most, "link_gbps": MOST_GB_PER_S}.items():
        require_number(_option(name), getattr(args, name), bounds=Bounds(above=0, at_most=at_most))
    least = {"batch": 1, "seq": 1, "prompt": 1, "chunk": 1, "admitted": 0}
    for name, at_least in least.items():
        bounds = Bounds(at_least=at_least, at_most=MOST_TOKENS)
        require_number(_option(name), getattr(args, name), bounds=bounds, is_whole=True)
    slots = Bounds(at_least=1, at_most=MAX_SLOTS)
    require_number("--max-slots", args.max_slots, bounds=slots, is_whole=True)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _records(args: argparse.Namespace) -> list[PerformanceRecord]:
    from selectn_core.planning.record import (
        PerformanceRecord,  # late, as the imports of every command: `--help` needs none
    )

    return [PerformanceRecord.load(path) for path in args.record or [_only_cached_record()]]


def _planner(args: argparse.Namespace, records: list[PerformanceRecord]) -> Planner:
    from selectn_core.planning.planner import planner_of

    return planner_of(
        records,
        device_bytes=_gib(args.device_gib),
        host_bytes=_gib(args.host_gib),
        bytes_per_s=None if args.link_gbps is None else args.link_gbps * 1e9,
        max_slots=args.max_slots,
    )


def _notes(records: list[PerformanceRecord]) -> list[str]:
    """What a reader must know that no number shows."""
    notes = []
    if not all(record.is_complete for record in records):
        notes.append("profiling was cut short: run `selectn profile` again for tighter times")
    if any(record.memory.workspace.step_bytes == 0 for record in records):
        notes.append("what activations take was not measured, as device.memory_gib was not set: leave room for them")
    return notes


def _only_cached_record() -> Path:
    from selectn_core.profiling.record_files import cached_records

    paths = cached_records()
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise ConfigError("there is no performance record of this machine yet: run `selectn profile` to make one")
    raise ConfigError("there are several performance records; choose with --record:\n  " + "\n  ".join(map(str, paths)))


def _workload(args: argparse.Namespace, default_chunk: int) -> Workload:
    from selectn_core.planning.planner import Workload

    return Workload(
        batch=args.batch,
        length=args.seq,
        tpot_s=_seconds(args.tpot_ms),
        ttft_s=_seconds(args.ttft_ms),
        prompt=args.prompt,
        chunk_tokens=args.chunk or default_chunk,
        admitted_tokens=args.admitted,
    )


def _answer(args: argparse.Namespace, planner: Planner, workload: Workload) -> _Answer:
    from selectn_core.planning.planner import TPOT, TTFT

    if args.largest_batch:
        largest = planner.largest_batch(workload)
        return _largest("batch", largest, replace(workload, batch=largest.value))
    if args.longest_input:
        largest = planner.longest_input(workload)
        return _largest("seq", largest, replace(workload, length=largest.value))
    if args.tightest:
        names = [TPOT] if args.ttft_ms is None else [TPOT, TTFT]
        found = {name: planner.tightest(workload, name) for name in names}
        limits_ms = {f"tightest_{name.lower()}_ms": limit_s * 1e3 for name, (limit_s, _) in found.items()}
        limit_s, plan = found[TPOT]
        return _Answer(found=plan, workload=workload.with_limit(TPOT, limit_s), asked=limits_ms)
    return _Answer(found=planner.plan(workload), workload=workload, asked={})


def _largest(name: str, largest: Largest, workload: Workload) -> _Answer:
    asked = {f"largest_{name}": largest.value, "stopped_by": largest.stopped_by}
    return _Answer(found=largest.plan, workload=workload, asked=asked)


def _asked(workload: Workload) -> dict[str, Any]:
    return {"batch": workload.batch, "seq": workload.length}


def _plan(found: PlanRange, planner: Planner) -> dict[str, Any]:
    plan, (smallest, largest) = found.plan, found.interval_range
    capacity = planner.sources[0].memory.device_bytes
    unused = {} if capacity is None else {"unused_bytes": capacity - found.need.total_bytes}
    return {
        "units": found.unit_set,
        "num_units": plan.num_units,
        "k_min": found.k_min,
        "k_max": found.k_max,
        "interval_range": [smallest, largest],
        "num_offloaded": plan.num_offloaded,
        "num_slots": plan.num_slots,
        "interval": plan.interval,
        "offloaded": list(plan.offloaded),
        "freed_bytes": found.freed_bytes,
        "offloaded_bytes": found.offloaded_bytes,
        "host_bytes": found.host_bytes,
        "smallest_device_bytes": found.device_bytes,
        "link_bytes_per_s": planner.link.bytes_per_s,
        "predictions": [
            {
                "objective": each.name,
                "predicted_ms": each.predicted_s * 1e3,
                "limit_ms": each.limit_s * 1e3,
                "headroom_ms": each.spare_s * 1e3,
            }
            for each in found.predictions
        ],
        "device": {**asdict(found.need), **unused},
    }


def _table(answer: dict[str, Any]) -> str:
    """The answer for people; bytes in MiB, times in milliseconds."""
    rows: list[tuple[str, str]] = []
    for key, what in (("largest_batch", "largest batch"), ("largest_seq", "longest input")):
        if key in answer:
            rows.append((what, f"{answer[key]}; one more: {answer['stopped_by']}"))
    rows += [
        (f"tightest {key.split('_')[1].upper()}", f"{value:.2f} ms")
        for key, value in answer.items()
        if key.startswith("tightest_")
    ]
    smallest, largest = answer["interval_range"]
    rows += [
        ("units", f"{answer['units']}, {answer['num_units']} in a step"),
        ("interval range", f"{smallest:.2f} to {largest:.2f} (k = {answer['k_max']} down to {answer['k_min']})"),
        ("choice", f"k = {answer['num_offloaded']}, interval {answer['interval']:.2f}, {answer['num_slots']} slots"),
        ("offloaded", " ".join(map(str, answer["offloaded"])) or "nothing"),
        ("device memory freed", _mib(answer["freed_bytes"])),
        ("only on the host", _mib(answer["offloaded_bytes"])),
        ("host memory for weights", _mib(answer["host_bytes"])),
    ]
    for each in answer["predictions"]:
        limit = (
            f" of {each['limit_ms']:.2f} (headroom {max(0.0, each['headroom_ms']):.2f})"
            if each["limit_ms"] < 1e12
            else ""
        )
        rows.append((f"predicted {each['objective']}", f"{each['predicted_ms']:.2f}{limit} ms"))
    rows.append(("link", f"{answer['link_bytes_per_s'] / 1e9:.2f} GB/s"))
    rows.append(("smallest device", _mib(answer["smallest_device_bytes"])))
    rows += [(f"device: {owner.removesuffix('_bytes')}", _mib(count)) for owner, count in answer["device"].items()]
    width = max(len(name) for name, _ in rows)
    title = f"{answer['batch']} requests of {answer['seq']} tokens; times: {answer['provenance']}, at worst"
    notes = [f"note: {note}" for note in answer["notes"]]
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows), *notes])


def _changes(error: Infeasible) -> list[dict[str, Any]]:
    return [asdict(change) for change in error.changes]


def _finite(value: Any) -> Any:
    """JSON knows no infinity: None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _gib(value: float | None) -> int | None:
    return None if value is None else int(value * _GIB)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
