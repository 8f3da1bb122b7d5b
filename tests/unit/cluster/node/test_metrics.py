"""What of a report becomes a metric."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

from cluster.metrics.table import BY_NAME, NODE
from cluster.node.metrics import measurements
from cluster.protocol.node_reports import (
    BusReport,
    Cause,
    DeviceMemory,
    HostReport,
    NodeTelemetry,
    NvmlInfo,
    Unavailable,
    Utilisation,
    XidErrors,
)
from selectn_core.device.host_memory import HostMemory, MemoryPressure
from tests.standins.nvml import ROOT
from tests.unit.cluster.node.test_bus_topology import LOST, UNSUPPORTED, gpu

GPU = gpu(
    3,
    memory=DeviceMemory(total_bytes=9, used_bytes=4, free_bytes=5),
    utilisation=Utilisation(compute_percent=50, memory_percent=1),
    throttle_reasons=("hw_slowdown",),
    xid_errors=XidErrors(total=2, last_codes=(79,)),
    pcie_generation=4,
    pcie_rx_bytes_per_s=7,
    pcie_tx_bytes_per_s=8,
    pcie_replays=0,
    temperature_c=60,
    power_w=1.5,
    ecc_uncorrected_errors=1,
)
BUS = BusReport(name="b", gpus=("GPU-3",), bytes_per_s=2e9, found_by="topology", rate_from="pcie_link")
HOST = HostReport(
    memory=HostMemory(available_bytes=1, limit_bytes=2, limited_by="x"),
    pressure=MemoryPressure(
        some_avg10_percent=3,
        some_avg60_percent=0,
        some_total_s=0,
        full_avg10_percent=0,
        full_avg60_percent=0,
        full_total_s=0,
        scope="x",
    ),
    shared_memory_free_bytes=1,
)
FULL = NodeTelemetry(
    sampled_s=0,
    sampled_unix_s=0,
    sampling_s=0.5,
    nvml=NvmlInfo(driver_version="1", num_gpus=1),
    gpus=(GPU,),
    buses=(BUS,),
    host=HOST,
)


def test_a_full_report_sets_every_gauge_once():
    found = {name: (label, number) for name, label, number in measurements(FULL)}
    of_ledger = {"selectn_ledger_capacity_bytes", "selectn_ledger_reserved_bytes"}
    assert set(found) == {metric.name for metric in NODE} - of_ledger
    assert len(list(measurements(FULL))) == len(found)
    assert found["selectn_gpu_up"] == ("3", 1)
    assert found["selectn_gpu_memory_used_bytes"] == ("3", 4)
    assert found["selectn_gpu_throttled"] == ("3", 1)
    assert found["selectn_gpu_xid_errors"] == ("3", 2)
    assert found["selectn_bus_bytes_per_s"] == ("b", 2e9)
    assert found["selectn_host_memory_pressure_percent"] == (None, 3)
    assert {name for name, (label, _) in found.items() if label is None} == {
        name for name in found if not BY_NAME[name].labels
    }


def test_what_has_no_value_is_left_out_and_a_gpu_in_trouble_is_down():
    missing = Unavailable(cause="failed", detail="")
    poor = replace(
        FULL,
        gpus=(replace(gpu(0, trouble=LOST), pcie_max_generation=UNSUPPORTED, pcie_width=UNSUPPORTED),),
        buses=(replace(BUS, bytes_per_s=LOST),),
        host=HostReport(memory=missing, pressure=missing, shared_memory_free_bytes=missing),
    )
    assert set(measurements(poor)) == {("selectn_node_sampling_seconds", None, 0.5), ("selectn_gpu_up", "0", 0.0)}


def test_the_docs_name_every_cause():
    page = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page.split("## States")[1], flags=re.MULTILINE)) >= set(get_args(Cause))
