"""What the doctor says of machines that are odd in one way each. Hardware is made up: tests/support/odd_machine.py."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.protocol.node_reports import Unavailable, Utilisation
from deployments.commands.doctor import hardware, limits, memory, network, software
from deployments.commands.doctor.checks import CHECKS, examine
from deployments.commands.doctor.command import exit_code, subject_of
from deployments.commands.doctor.findings import Finding, Severity, ok
from deployments.commands.doctor.machine import Cuda, Limit, Machine, Requirements, why_port_is_not_free
from deployments.commands.doctor.subject import Subject
from tests.support.odd_machine import GIB, ONE_GPU, VERSIONS, OddMachine, made_up_gpu, made_up_node, only

OK, NOTE, WARNING, ERROR = Severity


@pytest.fixture
def odd(tmp_path) -> OddMachine:
    return OddMachine(tmp_path)


def limit_of(which: int, value: int) -> Any:
    return lambda asked: Limit(soft=value, hard=value) if asked == which else Limit(soft=None, hard=None)


# -- all together ----------------------------------------------------------------------------------------------------


def test_a_sound_machine_has_nothing_above_a_note(odd, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path / "cache"))
    findings = examine(odd.subject())
    assert max(each.severity for each in findings) == NOTE
    assert exit_code(findings) == 0
    assert not (tmp_path / "cache").exists()
    checked = {each.check for each in findings}
    assert {"versions", "device", "link", "numa", "shared memory", "host memory", "ports", "stores"} <= checked


def test_a_check_that_raises_is_a_finding_and_stops_no_other(odd) -> None:
    def check_half(subject: Subject):
        yield ok("half", "this much is known")
        raise OSError("the driver\nis on fire")

    def check_last(subject: Subject):
        yield ok("last", "reached")

    half, broken, last = examine(odd.subject(), [check_half, check_last])
    assert half.found == "this much is known"
    assert (broken.check, broken.severity) == ("half", WARNING)
    assert "OSError: the driver is on fire" in broken.found
    assert last.found == "reached"


def test_a_machine_of_which_nothing_can_be_read_still_gets_an_answer(tmp_path) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no reading")

    names = ("requirements", "version_of", "cuda", "sample", "limit", "free_bytes", "cached_records")
    readings: dict[str, Any] = dict.fromkeys(names, fails)
    machine = Machine(proc=tmp_path, sys=tmp_path, **readings)
    findings = examine(Subject(machine, {}, OddMachine(tmp_path / "odd").subject().apps))
    assert sum("no reading" in each.found for each in findings) >= 7
    assert exit_code(findings) >= 1


def test_a_wrong_config_is_an_error_and_the_machine_is_looked_at_all_the_same(odd, tmp_path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{import_path: 'deployments.app:build_app', args: {batch: {page_size: 1}}}]")
    subject = subject_of(path, odd.machine)
    findings = examine(subject)
    assert findings[0].severity == ERROR
    assert "page_size=1" in findings[0].found
    assert {"versions", "device", "shared memory", "host memory"} <= {each.check for each in findings}
    assert exit_code(findings) == 2
    assert subject_of(tmp_path / "none.yaml", odd.machine).problem is not None


@pytest.mark.parametrize(
    ("severities", "code"), [([], 0), ([NOTE, OK], 0), ([WARNING, NOTE], 1), ([ERROR, WARNING], 2)]
)
def test_the_exit_code_is_that_of_the_worst(severities, code) -> None:
    assert exit_code([Finding(check="x", severity=each, found="") for each in severities]) == code


# -- software --------------------------------------------------------------------------------------------------------


def test_versions_within_their_ranges(odd) -> None:
    finding = only(software.check_versions(odd.subject()))
    assert finding.severity == OK
    assert "torch 2.13.0" in finding.found


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        ({"python": "3.10.2"}, "Python 3.10.2, and >=3.11 is needed"),
        ({"version_of": {**VERSIONS, "ray": "2.61.0"}.get}, "ray 2.61.0, and <2.61,>=2.60 is needed"),
        ({"version_of": {**VERSIONS, "transformers": None}.get}, "transformers is not installed"),
    ],
)
def test_versions_outside_of_their_ranges(odd, readings, found) -> None:
    finding = only(software.check_versions(odd.subject(**readings)))
    assert (finding.severity, finding.found) == (ERROR, found)


def test_a_local_build_of_torch_counts_as_its_release(odd) -> None:
    subject = odd.subject(version_of={**VERSIONS, "torch": "2.13.0+cu130"}.get)
    assert only(software.check_versions(subject)).severity == OK


def test_requirements_for_other_systems_do_not_count(odd) -> None:
    wanted = Requirements(python=">=3.11", packages=("nothing>=1; sys_platform == 'win32'",))
    assert only(software.check_versions(odd.subject(requirements=lambda: wanted))).severity == OK


@pytest.mark.parametrize(
    ("kind", "cuda", "num_gpus", "severity"),
    [
        ("cuda", ONE_GPU, 1, OK),
        ("auto", ONE_GPU, 1, OK),
        ("cuda", Cuda(), 0, ERROR),
        ("cuda", Cuda(), 1, ERROR),
        ("auto", Cuda(), 1, WARNING),  # GPUs, and a torch that cannot use them
        ("auto", Cuda(), 0, NOTE),
        ("emulated", ONE_GPU, 1, NOTE),
    ],
)
def test_the_device(odd, kind, cuda, num_gpus, severity) -> None:
    node = made_up_node(*(made_up_gpu(index) for index in range(num_gpus)))
    subject = odd.subject({"device": {"kind": kind}}, cuda=lambda: cuda, sample=lambda config: node)
    assert only(software.check_device(subject)).severity == severity


def test_a_lost_gpu_is_an_error(odd) -> None:
    node = made_up_node(made_up_gpu(3, trouble=Unavailable(cause="gpu_lost", detail="GPU is lost")))
    finding, _ = software.check_device(odd.subject(sample=lambda config: node))
    assert (finding.severity, finding.found) == (ERROR, "GPU 3: gpu lost (GPU is lost)")


def test_a_model_path_that_is_not_there(odd, tmp_path) -> None:
    model, _ = software.check_model(odd.subject({"model": {"source": str(tmp_path / "none")}}))
    assert model.severity == ERROR
    model, _ = software.check_model(odd.subject({"model": {"source": str(tmp_path)}}))
    assert model.severity == OK
    model, _ = software.check_model(odd.subject({"model": {"source": "meta-llama/Llama-3.2-1B"}}))
    assert model.severity == NOTE


# -- hardware --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "severity", "says"),
    [
        ({}, OK, "PCIe 4 x16, of 4 x16 at most"),
        ({"pcie_width": 8}, WARNING, "50% of the lanes"),
        ({"pcie_width": 4, "pcie_generation": 1}, WARNING, "25% of the lanes"),
        ({"pcie_generation": 1}, NOTE, "an idle link sleeps"),
        ({"pcie_generation": 3, "utilisation": Utilisation(compute_percent=90, memory_percent=1)}, WARNING, "computes"),
        ({"pcie_width": Unavailable(cause="no_permission", detail="x")}, NOTE, "no permission"),
    ],
)
def test_the_link(odd, readings, severity, says) -> None:
    node = made_up_node(made_up_gpu(**readings))
    finding = only(hardware.check_link(odd.subject(sample=lambda config: node)))
    assert finding.severity == severity
    assert says in finding.found


def test_packets_that_are_sent_again(odd) -> None:
    node = made_up_node(made_up_gpu(pcie_replays=7))
    _, finding = hardware.check_link(odd.subject(sample=lambda config: node))
    assert (finding.severity, finding.found) == (NOTE, "GPU 0: 7 packets were sent again")


def test_numa_nodes_and_the_one_of_a_gpu(odd) -> None:
    assert only(hardware.check_numa(odd.subject())).severity == OK
    odd.node(1)
    odd.write("sys/bus/pci/devices/0000:01:00.0/numa_node", "1\n")
    node = made_up_node(made_up_gpu(0), made_up_gpu(1))
    finding = only(hardware.check_numa(odd.subject(sample=lambda config: node)))
    assert (finding.severity, finding.found) == (NOTE, "2 NUMA nodes; GPU 0 on an unknown one, GPU 1 on 1")
    assert "numactl" in finding.do


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Weights of 2 GiB, by the size of their file, which is a hole."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    return directory


@pytest.mark.parametrize(
    ("weights", "free_gib", "severity"),
    [
        ("auto", 3, OK),
        ("auto", 1, WARNING),  # a mapped file takes its place
        ("shared_memory", 1, ERROR),
        ("file", 1, ERROR),
        ("private", 0, OK),
    ],
)
def test_shared_memory_against_the_weights(odd, checkpoint, weights, free_gib, severity) -> None:
    readings = {"free_bytes": lambda directory: free_gib * GIB, "checkpoint": lambda model: checkpoint}
    finding = only(memory.check_shared_memory(odd.subject({"host": {"weights": weights}}, **readings)))
    assert finding.severity == severity


def test_a_store_that_is_there_needs_no_room(odd, checkpoint) -> None:
    (checkpoint / "model.safetensors").rename(odd.root / "shm" / f"selectn-store-{os.geteuid()}-abc")
    (checkpoint / "model.safetensors").write_bytes(b"x" * 4096)
    readings = {"free_bytes": lambda directory: 0, "checkpoint": lambda model: checkpoint}
    assert only(memory.check_shared_memory(odd.subject(**readings))).severity == OK


def test_dockers_shared_memory_holds_no_model(odd) -> None:
    finding = only(memory.check_shared_memory(odd.subject(free_bytes=lambda directory: 64 << 20)))
    assert finding.severity == WARNING
    assert "--shm-size" in finding.do


def test_a_directory_that_is_no_memory(odd, checkpoint) -> None:
    readings = {"is_in_memory": lambda directory: False, "checkpoint": lambda model: checkpoint}
    assert only(memory.check_shared_memory(odd.subject(**readings))).severity == WARNING


def test_a_directory_that_is_not_there(odd) -> None:
    host = {"weights": "shared_memory", "directory": "/nowhere/at/all"}
    assert only(memory.check_shared_memory(odd.subject({"host": host}))).severity == ERROR


@pytest.mark.parametrize(
    ("limit_gib", "weights", "severity"),
    [(4, "auto", OK), (2.5, "auto", WARNING), (1, "auto", ERROR), (1.5, "file", OK), (3.5, "private", OK)],
)
def test_the_memory_of_a_cgroup(odd, checkpoint, limit_gib, weights, severity) -> None:
    """2 GiB of weights, and 1 GiB for KV."""
    odd.write("cgroup/memory.max", str(int(limit_gib * GIB)))
    odd.write("cgroup/memory.current", "0")
    odd.write("cgroup/memory.stat", "inactive_file 0\nactive_file 0")
    finding = only(
        memory.check_host_memory(odd.subject({"host": {"weights": weights}}, checkpoint=lambda model: checkpoint))
    )
    assert finding.severity == severity
    assert "memory.max" in finding.found


def test_private_weights_are_as_many_copies_as_replicas(odd, checkpoint) -> None:
    odd.write("proc/meminfo", f"MemTotal: {4 << 20} kB\nMemAvailable: {4 << 20} kB\n")
    args = {"host": {"weights": "private", "kv_gib": 0}, "num_replicas": 3}
    finding = only(memory.check_host_memory(odd.subject(args, checkpoint=lambda model: checkpoint)))
    assert finding.severity == ERROR
    assert "3 replicas here take 6.0 GiB" in finding.found


# -- limits ----------------------------------------------------------------------------------------------------------


def test_locked_memory_matters_to_a_gpu_only(odd, checkpoint) -> None:
    readings: dict[str, Any] = {"limit": limit_of(resource.RLIMIT_MEMLOCK, 8 << 20), "checkpoint": lambda m: checkpoint}
    assert only(limits.check_locked_memory(odd.subject(**readings))).severity == OK
    finding = only(limits.check_locked_memory(odd.subject(**readings, cuda=lambda: ONE_GPU)))
    assert finding.severity == WARNING
    assert "8 MiB, and 3.0 GiB may have to be locked" in finding.found
    assert "LimitMEMLOCK" in finding.do
    readings["limit"] = limit_of(resource.RLIMIT_MEMLOCK, 4 * GIB)
    assert only(limits.check_locked_memory(odd.subject(**readings, cuda=lambda: ONE_GPU))).severity == OK


@pytest.mark.parametrize(
    ("soft", "hard", "severity"),
    [(1024, 1024, WARNING), (1024, 524_288, NOTE), (65_536, 65_536, OK), (None, None, OK)],
)
def test_files(odd, soft, hard, severity) -> None:
    assert only(limits.check_files(odd.subject(limit=lambda _: Limit(soft=soft, hard=hard)))).severity == severity


@pytest.mark.parametrize(("most", "current", "severity"), [(4096, 10, OK), (512, 10, WARNING), (120, 60, ERROR)])
def test_the_processes_of_a_cgroup(odd, most, current, severity) -> None:
    odd.write("cgroup/pids.max", str(most))
    odd.write("cgroup/pids.current", str(current))
    assert only(limits.check_processes(odd.subject())).severity == severity


def test_the_processes_of_a_user(odd) -> None:
    odd.write("proc/17/status", "Name: python\nUid:\t1000\t1000\t1000\t1000\nThreads:\t900\n")
    odd.write("proc/18/status", "Name: other\nUid:\t7\t7\t7\t7\nThreads:\t5000\n")
    finding = only(limits.check_processes(odd.subject(limit=limit_of(resource.RLIMIT_NPROC, 1024))))
    assert finding.severity == ERROR
    assert "124 more processes" in finding.found
    odd.write("proc/19/status", "Name: init\nUid:\t0\t0\t0\t0\nThreads:\t1000\n")
    root = odd.subject(limit=limit_of(resource.RLIMIT_NPROC, 1024), uid=0)
    assert only(limits.check_processes(root)).severity == OK


def test_a_quota_of_cpus(odd) -> None:
    assert only(limits.check_cpus(odd.subject())).severity == OK
    odd.write("cgroup/cpu.max", "150000 100000")
    finding = only(limits.check_cpus(odd.subject()))
    assert finding.severity == WARNING
    assert "7 threads compute" in finding.found
    assert only(limits.check_cpus(odd.subject({"device": {"compute_threads": 1}}))).severity == NOTE
    assert only(limits.check_cpus(odd.subject(cuda=lambda: ONE_GPU))).severity == NOTE


# -- network ---------------------------------------------------------------------------------------------------------


def test_a_port_in_use(odd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        subject = odd.subject(http={"port": port}, why_port_is_not_free=why_port_is_not_free)
        finding = next(network.check_ports(subject))
    assert (finding.severity, finding.found) == (WARNING, f"HTTP: port {port} on 127.0.0.1 is in use")
    assert why_port_is_not_free("127.0.0.1", port) is None


def test_a_host_of_another_machine(odd) -> None:
    subject = odd.subject(http={"host": "192.0.2.1"}, why_port_is_not_free=why_port_is_not_free)
    assert next(network.check_ports(subject)).severity == ERROR


def test_a_ray_that_runs_here_is_noted(odd) -> None:
    subject = odd.subject(why_port_is_not_free=lambda host, port: "is in use" if port == 6379 else None)
    http, gcs = network.check_ports(subject)
    assert (http.severity, gcs.severity) == (OK, NOTE)
    assert "6379" in gcs.found


def test_a_server_that_every_machine_may_use(odd) -> None:
    assert only(network.check_access(odd.subject())).severity == OK
    assert only(network.check_access(odd.subject(http={"host": "0.0.0.0"}))).severity == WARNING
    assert only(network.check_access(odd.subject(http={"host": "::1"}))).severity == OK


def test_the_file_of_keys(odd) -> None:
    keys = odd.write("keys", "name a-long-enough-key\n")
    args = {"limits": {"api_keys_file": str(keys)}}
    keys.chmod(0o644)
    assert only(network.check_access(odd.subject(args))).severity == WARNING
    keys.chmod(0o640)
    assert only(network.check_access(odd.subject(args, http={"host": "0.0.0.0"}))).severity == OK
    keys.unlink()
    assert only(network.check_access(odd.subject(args))).severity == ERROR


def test_keys_in_a_variable(odd) -> None:
    args = {"limits": {"api_keys_env": "KEYS"}}
    assert only(network.check_access(odd.subject(args))).severity == WARNING
    assert only(network.check_access(odd.subject(args, environment={"KEYS": "a b"}))).severity == OK


def test_no_finding_repeats_a_key(odd) -> None:
    secret = "a-very-secret-key-indeed"
    keys = odd.write("keys", f"name {secret}\n")
    args = {"limits": {"api_keys_file": str(keys), "api_keys_env": "KEYS"}}
    findings = examine(odd.subject(args, environment={"KEYS": secret}), CHECKS)
    assert not any(secret in each.found + each.do for each in findings)
