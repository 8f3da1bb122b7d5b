"""What the doctor says of performance records, and of plans that they allow. The machine is made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.commands.doctor import records
from deployments.commands.doctor.findings import Severity
from deployments.commands.doctor.memory import store_bytes
from selectn_core.planning.record import PerformanceRecord
from tests.support.odd_machine import ONE_GPU, VERSIONS, OddMachine, only
from tests.support.records import MIB, NUM_LAYERS, layer_record

OK, NOTE, WARNING, ERROR = Severity
# What the records of tests/support/records.py were measured with.
ARGS: dict[str, Any] = {"batch": {"max_requests": 8, "max_batch_tokens": 256, "page_size": 16, "kv_tokens": 2048}}


def record_of(odd: OddMachine, **fields: Any) -> PerformanceRecord:
    """One that was measured on the made-up machine."""
    running = {
        "device_name": "Made-up CPU",
        "compute_threads": 7,
        "link": "emulated at 2 GB/s",
        "torch": "2.13.0+cpu",
        "transformers": VERSIONS["transformers"],
    }
    record = layer_record()
    return replace(record, fingerprint=replace(record.fingerprint, **{**running, **fields}))


@pytest.fixture
def odd(tmp_path) -> OddMachine:
    return OddMachine(tmp_path)


def cached(odd: OddMachine, *records_: PerformanceRecord) -> dict[str, Any]:
    """The reading of a cache with these."""
    paths = []
    for index, record in enumerate(records_):
        paths.append(odd.root / f"{index}.yaml")
        record.save(paths[-1])
    return {"cached_records": lambda: paths}


def args_with(**sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**ARGS.get(name, {}), **sections.get(name, {})} for name in {*ARGS, *sections}}


def test_no_record_yet(odd) -> None:
    finding = only(records.check_record(odd.subject(ARGS)))
    assert finding.severity == NOTE
    assert "selectn profile" in finding.do
    by_hand = odd.subject(args_with(offload={"num_offloaded": 3}))
    assert only(records.check_record(by_hand)).severity == OK


def test_the_record_of_this_configuration(odd) -> None:
    subject = odd.subject(ARGS, **cached(odd, record_of(odd)))
    assert only(records.check_record(subject)).severity == OK
    assert store_bytes(subject, subject.apps[0]) == (NUM_LAYERS * 12 + 20) * MIB
    incomplete = odd.subject(ARGS, **cached(odd, replace(record_of(odd), is_complete=False)))
    assert only(records.check_record(incomplete)).severity == NOTE


@pytest.mark.parametrize(
    "other",
    [
        {"max_requests": 16},
        {"torch": "2.12.0"},
        {"device_name": "Another CPU"},
        {"compute_threads": 3},
        {"link": "emulated at 4 GB/s"},
        {"page_size": 32},
        {"unit": "block"},
    ],
)
def test_a_record_of_something_else_is_named_with_what_differs(odd, other) -> None:
    finding = only(records.check_record(odd.subject(ARGS, **cached(odd, record_of(odd, **other)))))
    assert finding.severity == WARNING
    assert f"{next(iter(other))}: it has" in finding.found


def test_a_record_of_another_model_is_no_record(odd) -> None:
    finding = only(records.check_record(odd.subject(ARGS, **cached(odd, record_of(odd, model="another")))))
    assert finding.severity == NOTE
    assert "no performance record of this model" in finding.found


def test_the_record_of_a_gpu_has_its_name(odd) -> None:
    readings = cached(odd, record_of(odd, device="cuda", device_name="Another GPU", compute_threads=0, link="own"))
    finding = only(records.check_record(odd.subject(ARGS, **readings, cuda=lambda: ONE_GPU)))
    assert "device_name: it has 'Another GPU', here is 'Made-up GPU'" in finding.found


def test_of_several_the_one_that_fits(odd) -> None:
    readings = cached(odd, record_of(odd, page_size=32), record_of(odd), record_of(odd, dtype="bfloat16", unit="block"))
    assert "1.yaml" in only(records.check_record(odd.subject(ARGS, **readings))).found


def test_a_damaged_record_is_noted(odd) -> None:
    path = odd.write("damaged.yaml", "version: 1\n")
    damaged, none = records.check_record(odd.subject(ARGS, cached_records=lambda: [path]))
    assert (damaged.severity, none.severity) == (NOTE, NOTE)
    assert "version=1" in damaged.found


def test_objectives(odd) -> None:
    readings = cached(odd, record_of(odd))

    def severity(slo: dict[str, Any], **batch: int) -> Severity:
        args = args_with(slo=slo, device={"memory_gib": 0.2}, batch=batch)
        return only(records.check_objectives(odd.subject(args, **readings))).severity

    assert severity({}) == OK
    assert severity({"tpot_ms": 1.0}) == WARNING
    assert severity({}, kv_tokens=8 * 4096) == NOTE  # longer than what was measured
    assert list(records.check_objectives(odd.subject(ARGS))) == []


def test_infeasible_objectives_say_what_would_be_enough(odd) -> None:
    args = args_with(slo={"tpot_ms": 17.0}, device={"memory_gib": 0.09})
    finding = only(records.check_objectives(odd.subject(args, **cached(odd, record_of(odd)))))
    assert finding.severity == WARNING
    assert "the limit is" in finding.found


def test_whether_anything_must_be_offloaded(odd) -> None:
    readings = cached(odd, record_of(odd))

    def need(memory_gib: float | None, **offload: Any) -> list[Any]:
        args = args_with(device={"memory_gib": memory_gib}, offload=offload)
        return list(records.check_need(odd.subject(args, **readings)))

    assert only(need(0.15)).severity == OK
    assert only(need(8)).severity == NOTE
    assert only(need(None)).severity == NOTE
    assert only(need(8, num_offloaded=4)).severity == WARNING
    assert need(8, num_offloaded=0) == []
    assert need(8, policy="none") == []
