"""What of `make gpu-check` needs no GPU: on a fake of torch.cuda, on the emulated device, and with other processes.

Whether a card passes, only a card can tell.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import gpu_check
from benchmarks.gpu_checks import steps
from benchmarks.gpu_checks.bandwidth import check_bandwidth
from benchmarks.gpu_checks.children import RESULT, Child, Ended, bench_findings, own_findings, pytest_findings, run_all
from benchmarks.gpu_checks.finding import Finding, do_all_hold, failed, measured, noted
from benchmarks.gpu_checks.pins import check_registration, driver_flags, read_only_support
from benchmarks.gpu_checks.steps import MemoryState, check_first_seen, check_kernels, kernel_findings, memory_findings
from selectn_core.device.cuda import CudaDevice
from selectn_core.engine.engine import Engine
from tests.standins.fake_cuda import FakeCuda, install
from tests.support.engines import engine_config
from tests.support.tiny_models import tiny_model

CAPACITY_BYTES = 1 << 20
GIB = 1 << 30


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {each.name: each.verdict for each in findings}


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDevice]:
    install(monkeypatch, cuda)
    with CudaDevice(CAPACITY_BYTES) as device:
        yield device


class TestProcesses:
    SECONDS = 120.0  # on a busy machine

    def child(self, code: str, *, limit_s: float = SECONDS, name: str = "check") -> Child:
        return Child(name=name, command=[sys.executable, "-c", code, RESULT], limit_s=limit_s, read=own_findings)

    def write(self, *findings: Finding) -> str:
        text = json.dumps([each.as_dict() for each in findings])
        return f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({text!r})"

    def test_one_that_fails_hangs_or_dies_does_not_stop_the_others(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        hanging = (
            "import subprocess, sys, time;"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
            f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
        )
        good = noted("good", "seen", "yes")
        said: list[str] = []
        found = run_all(
            [
                self.child("raise SystemExit('no driver')", name="dies"),
                self.child(hanging, limit_s=3.0, name="hangs"),
                self.child("import sys; open(sys.argv[1], 'w').write('{')", name="garbles"),
                self.child(self.write(good), name="good"),
            ],
            600.0,
            said.append,
        )
        assert [(each.check, each.verdict) for each in found] == [
            ("dies", "FAIL"),
            ("hangs", "FAIL"),
            ("garbles", "FAIL"),
            ("good", "noted"),
        ]
        assert "no driver" in found[0].figure
        assert "ended after" in found[1].figure
        self.assert_gone(int(pid_file.read_text()))

    def assert_gone(self, pid: int) -> None:
        """What a check has started ends with it."""
        deadline_s = time.monotonic() + self.SECONDS
        while time.monotonic() < deadline_s:
            try:
                os.kill(pid, 0)
                if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return
            except (ProcessLookupError, FileNotFoundError):
                return
            time.sleep(0.05)
        pytest.fail("a process of a check that was ended is still there")

    def test_the_time_is_bounded_in_all(self) -> None:
        sleeping = self.child("import time; time.sleep(600)", name="sleeps")
        found = run_all([sleeping, self.child(self.write())], 2.0, lambda _: None)
        assert [each.verdict for each in found] == ["FAIL", "FAIL"]
        assert "nothing is left of 2 s" in found[1].figure

    def test_every_check_of_a_run_has_a_time_of_its_own_and_the_last_is_the_longest(self) -> None:
        children = gpu_check.children("embedded", quick=True)
        assert gpu_check.BUDGET_S < 600
        assert sum(each.limit_s for each in children[:-1]) < gpu_check.BUDGET_S, "the last one has a time too"
        assert [each.name for each in children][-3:] == ["device contract", "token identity", "bench_interval"]


class TestReading:
    def test_tests_that_lacked_a_gpu_have_failed(self) -> None:
        output = "SKIPPED [4] tests/contract/test_device.py:78: no CUDA device\n== 9 passed, 4 skipped in 1s ==\n"
        for text, code, holds in ((output, 0, False), ("9 passed in 1s", 0, True), ("1 failed in 1s", 1, False)):
            (found,) = pytest_findings("contract", Ended(code=code, output=text, seconds=1.0, result=None))
            assert found.holds is holds

    def test_a_benchmarks_checks_are_findings_and_noise_is_no_failure(self) -> None:
        checks = [
            {"name": "ratio", "value": 1.05, "target": "<= 1.08", "is_timed": False, "holds": True},
            {"name": "error", "value": 0.2, "target": "<= 0.10", "is_timed": False, "holds": False},
            {"name": "cost", "value": 1.2, "target": "<= 1.01", "is_timed": True, "holds": None},
        ]
        ended = Ended(code=1, output="", seconds=1.0, result=json.dumps({"checks": checks}))
        found = bench_findings("bench_interval", ended)
        assert verdicts(found) == {"ratio": "ok", "error": "FAIL", "cost": "noted"}
        (died,) = bench_findings("bench_interval", Ended(code=1, output="x\nno memory\n", seconds=1.0, result=None))
        assert died.holds is False
        assert "no memory" in died.figure


class TestReport:
    @pytest.mark.parametrize(
        ("findings", "code"),
        [
            ([measured("a", "x", 1.0, "<= 2"), noted("a", "y", "seen")], 0),
            ([measured("a", "x", 3.0, "<= 2"), measured("b", "x", 1.0, "<= 2")], 1),
            ([noted("a", "y", "seen")], 1),
            ([], 1),
        ],
    )
    def test_the_exit_code_says_whether_all_hold(self, findings, code, tmp_path, capsys) -> None:
        file = tmp_path / "build" / "gpu_check.json"
        assert gpu_check.report(findings, 12.0, file) == code
        assert do_all_hold(findings) is (code == 0)
        result = json.loads(file.read_text(encoding="utf-8"))
        assert [each["verdict"] for each in result["findings"]] == [each.verdict for each in findings]
        assert result["seconds"] == 12.0
        printed = capsys.readouterr().out
        assert all(each.figure in printed for each in findings)

    def test_without_a_gpu_nothing_is_checked_and_the_code_is_two(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr("sys.argv", ["gpu_check"])
        assert gpu_check.main() == 2
        assert "nothing was checked" in capsys.readouterr().out

    def test_the_help_says_what_the_codes_mean(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr("sys.argv", ["gpu_check", "--help"])
        with pytest.raises(SystemExit):
            gpu_check.main()
        assert "2 if there is no GPU" in capsys.readouterr().out


class TestPins:
    """On a fake of torch.cuda, with the kernel's real mappings."""

    def found(self, device: CudaDevice, cuda: FakeCuda, tmp_path: Path) -> list[Finding]:
        def flags_of(memory: torch.Tensor) -> int:
            return cuda.registered[memory.data_ptr()][1]

        return check_registration(device, flags_of, memory_dir=tmp_path, disk_dir=tmp_path)

    def test_all_is_locked_and_portable_on_a_discrete_card(self, device, cuda, tmp_path) -> None:
        found = self.found(device, cuda, tmp_path)
        assert set(verdicts(found).values()) == {"ok"}
        assert all("flags 1 (portable)" in each.figure for each in found)
        assert len(cuda.registered) == 1, "only private memory stays locked"

    def test_what_is_refused_is_a_failure_but_for_a_disks_pages(self, device, cuda, tmp_path) -> None:
        cuda.registration_status = 2
        found = self.found(device, cuda, tmp_path)
        assert [each.verdict for each in found] == ["FAIL", "FAIL", "noted"]
        assert all("error 2" in each.figure for each in found)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the driver answers here")
    def test_without_a_driver_its_answers_are_unknown(self) -> None:
        assert driver_flags(torch.zeros(1)) is None
        assert "does not say" in read_only_support().figure


class TestLink:
    """On a fake of torch.cuda, on which copies take the time that it is told."""

    NUM_BYTES = 100_000
    host_s = 0.0  # the host's time, which passes where a test says so

    def now_s(self) -> float:
        return self.host_s

    def test_what_a_link_carries_is_found(self, device, cuda) -> None:
        cuda.use_s = 0.05
        found = check_bandwidth(device, lambda: None, num_bytes=self.NUM_BYTES, clock=self.now_s)
        assert verdicts(found) == {
            "pinned, alone": "noted",
            "pinned, beside compute": "noted",
            "beside compute over alone": "ok",
            "issuing copies, of the time they take": "ok",
        }
        assert found[0].value == pytest.approx(self.NUM_BYTES / 0.05 / 1e9, rel=0.01)
        assert device.allocated_bytes == 0

    def test_a_link_that_compute_slows_and_copies_that_the_host_waits_for_fail(self, device, cuda, monkeypatch) -> None:
        send = device.copy_async
        cuda.use_s = 0.02

        def compute() -> None:
            cuda.use_s = 0.04

        def blocking(*args: Any, **kwargs: Any) -> Any:
            self.host_s += 0.005
            return send(*args, **kwargs)

        monkeypatch.setattr(device, "copy_async", blocking)
        synchronize = device.synchronize

        def synchronize_and_rest() -> None:
            synchronize()
            cuda.use_s = 0.02

        monkeypatch.setattr(device, "synchronize", synchronize_and_rest)
        found = check_bandwidth(device, compute, num_bytes=self.NUM_BYTES, clock=self.now_s)
        assert [each.verdict for each in found[2:]] == ["FAIL", "FAIL"]


class TestSteps:
    def test_kernels_and_lengths_of_a_models_steps(self) -> None:
        """On the emulated device, whose kernels are the CPU's."""
        loaded = tiny_model("llama")
        engine = Engine(loaded, engine_config(0, kv_tokens=8192, max_batch_tokens=256))
        try:
            kernels = check_kernels(engine, DeviceType.CPU)
            assert verdicts(kernels) == {"decode": "ok", "prefill": "ok"}
            assert "scaled_dot_product" in kernels[1].figure
            seen: list[int] = []

            def run(length: int) -> None:
                seen.append(length)
                engine.batching.run_step([(1, length)] * steps.BATCH)

            found = check_first_seen(run, engine.device.synchronize, steps.LENGTHS[:3])
            assert [each.verdict for each in found[:-1]] == ["noted", "noted"]
            assert sorted(set(seen)) == list(steps.LENGTHS[:3])
        finally:
            engine.close()

    def test_a_kernel_of_cudnn_or_none_at_all_fails(self) -> None:
        (flash,) = kernel_findings("kernels", "decode", ["flash_fwd_splitkv_kernel"])
        (planned,) = kernel_findings("kernels", "decode", ["cudnn_generated_fort_native_sdpa_sm90", "softmax"])
        (nothing,) = kernel_findings("kernels", "decode", steps.attention_names({"gemm", "copy"}))
        assert (flash.holds, planned.holds, nothing.holds) == (True, False, False)

    @pytest.mark.parametrize(("first_s", "verdict"), [(0.0, "ok"), (0.05, "FAIL")])
    def test_a_length_that_is_slow_the_first_time_shows(self, first_s: float, verdict: str) -> None:
        seen: set[int] = set()
        now_s = 0.0

        def run(length: int) -> None:
            nonlocal now_s
            now_s += 0.005 + (first_s if length not in seen else 0.0)
            seen.add(length)

        *_, found = check_first_seen(run, lambda: None, clock=lambda: now_s)
        assert found.verdict == verdict

    def state(self, *, used: int, in_accounts: int) -> MemoryState:
        return MemoryState(driver_free=80 * GIB - used, torch_reserved=0, in_accounts=in_accounts)

    def test_memory_that_no_account_has_is_what_the_driver_says_beside_them(self) -> None:
        before = self.state(used=GIB, in_accounts=0)
        loaded = self.state(used=12 * GIB, in_accounts=10 * GIB)
        stepped, closed = self.state(used=15 * GIB, in_accounts=10 * GIB), self.state(used=2 * GIB, in_accounts=0)
        found = memory_findings(before, loaded, stepped, closed, kept_back_bytes=int(2.4 * GIB))
        assert {each.name: each.value for each in found if each.target} == {
            "in no account, loaded": 1024.0,
            "in no account, after steps": 4096.0,
            "not back after closing": 1024.0,
            "in the accounts after closing": 0.0,
        }
        assert [each.name for each in found if each.holds is False] == ["in no account, after steps"]


def test_as_failed_a_finding_has_no_number() -> None:
    assert failed("a", "b", "why").as_dict() == {
        "check": "a",
        "name": "b",
        "figure": "why",
        "holds": False,
        "value": None,
        "target": None,
    }
