"""`tokenmill build` and `refit`: the engines that they write, what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import Program
from tokenmill import Engine
from tokenmill.builder.passes import PASSES

pytestmark = pytest.mark.spec("D1", "A3")

FAST = ("--device", "cpu", "--opt-level", "1")


def test_build_writes_an_engine_and_says_what_it_did(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    done = program("build", str(tiny_model), "-o", "engine", "--quantization", "int8", "--max-seq-len", "256", *FAST)
    assert done.returncode == 0, done.stderr
    engine = Engine.load(tmp_path / "engine")
    assert engine.config.quantization == "int8_group32"
    assert engine.config.limits.max_seq_len == 256
    for text in ("engine", "llama", "int8_group32", "packed", "nodes, ", "after the passes", "linear", "pack ", "MiB"):
        assert text in done.stdout, text
    assert done.stderr == ""


def test_the_passes_are_listed_and_can_be_disabled(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    listed = program("build", "--list-passes")
    assert listed.returncode == 0
    positions = [listed.stdout.index(one.name) for one in PASSES]
    assert positions == sorted(positions)
    done = program(
        "build",
        str(tiny_model),
        "-o",
        "engine",
        "--disable-pass",
        "merge_qkv",
        "--disable-pass",
        "merge_gate_up",
        *FAST,
    )
    assert done.returncode == 0, done.stderr
    names = {operation.name for operation in Engine.load(tmp_path / "engine").program.operations}
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.0.mlp.gate_proj" in names


@pytest.mark.spec("D2")
def test_changes_of_every_pass_are_written(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    done = program("build", str(tiny_model), "-o", "engine", "--dump-passes", "passes", *FAST)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "passes").iterdir())
    diffs = [f"{index:02d}-{one.name}.diff" for index, one in enumerate(PASSES, start=1)]
    assert names == ["00-captured.txt", *diffs, f"{len(PASSES) + 1:02d}-final.txt"]
    text = next((tmp_path / "passes").glob("*-merge_gate_up.diff")).read_text()
    assert "# merge_gate_up: 2 changes" in text
    assert any(line.startswith("+") and "gate_up_proj" in line for line in text.splitlines())
    assert any(line.startswith("-") and "mlp.up_proj" in line for line in text.splitlines())


def test_a_configuration_file_and_flags_that_win_over_it(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text("max_batch_size: 3\nmax_num_tokens: 77\ncapture: dispatch\n")
    done = program("build", str(tiny_model), "-o", "engine", "--config", "build.yaml", "--max-batch-size", "5", *FAST)
    assert done.returncode == 0, done.stderr
    limits = Engine.load(tmp_path / "engine").config.limits
    assert (limits.max_batch_size, limits.max_num_tokens) == (5, 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here", "-o", "engine"], "No model 'nothing-here'"),
        (["MODEL"], "Say where the engine goes"),
        ([], "The model is missing"),
        (["MODEL", "-o", "engine", "--disable-pass", "merge_qvk"], "Did you mean 'merge_qkv'"),
        (["MODEL", "-o", "engine", "--quantization", "int3"], "quantization"),
        (["MODEL", "-o", "engine", "--opt-level", "7"], "opt_level"),
        (["MODEL", "-o", "engine", "--debug-output", "lm_had"], "Did you mean 'lm_head'"),
        (["MODEL", "-o", "MODEL"], "exists and is not an engine"),
        (["MODEL", "-o", "engine", "--config", "bad.yaml"], "Did you mean 'max_batch_size'"),
        (["MODEL", "-o", "engine", "--config", "list.yaml"], "does not hold a table"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    program: Program, tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.yaml").write_text("max_batch_sise: 3\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    done = program("build", *[str(tiny_model) if one == "MODEL" else one for one in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "engine").exists()


@pytest.mark.spec("D6")
def test_refit_of_a_stripped_engine(program: Program, tiny_model: Path, base_model: Path, tmp_path: Path) -> None:
    build = ("build", str(tiny_model), "--quantization", "int8", "--max-seq-len", "64", *FAST)
    assert program(*build, "-o", "full").returncode == 0
    stripped = program(*build, "-o", "stripped", "--strip-weights")
    assert stripped.returncode == 0
    assert "tokenmill refit" in stripped.stdout
    assert (tmp_path / "stripped/rank0/weights.safetensors").stat().st_size < 10_000
    done = program("refit", "stripped", "--weights", str(tiny_model), "-o", "refitted")
    assert done.returncode == 0, done.stderr
    full, refitted = Engine.load(tmp_path / "full"), Engine.load(tmp_path / "refitted")
    assert refitted.program == full.program
    assert all(np.array_equal(refitted.weights[name], content) for name, content in full.weights.items())
    assert Engine.load(tmp_path / "stripped").config.stripped


@pytest.mark.spec("D6")
def test_refit_of_another_model_is_refused_and_the_engine_stays(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.support.tiny_models import tiny_hf_model

    assert program("build", str(tiny_model), "-o", "engine", *FAST).returncode == 0
    before = (tmp_path / "engine/config.json").read_bytes()
    with torch.random.fork_rng():
        tiny_hf_model("llama").save_pretrained(tmp_path / "other")
    done = program("refit", "engine", "--weights", str(tmp_path / "other"))
    assert done.returncode == 2
    assert "does not fit the model" in done.stderr
    assert (tmp_path / "engine/config.json").read_bytes() == before


def test_a_damaged_engine_is_named(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    assert program("build", str(tiny_model), "-o", "engine", *FAST).returncode == 0
    path = tmp_path / "engine/rank0/program.json"
    path.write_bytes(path.read_bytes()[:-9])
    done = program("refit", "engine", "--weights", str(tiny_model))
    assert done.returncode == 2
    assert "rank0/program.json has" in done.stderr


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("D5")
def test_inspect_lists_the_operations_of_an_engine(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    built = program("build", str(tiny_model), "-o", "engine", "--quantization", "int8", "--max-seq-len", "64", *FAST)
    assert built.returncode == 0, built.stderr
    engine = Engine.load(tmp_path / "engine")
    done = program("inspect", "engine", "--json", "--step-tokens", "16", "--context", "20")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [one["name"] for one in report["operations"]] == [one.name for one in engine.program.operations]
    assert report["limits"]["max_seq_len"] == 64
    assert report["step"]["num_tokens"] == 16
    by_name = {one["name"]: one for one in report["operations"]}
    qkv = by_name["model.layers.0.self_attn.qkv_proj"]
    assert qkv["flops"] == 2 * 16 * 64 * 32
    assert qkv["weight_bytes"] == 64 * 34  # a row of 32 is one group: a scale of 2 bytes and 32 values
    assert qkv["formats"] == "int8_group32"

    table = program("inspect", "engine")
    assert table.returncode == 0, table.stderr
    for text in ("llama", "layers.*.mlp.gate_up_proj", "lm_head", "Total", "int8_group32"):
        assert text in table.stdout, text
    every = program("inspect", "engine", "--every-layer")
    assert len(every.stdout.splitlines()) > len(table.stdout.splitlines())


def test_inspect_names_the_file_that_is_damaged(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    assert program("build", str(tiny_model), "-o", "engine", *FAST).returncode == 0
    (tmp_path / "engine/rank0/weights.safetensors").unlink()
    done = program("inspect", "engine")
    assert done.returncode == 2
    assert "weights.safetensors is missing" in done.stderr
