"""`selectn plan` on performance records that were written to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.cli import main
from selectn_core.latency.placement import OffloadPlan
from selectn_core.latency.recurrence import Link, predict_step_s
from selectn_core.latency.steps import StepShape
from selectn_core.memory.workspace import Workspace
from selectn_core.profiling.record_files import record_path
from tests.support.records import MIB, NUM_LAYERS, block_record, layer_record


@pytest.fixture
def layers(tmp_path) -> Path:
    path = tmp_path / "layers.yaml"
    layer_record().save(path)
    return path


@pytest.fixture
def blocks(tmp_path) -> Path:
    path = tmp_path / "blocks.yaml"
    block_record().save(path)
    return path


def ask(capsys, *options: object) -> tuple[int, dict]:
    code = main(["plan", "--json", *map(str, options)])
    return code, json.loads(capsys.readouterr().out)


def test_the_choice_is_one_that_the_recurrence_confirms(layers, capsys) -> None:
    code, answer = ask(capsys, "--record", layers, "--batch", 4, "--seq", 256, "--tpot-ms", 30, "--device-gib", 0.16)
    assert code == 0
    assert answer["feasible"] is True
    assert answer["provenance"] == "emulated"
    assert 0 < answer["k_min"] <= answer["num_offloaded"] <= answer["k_max"] < NUM_LAYERS
    assert answer["interval_range"] == [NUM_LAYERS / answer["k_max"], NUM_LAYERS / answer["k_min"]]
    plan = OffloadPlan(offloaded=tuple(answer["offloaded"]), num_slots=answer["num_slots"], num_units=NUM_LAYERS)
    costs = layer_record().step_times().conservative(StepShape.decode(4, 256))
    predicted_s = predict_step_s(costs, plan.offloaded, plan.num_slots, Link(bytes_per_s=2.0 * MIB * 1e3))
    (tpot,) = answer["predictions"]
    assert tpot["predicted_ms"] == pytest.approx(predicted_s * 1e3)
    assert tpot["predicted_ms"] + tpot["headroom_ms"] == pytest.approx(30)
    assert sum(answer["device"].values()) == int(0.16 * (1 << 30))
    assert answer["device"]["unused_bytes"] >= 0
    assert answer["offloaded_bytes"] == answer["num_offloaded"] * 12 * MIB
    assert answer["host_bytes"] == (NUM_LAYERS * 12 + 20) * MIB  # the host's copy is of every unit


def test_people_get_a_table(layers, capsys) -> None:
    assert main(["plan", "--record", str(layers), "--tpot-ms", "30", "--ttft-ms", "300", "--seq", "256"]) == 0
    out = capsys.readouterr().out
    for row in ("interval range", "choice", "device memory freed", "predicted TPOT", "predicted TTFT", "device: homes"):
        assert row in out
    assert "emulated" in out


def test_infeasible_has_an_exit_code_and_says_what_helps(layers, capsys) -> None:
    options = ("--record", layers, "--batch", 4, "--seq", 256, "--tpot-ms", 20, "--device-gib", 0.1)
    code, answer = ask(capsys, *options)
    assert (code, answer["feasible"], answer["limiting"]) == (3, False, "link bandwidth")
    needed = {change["quantity"]: change["needed"] for change in answer["changes"]}
    assert {"device memory", "link bandwidth", "compute", "TPOT"} == set(needed)
    enough = [*options[:-1], needed["device memory"] / (1 << 30) + 1e-9]
    assert ask(capsys, *enough)[0] == 0
    assert ask(capsys, *options, "--tpot-ms", needed["TPOT"] * 1e3 + 1e-6)[0] == 0
    assert main(["plan", *map(str, options)]) == 3
    assert "the limit is link bandwidth" in capsys.readouterr().out


def test_the_largest_batch_that_was_measured(layers, capsys) -> None:
    code, answer = ask(capsys, "--record", layers, "--seq", 256, "--largest-batch")
    assert (code, answer["largest_batch"], answer["batch"]) == (0, 8, 8)
    assert "was measured" in answer["stopped_by"]
    _, answer = ask(capsys, "--record", layers, "--seq", 256, "--largest-batch", "--tpot-ms", 17, "--device-gib", 0.2)
    assert answer["largest_batch"] < 8
    assert answer["stopped_by"] in {"link bandwidth", "compute"}


def test_the_longest_input(layers, capsys) -> None:
    code, answer = ask(
        capsys, "--record", layers, "--batch", 4, "--longest-input", "--device-gib", 0.2, "--tpot-ms", 25
    )
    assert code == 0
    assert 1 < answer["largest_seq"] <= 1024


def test_the_tightest_objectives(layers, capsys) -> None:
    options = ("--record", layers, "--batch", 4, "--seq", 256, "--device-gib", 0.16)
    _, answer = ask(capsys, *options, "--tightest", "--ttft-ms", 500)
    tpot_ms = answer["tightest_tpot_ms"]
    assert answer["tightest_ttft_ms"] < 500
    assert ask(capsys, *options, "--tpot-ms", tpot_ms * 1.0001)[0] == 0
    assert ask(capsys, *options, "--tpot-ms", tpot_ms * 0.999)[0] == 3


def test_of_several_granularities_the_one_that_frees_most(layers, blocks, capsys) -> None:
    options = ("--batch", 4, "--seq", 256, "--tpot-ms", 20)
    _, coarse = ask(capsys, "--record", layers, *options)
    _, both = ask(capsys, "--record", layers, "--record", blocks, *options)
    assert coarse["units"] == "every layer"
    assert both["units"] == "every LlamaAttention"
    assert both["freed_bytes"] > coarse["freed_bytes"]
    assert both["num_units"] == 2 * NUM_LAYERS
    assert all(unit % 2 == 0 for unit in both["offloaded"])


def test_records_of_different_models_are_refused(layers, tmp_path, capsys) -> None:
    other = layer_record()
    path = tmp_path / "other.yaml"
    replace(other, fingerprint=replace(other.fingerprint, dtype="bfloat16")).save(path)
    assert main(["plan", "--record", str(layers), "--record", str(path)]) == 2
    assert "dtype: the record has 'float32', the other 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--record", "none.yaml"], "none.yaml: cannot be read: No such file or directory: run `selectn profile`"),
        (["--record", "layers.yaml", "--batch", "0"], "--batch=0 is not allowed: expected at least 1"),
        (["--record", "layers.yaml", "--max-slots", "9"], "--max-slots=9 is not allowed: expected at least 1"),
        (["--record", "layers.yaml", "--batch", "9"], "was measured"),
        (["--record", "layers.yaml", "--seq", "99999"], "`selectn profile` with a larger --max-length"),
        (["--record", "layers.yaml", "--device-gib", "inf"], "--device-gib=inf is not allowed: expected more than 0"),
        (["--record", "layers.yaml", "--tpot-ms", "nan"], "--tpot-ms=nan is not allowed: expected more than 0"),
        (["--record", "weights.gguf"], "weights.gguf: is not YAML"),
    ],
)
def test_what_cannot_be_asked_is_a_short_error(options, message, layers, monkeypatch, capsys) -> None:
    monkeypatch.chdir(layers.parent)
    Path("weights.gguf").write_bytes(b"GGUF\x03\x00\xff\xfe")
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_only_record_in_the_cache_is_the_default(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SELECTN_CACHE_DIR", str(tmp_path))
    assert main(["plan"]) == 2
    assert "no performance record of this machine yet: run `selectn profile`" in capsys.readouterr().err
    record = layer_record()
    record.save(record_path(record.fingerprint))
    assert ask(capsys)[1]["units"] == "every layer"
    block_record().save(record_path(block_record().fingerprint))
    assert main(["plan"]) == 2
    assert "several performance records; choose with --record:" in capsys.readouterr().err


def test_what_a_record_lacks_is_noted(layers, tmp_path, capsys) -> None:
    assert ask(capsys, "--record", layers)[1]["notes"] == []
    record = layer_record()
    path = tmp_path / "less.yaml"
    replace(record, is_complete=False, memory=replace(record.memory, workspace=Workspace())).save(path)
    assert main(["plan", "--record", str(path)]) == 0
    out = capsys.readouterr().out
    assert "note: profiling was cut short" in out
    assert "note: what activations take was not measured" in out
