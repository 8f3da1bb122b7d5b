"""A node's telemetry where NVML answers, fails in every way it can, and is not there at all.

The library is a stand-in in C, loaded through the real pynvml: what fails here is hardware that this machine lacks.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from cluster.node import telemetry
from cluster.node.telemetry import Telemetry, TelemetryConfig
from cluster.protocol.node_reports import Unavailable
from selectn_core.device.bus import Bus
from selectn_core.errors import ConfigError
from tests.standins.nvml import ROOT, Sampler, StandIn

# Long enough for a busy machine; only a call that hangs waits for it.
DEADLINE_S = 2.0
SWITCH, HOST_BRIDGE, SYSTEM = 10, 30, 50
LINK = ("pcie_generation", "pcie_width", "pcie_max_generation", "pcie_max_width")
THROUGHPUT = ("pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> StandIn:
    return StandIn(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(built) -> Iterator[StandIn]:
    built.describe()
    yield built
    built.describe()  # ends what hangs


@pytest.fixture
def sampler(machine) -> Iterator[Sampler]:
    with Sampler(machine.environment, deadline_s=DEADLINE_S) as sampler:
        yield sampler


def causes(gpu: dict[str, Any]) -> dict[str, str]:
    """The cause of every counter that has no value."""
    states = {name: value for name, value in gpu.items() if isinstance(value, dict) and "cause" in value}
    return {name: state["cause"] for name, state in states.items() if name != "trouble"}


def sample_until(sampler: Sampler, gpu: int, trouble: str | None) -> dict[str, Any]:
    """The first sample in which that is the trouble of the GPU."""
    for _ in range(10):
        report = sampler.sample()
        if (report["gpus"][gpu]["trouble"] or {}).get("cause") == trouble:
            return report
    raise AssertionError(report)


def test_every_counter_of_a_healthy_gpu(machine, sampler):
    machine.describe("gpus 1", "value 0 throttle_bits 69", "value 0 ecc_corrected 3", "value 0 ecc_uncorrected 2")
    report = sampler.sample()
    assert report["nvml"] == {"driver_version": "stand-in", "num_gpus": 1}
    (gpu,) = report["gpus"]
    assert gpu == {
        "index": 0,
        "trouble": None,
        "uuid": "GPU-stand-in-0",
        "name": "Stand-in GPU",
        "pci_bus_id": "00000000:10:00.0",
        "memory": {"total_bytes": 24 << 30, "used_bytes": 1 << 30, "free_bytes": 23 << 30},
        "pcie_generation": 1,
        "pcie_width": 16,
        "pcie_max_generation": 4,
        "pcie_max_width": 16,
        "pcie_rx_bytes_per_s": 2_000_000,
        "pcie_tx_bytes_per_s": 30_000,
        "pcie_replays": 0,
        "utilisation": {"compute_percent": 40, "memory_percent": 20},
        "temperature_c": 51,
        "power_w": 65.5,
        "power_limit_w": 150,
        "throttle_reasons": ["sw_power_cap", "hw_thermal_slowdown"],  # and idle, which is none
        "ecc_corrected_errors": 3,
        "ecc_uncorrected_errors": 2,
        "xid_errors": {"total": 0, "last_codes": []},
    }


def test_counters_change_between_samples(machine, sampler):
    assert sampler.sample()["gpus"][1]["temperature_c"] == 51
    machine.describe("value 1 temperature_c 90")
    report = sampler.sample()
    assert [gpu["temperature_c"] for gpu in report["gpus"]] == [51, 90]


class TestBuses:
    def test_gpus_behind_a_switch_or_a_host_bridge_share_one(self, machine, sampler):
        machine.describe("gpus 4", f"level 0 1 {SWITCH}", f"level 1 3 {HOST_BRIDGE}", f"level 0 3 {HOST_BRIDGE}")
        buses = sampler.sample()["buses"]
        assert [bus["gpus"] for bus in buses] == [
            ["GPU-stand-in-0", "GPU-stand-in-1", "GPU-stand-in-3"],
            ["GPU-stand-in-2"],
        ]
        assert [bus["name"] for bus in buses] == ["pcie-00000000:10:00.0", "pcie-00000000:12:00.0"]
        assert {bus["found_by"] for bus in buses} == {"topology"}
        # Generation 4, not the 1 at which an idle link sleeps; 31.5 GB/s at the default efficiency.
        assert [bus["bytes_per_s"] for bus in buses] == pytest.approx([23.94e9] * 2, rel=1e-3)

    def test_a_link_that_came_up_narrow_counts_as_it_is(self, machine, sampler):
        machine.describe("gpus 1", "value 0 pcie_width 8")
        (bus,) = sampler.sample()["buses"]
        assert bus["bytes_per_s"] == pytest.approx(11.97e9, rel=1e-3)

    def test_where_the_driver_knows_no_topology_one_bus_is_assumed(self, machine, sampler):
        machine.describe("error * nvmlDeviceGetTopologyCommonAncestor 3")
        (bus,) = sampler.sample()["buses"]
        assert (len(bus["gpus"]), bus["found_by"]) == (2, "assumed")

    def test_the_configuration_comes_first(self, machine):
        machine.describe("gpus 3", f"level 0 1 {SWITCH}", f"level 1 2 {SWITCH}", f"level 0 2 {SWITCH}")
        buses = [{"name": "mine", "gpus": ["GPU-stand-in-2"], "gb_per_s": 5}, {"name": "elsewhere", "gpus": [7]}]
        with Sampler(machine.environment, deadline_s=DEADLINE_S, buses=buses) as sampler:
            mine, found = sampler.sample()["buses"]
        assert mine == {
            "name": "mine",
            "gpus": ["GPU-stand-in-2"],
            "bytes_per_s": 5e9,
            "found_by": "configuration",
            "rate_from": "configuration",
        }
        assert found["gpus"] == ["GPU-stand-in-0", "GPU-stand-in-1"]

    def test_an_emulated_one_may_be_configured_beside_gpus(self, machine):
        with Sampler(machine.environment, deadline_s=DEADLINE_S, buses=[{"name": "e", "gb_per_s": 1}]) as sampler:
            assert [bus["name"] for bus in sampler.sample()["buses"]][-1] == "e"

    def test_it_outlives_a_gpu_and_is_not_found_again(self, machine, sampler):
        shared = f"level 0 1 {SWITCH}"
        machine.describe(shared)
        before = sampler.sample()["buses"]
        machine.describe("lost 1")
        assert sampler.sample()["buses"] == before
        machine.describe("lost 0", "lost 1")
        (bus,) = sampler.sample()["buses"]
        assert bus["gpus"] == before[0]["gpus"]
        assert bus["bytes_per_s"]["cause"] == "gpu_lost"


class TestCountersFail:
    @pytest.mark.parametrize(
        ("code", "cause"),
        [
            (pynvml.NVML_ERROR_NOT_SUPPORTED, "not_supported"),
            (pynvml.NVML_ERROR_NO_PERMISSION, "no_permission"),
            (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, "not_supported"),
            (pynvml.NVML_ERROR_UNKNOWN, "failed"),
            (12345, "failed"),
        ],
    )
    def test_one_that_fails_is_a_state_and_the_others_are_values(self, machine, sampler, code, cause):
        machine.describe(f"error 0 nvmlDeviceGetPowerUsage {code}")
        report = sampler.sample()
        assert causes(report["gpus"][0]) == {"power_w": cause}
        assert report["gpus"][0]["power_w"]["detail"]
        assert report["gpus"][0]["trouble"] is None
        assert causes(report["gpus"][1]) == {}

    def test_a_gpu_that_supports_nothing_but_its_name(self, machine, sampler):
        optional = "TemperatureV Temperature PowerUsage EnforcedPowerLimit TotalEccErrors PcieReplayCounter MemoryInfo "
        optional += (
            "UtilizationRates PcieThroughput CurrentClocksEventReasons CurrPcieLinkGeneration CurrPcieLinkWidth "
        )
        optional += "MaxPcieLinkGeneration MaxPcieLinkWidth"
        statements = [f"error 0 nvmlDeviceGet{name} 3" for name in optional.split()]
        machine.describe(*statements, "error 0 nvmlDeviceRegisterEvents 3")
        report = sampler.sample()
        gpu = report["gpus"][0]
        assert gpu["trouble"] is None
        assert gpu["uuid"] == "GPU-stand-in-0"
        assert set(causes(gpu).values()) == {"not_supported"}
        assert len(causes(gpu)) == len(gpu) - len(("index", "trouble", "uuid", "name", "pci_bus_id"))
        assert report["buses"][0]["bytes_per_s"]["cause"] == "not_supported"

    def test_an_older_driver_is_asked_by_older_names(self, machine, sampler):
        missing = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
        machine.describe(
            f"error * nvmlDeviceGetTemperatureV {missing}",
            f"error * nvmlDeviceGetCurrentClocksEventReasons {missing}",
            "value * throttle_bits 8",
        )
        for gpu in sampler.sample()["gpus"]:
            assert (gpu["temperature_c"], gpu["throttle_reasons"]) == (51, ["hw_slowdown"])

    def test_a_throttle_reason_of_a_later_driver_is_not_dropped(self, machine, sampler):
        machine.describe("value 0 throttle_bits 4096")
        assert sampler.sample()["gpus"][0]["throttle_reasons"] == ["other"]


class TestLost:
    def test_while_running_its_link_may_go_on_answering(self, machine, sampler):
        assert sampler.sample()["gpus"][1]["trouble"] is None
        machine.describe("lost 1")
        healthy, lost = sampler.sample()["gpus"]
        assert causes(healthy) == {}
        assert lost["trouble"]["cause"] == "gpu_lost"
        assert lost["uuid"] == "GPU-stand-in-1"
        assert all(isinstance(lost[name], int) for name in (*LINK, *THROUGHPUT))
        assert set(causes(lost).values()) == {"gpu_lost"}
        assert {"memory", "utilisation", "temperature_c", "power_w", "ecc_uncorrected_errors"} <= set(causes(lost))

    def test_it_may_come_back(self, machine, sampler):
        sampler.sample()
        machine.describe("lost 1")
        assert sampler.sample()["gpus"][1]["trouble"]["cause"] == "gpu_lost"
        machine.describe()
        assert causes(sampler.sample()["gpus"][1]) == {}

    def test_one_that_was_lost_before_the_agent_started(self, machine, sampler):
        machine.describe("lost 0")
        report = sampler.sample()
        lost, healthy = report["gpus"]
        assert lost["trouble"]["cause"] == "gpu_lost"
        assert set(causes(lost).values()) == {"gpu_lost"}
        assert causes(healthy) == {}
        assert [bus["gpus"] for bus in report["buses"]] == [["gpu-0"], ["GPU-stand-in-1"]]

    def test_one_that_needs_a_reset(self, machine, sampler):
        sampler.sample()
        machine.describe(f"error 0 nvmlDeviceGetMemoryInfo {pynvml.NVML_ERROR_RESET_REQUIRED}")
        assert sampler.sample()["gpus"][0]["trouble"]["cause"] == "reset_required"

    def test_one_that_may_not_be_opened(self, machine, sampler):
        machine.describe(f"error 0 nvmlDeviceGetHandleByIndex {pynvml.NVML_ERROR_NO_PERMISSION}")
        closed, healthy = sampler.sample()["gpus"]
        assert closed["trouble"]["cause"] == "no_permission"
        assert causes(healthy) == {}


class TestXid:
    def test_errors_are_counted_and_the_last_are_named(self, machine, sampler):
        assert sampler.sample()["gpus"][0]["xid_errors"] == {"total": 0, "last_codes": []}
        machine.describe("xid 0 31", "xid 0 79")
        machine_after = sampler.sample()["gpus"]
        assert machine_after[0]["xid_errors"] == {"total": 2, "last_codes": [31, 79]}
        assert machine_after[1]["xid_errors"] == {"total": 0, "last_codes": []}
        assert sampler.sample()["gpus"][0]["xid_errors"]["total"] == 2

    def test_a_storm_is_counted_in_full_and_remembered_in_part(self, machine, sampler):
        machine.describe(*(f"xid 1 {code}" for code in range(100)))
        sampler.sample()
        last = sampler.sample()["gpus"][1]["xid_errors"]
        assert last == {"total": 100, "last_codes": list(range(92, 100))}


@pytest.mark.slow
class TestHang:
    @pytest.mark.parametrize(
        "call", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetPcieThroughput"]
    )
    def test_the_other_gpus_are_reported(self, machine, sampler, call):
        machine.describe("gpus 3", f"hang 1 {call}")
        first, hung, third = sampler.sample()["gpus"]
        assert causes(first) == causes(third) == {}
        assert hung["trouble"]["cause"] == "timed_out"
        assert set(causes(hung).values()) == {"timed_out"}

    def test_what_was_read_before_it_is_kept_and_the_call_is_named(self, machine, sampler):
        machine.describe("hang 0 nvmlDeviceGetPowerUsage")
        gpu = sampler.sample()["gpus"][0]
        assert gpu["temperature_c"] == 51
        assert causes(gpu)["power_w"] == "timed_out"
        assert "power_w" in gpu["trouble"]["detail"]
        later = sampler.sample()["gpus"][0]
        assert causes(later)["temperature_c"] == "timed_out"  # what was read then is not read now
        assert later["uuid"] == "GPU-stand-in-0"

    def test_no_thread_is_started_in_its_place(self, machine, sampler):
        before = sampler.sample()["num_threads"]
        machine.describe("hang 0 nvmlDeviceGetPowerUsage")
        assert [sampler.sample()["num_threads"] for _ in range(3)] == [before] * 3

    def test_it_is_read_again_when_the_call_returns(self, machine, sampler):
        machine.describe("hang 0 *")
        assert sampler.sample()["gpus"][0]["trouble"]["cause"] == "timed_out"
        machine.describe()
        assert causes(sample_until(sampler, 0, None)["gpus"][0]) == {}

    def test_the_process_can_still_end(self, machine, sampler):
        machine.describe("hang 0 nvmlDeviceGetPowerUsage")
        sampler.sample()
        assert sampler.close() == 0

    def test_topology_may_hang_alone(self, machine, sampler):
        machine.describe("hang 0 nvmlDeviceGetTopologyCommonAncestor")
        for _ in range(2):
            report = sampler.sample()
            assert [causes(gpu) for gpu in report["gpus"]] == [{}, {}]
            assert [bus["found_by"] for bus in report["buses"]] == ["assumed"]

    def test_nvml_that_hangs_at_its_start_is_used_when_it_has_started(self, machine, sampler):
        machine.describe("hang * nvmlInit")
        report = sampler.sample()
        assert (report["nvml"]["cause"], report["gpus"]) == ("timed_out", [])
        assert "nvmlInit" in report["nvml"]["detail"]
        assert report["host"]["memory"]["available_bytes"] > 0
        machine.describe()
        for _ in range(10):
            report = sampler.sample()
            if report["gpus"]:
                break
        assert [causes(gpu) for gpu in report["gpus"]] == [{}, {}]


class TestNoNvml:
    @pytest.mark.parametrize(
        "code",
        [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.NVML_ERROR_UNKNOWN],
    )
    def test_one_that_does_not_start_is_a_state(self, machine, sampler, code):
        machine.describe(f"error * nvmlInit {code}")
        report = sampler.sample()
        assert report["nvml"]["cause"] == ("failed" if code == pynvml.NVML_ERROR_UNKNOWN else "nvml_failed")
        assert report["gpus"] == []

    def test_none_on_this_machine(self, bus_name):
        try:
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            pass
        else:
            pytest.skip("this machine has an NVML")
        bus = Bus(bus_name, 3e9)
        with Sampler({}, deadline_s=DEADLINE_S) as sampler:
            report = sampler.sample()
        bus.close()
        assert (report["nvml"]["cause"], report["gpus"]) == ("nvml_absent", [])
        (reported,) = [each for each in report["buses"] if each["name"] == bus_name]
        assert (reported["bytes_per_s"], reported["found_by"], reported["gpus"]) == (3e9, "emulated", [])
        assert report["host"]["memory"]["limit_bytes"] >= report["host"]["memory"]["available_bytes"] > 0

    def test_it_is_tried_again_after_a_while(self, monkeypatch):
        answers = iter([Unavailable(cause="nvml_failed", detail="no driver"), NO_GPUS])
        monkeypatch.setattr(telemetry.nvml, "start_nvml", lambda: next(answers))
        monkeypatch.setattr(telemetry.nvml, "stop_nvml", lambda: None)
        with Telemetry(TelemetryConfig(deadline_s=DEADLINE_S)) as node:
            assert isinstance(node.sample().nvml, Unavailable)
            assert isinstance(node.sample().nvml, Unavailable)  # not asked
            monkeypatch.setattr(telemetry, "RETRY_NVML_S", 0)
            assert node.sample().nvml == NO_GPUS


NO_GPUS = telemetry.NvmlInfo(driver_version="1", num_gpus=0)


@pytest.fixture
def bus_name(tmp_path) -> Iterator[str]:
    name = f"test-{tmp_path.parent.name}-{tmp_path.name}"[:64]
    yield name
    Bus.unlink(name)


def test_host_memory_that_cannot_be_read_is_a_state(monkeypatch):
    def unreadable() -> None:
        raise PermissionError("not for you")

    def no_pressure() -> None:
        raise FileNotFoundError("/proc/pressure/memory")

    monkeypatch.setattr(telemetry, "available_host_memory", unreadable)
    monkeypatch.setattr(telemetry, "memory_pressure", no_pressure)
    host = telemetry.read_host(Path("/nowhere"))
    assert isinstance(host.memory, Unavailable)
    assert isinstance(host.pressure, Unavailable)
    assert isinstance(host.shared_memory_free_bytes, Unavailable)
    assert (host.memory.cause, host.pressure.cause) == ("failed", "not_supported")


def test_sampling_needs_neither_torch_nor_ray():
    code = "import sys, cluster.node.telemetry; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


@pytest.mark.parametrize(("name", "value"), [("period_s", 0), ("deadline_s", -1), ("pcie_efficiency", 1.5)])
def test_a_wrong_configuration_names_the_field(name, value):
    with pytest.raises(ConfigError, match=f"telemetry.{name}={value} is not allowed: expected (more than 0|at least)"):
        TelemetryConfig(**{name: value})
