"""The performance record of a configuration, and what the planner says of it: objectives, and whether all would fit.

What a record is of is only known in full when the model is loaded (`engine/fingerprint.py`). Here what follows from the
configuration, the machine and the checkpoint's own configuration is compared, so a match is *likely* to be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.commands.doctor.findings import Finding, gib, note, ok, warning
from deployments.commands.doctor.subject import Subject
from deployments.config import AppArgs
from selectn_core.config import MAX_SLOTS
from selectn_core.device.cpu_name import cpu_name
from selectn_core.errors import Infeasible, NotMeasured
from selectn_core.planning.planner import Planner, Workload, planner_of
from selectn_core.requests.objectives import resolve_objectives

if TYPE_CHECKING:
    from selectn_core.planning.record import PerformanceRecord

MEASURE = "run `selectn profile` to measure now; the first start does so otherwise, for about a minute"


@dataclass(frozen=True, kw_only=True)
class Match:
    """The record that is likely to be used; without one, the nearest and how it differs from what would run."""

    record: PerformanceRecord | None = None
    path: Path | None = None
    differences: tuple[str, ...] = ()


def expected(subject: Subject, args: AppArgs) -> dict[str, Any]:
    """Fields of the fingerprint that follow from the configuration and the machine. What is not known is not in it."""
    machine, batch = subject.machine, args.batch
    fields: dict[str, Any] = {
        "unit": args.offload.unit,
        "device": subject.kind(args),
        "max_batch_tokens": batch.max_batch_tokens,
        "max_requests": batch.max_requests,
        "page_size": batch.page_size,
        "torch": machine.version_of("torch"),
        "transformers": machine.version_of("transformers"),
    }
    if args.model.dtype != "auto":
        fields["dtype"] = args.model.dtype
    if (model := subject.model_hash(args)) is not None:
        fields["model"] = model
    if fields["device"] == "emulated":
        fields["device_name"] = cpu_name(machine.proc)
        fields["compute_threads"] = args.device.compute_threads or max(1, machine.num_cpus - 1)
        fields["link"] = f"emulated at {args.device.link_gb_per_s:g} GB/s"
    elif subject.cuda.devices:
        fields["device_name"] = subject.cuda.devices[0][0]
    return fields


def record_for(subject: Subject, args: AppArgs) -> Match:
    """The newest record that agrees in everything that is known, else the one that differs least."""
    wanted = expected(subject, args)
    candidates = []
    for cached in subject.records:
        if cached.record is not None:
            differences = _differences(cached.record, wanted)
            candidates.append((len(differences), cached.record.created, cached, differences))
    if not candidates:
        return Match()
    fewest = min(number for number, *_ in candidates)
    _, _, cached, differences = max((each for each in candidates if each[0] == fewest), key=lambda each: each[1])
    return Match(record=None if differences else cached.record, path=cached.path, differences=differences)


def _differences(record: PerformanceRecord, wanted: dict[str, Any]) -> tuple[str, ...]:
    has = {name: getattr(record.fingerprint, name) for name in wanted}
    # torch says "2.13.0+cpu" of itself where its distribution is 2.13.0.
    has["torch"] = has["torch"].partition("+")[0]
    wanted = {**wanted, "torch": (wanted["torch"] or "").partition("+")[0]}
    return tuple(
        f"{name}: it has {has[name]!r}, here is {wanted[name]!r}" for name in wanted if has[name] != wanted[name]
    )


def check_record(subject: Subject) -> Iterator[Finding]:
    """Whether plans can be made at the first request, or something is measured first."""
    for cached in subject.records:
        if cached.record is None:
            yield note("record", f"not used: {cached.problem}", f"remove {cached.path}")
    for args in subject.apps:
        yield _record(subject, args)


def _record(subject: Subject, args: AppArgs) -> Finding:
    match = record_for(subject, args)
    if match.record is not None:
        found = f"{match.path}, of {match.record.created}, {match.record.provenance}"
        if match.record.is_complete:
            return ok("record", found)
        return note("record", f"{found}: profiling was cut short", "run `selectn profile` again for tighter times")
    if args.offload.num_offloaded != "auto":
        return ok("record", "a plan by hand (offload.num_offloaded) needs none")
    if match.path is None or any(each.startswith("model: ") for each in match.differences):
        return note("record", "there is no performance record of this model on this machine yet", MEASURE)
    return warning("record", f"{match.path} is of something else: {'; '.join(match.differences)}", MEASURE)


def planned(subject: Subject, args: AppArgs, record: PerformanceRecord) -> tuple[Planner, Workload]:
    """A planner, and the fullest batch that the configuration guarantees, with its objectives."""
    objectives = resolve_objectives(args.slo, record.step_times(), args.batch)
    workload = Workload(
        batch=args.batch.max_requests,
        length=max(1, args.batch.kv_tokens // args.batch.max_requests),
        tpot_s=objectives.tpot_s,
        ttft_s=objectives.ttft_s,
        chunk_tokens=args.batch.max_batch_tokens,
    )
    return planner_of([record], device_bytes=subject.device_bytes(args), max_slots=MAX_SLOTS), workload


def check_objectives(subject: Subject) -> Iterator[Finding]:
    """Whether any plan meets the objectives with a full batch, by the record."""
    for args in subject.apps:
        record = record_for(subject, args).record
        if record is not None:
            yield _objectives(*planned(subject, args, record))


def _objectives(planner: Planner, workload: Workload) -> Finding:
    assert workload.tpot_s is not None
    assert workload.ttft_s is not None
    asked = (
        f"TPOT {workload.tpot_s * 1e3:.0f} ms and TTFT {workload.ttft_s * 1e3:.0f} ms, {workload.batch} requests of "
        f"{workload.length} tokens"
    )
    try:
        found = planner.plan(workload)
    except Infeasible as reason:
        return warning("objectives", f"{asked}: {reason}", "loosen slo, or change what limits: `selectn plan`")
    except NotMeasured:
        seen = f"{asked}: no step as large was measured"
        return note("objectives", seen, "`selectn profile` with a larger --max-length, or smaller batch.max_requests")
    return ok("objectives", f"{asked}: {found.k_min} to {found.k_max} of {found.plan.num_units} may be offloaded")


def check_need(subject: Subject) -> Iterator[Finding]:
    """Whether anything is offloaded although the model and the KV cache that is guaranteed would fit the device."""
    for args in subject.apps:
        record = record_for(subject, args).record
        if record is not None and args.offload.policy != "none" and args.offload.num_offloaded != 0:
            yield _need(subject, args, record)


def _need(subject: Subject, args: AppArgs, record: PerformanceRecord) -> Finding:
    planner, _ = planned(subject, args, record)
    memory, capacity = planner.sources[0].memory, subject.device_bytes(args)
    kv_sectors = memory.kv.sectors_for(args.batch.kv_tokens)
    everything = memory.device_bytes_for(sum(memory.unit_sectors(record.unit_bytes)) + kv_sectors)
    found = f"all weights and {args.batch.kv_tokens} tokens of KV take {gib(everything)}"
    if capacity is None:
        return note(
            "need", f"{found}, and the device is as large as it takes: what offloading frees is KV beyond these"
        )
    if everything > capacity:
        return ok("need", f"{found}, and the device has {gib(capacity)}: some must be offloaded")
    found = f"{found}, and the device has {gib(capacity)}: all would fit"
    if args.offload.num_offloaded == "auto":
        return note("need", f"{found}. What is offloaded makes room for more KV", "policy: none, if that is not wanted")
    do = "set offload.num_offloaded to 0, or raise batch.kv_tokens to what is wanted"
    return warning("need", f"{found}, and a plan by hand offloads {args.offload.num_offloaded}", do)
