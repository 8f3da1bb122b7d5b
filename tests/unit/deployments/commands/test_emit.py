"""`selectn plan --emit`: what the flags of other servers offload, against the plan that they are from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.cli import main
from selectn_core.planning.groups import Group
from tests.support.records import NUM_LAYERS, block_record, layer_record

WORKLOAD = ("--batch", "4", "--seq", "256")
TIGHT = (*WORKLOAD, "--tpot-ms", "30", "--device-gib", "0.16")


@pytest.fixture
def layers(tmp_path) -> Path:
    path = tmp_path / "layers.yaml"
    layer_record().save(path)
    return path


def emit(capsys, server: str, record: Path, *options: str) -> tuple[int, list[str], str]:
    """Exit code, flags, and notes."""
    code = main(["plan", "--record", str(record), *options, "--emit", server])
    captured = capsys.readouterr()
    return code, captured.out.split(), captured.err


def group_of(flags: list[str]) -> Group:
    values = {name: int(value) for name, value in zip(flags[::2], flags[1::2], strict=True) if value.isdecimal()}
    return Group(
        size=values["--offload-group-size"],
        num_in_group=values["--offload-num-in-group"],
        step=values["--offload-prefetch-step"],
    )


def test_vllm_gets_fewer_layers_where_memory_allows(layers, capsys) -> None:
    code, flags, notes = emit(capsys, "vllm", layers, *TIGHT)
    assert code == 0
    assert flags[:2] == ["--offload-backend", "prefetch"]
    group = group_of(flags)
    assert len(group.offloaded(NUM_LAYERS)) == 4
    assert "4 layers are offloaded and not 5 (fewer)" in notes
    assert "no bus is divided" in notes


def test_where_memory_is_short_more_layers_are_offloaded_and_a_missed_objective_is_said(layers, capsys) -> None:
    """One slot and one layer per group: six layers of twelve, which do not fit, or all."""
    options = (*WORKLOAD, "--tpot-ms", "80", "--device-gib", "0.11", "--max-slots", "1")
    code, flags, notes = emit(capsys, "vllm", layers, *options)
    assert code == 0
    assert len(group_of(flags).offloaded(NUM_LAYERS)) == 12
    assert "12 layers are offloaded and not 11 (more: no fewer fit and meet the objectives)" in notes
    assert "the objectives are not met" in notes


def test_sglang_has_one_buffer_more_than_its_step(layers, capsys) -> None:
    code, flags, notes = emit(capsys, "sglang", layers, *TIGHT, "--max-slots", "2")
    assert code == 0
    assert flags[-2:] == ["--offload-mode", "cpu"]
    assert group_of(flags[:-2]).step == 1
    assert "SGLang moves of a layer only what the model's code names" in notes


def test_llama_cpp_gets_exactly_the_layers_of_the_plan(layers, capsys) -> None:
    code, flags, notes = emit(capsys, "llama.cpp", layers, *TIGHT)
    assert code == 0
    assert flags[:2] == ["--n-gpu-layers", str(NUM_LAYERS + 1)]
    pattern, buffer = flags[-1].strip("'").split("=")
    assert buffer == "CPU"
    tensors = {layer: f"blk.{layer}.ffn_down.weight" for layer in range(2 * NUM_LAYERS)}
    assert [layer for layer, name in tensors.items() if re.search(pattern, name)] == [3, 5, 8, 10, 11]
    assert not re.search(pattern, "output_norm.weight")
    assert "no prefetch" in notes
    assert "3 layers would free as much device memory as 5 do here" in notes


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_nothing_offloaded_is_no_flags(layers, server, capsys) -> None:
    code, flags, notes = emit(capsys, server, layers, *WORKLOAD, "--tpot-ms", "20", "--link-gbps", "0.1")
    assert (code, flags) == (0, [])
    assert "nothing is offloaded: no flags" in notes


def test_the_largest_batch_is_judged_with_that_batch(layers, capsys) -> None:
    code, flags, _ = emit(
        capsys, "vllm", layers, "--seq", "256", "--tpot-ms", "30", "--device-gib", "0.16", "--largest-batch"
    )
    assert code == 0
    assert len(group_of(flags).offloaded(NUM_LAYERS)) >= 2


def test_infeasible_is_said_on_stderr(layers, capsys) -> None:
    code, flags, notes = emit(capsys, "vllm", layers, *WORKLOAD, "--tpot-ms", "20", "--device-gib", "0.1")
    assert (code, flags) == (3, [])
    assert "not feasible" in notes


def test_blocks_are_refused(tmp_path, capsys) -> None:
    path = tmp_path / "blocks.yaml"
    block_record().save(path)
    code, flags, notes = emit(capsys, "vllm", path)
    assert (code, flags) == (2, [])
    assert "give one --record of layers, not ['block']" in notes


def test_flags_or_json(layers, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--record", str(layers), "--emit", "vllm", "--json"])
    assert exit_info.value.code == 2
