"""`tokenmill inspect` against what transformers, the files and the engine itself say of the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Program
from tokenmill.ops.cublas_lt import gpu_machine
from tokenmill.ops.product_choices import GpuMachine, ProductChoice, ProductChoices, ProductKey


@pytest.mark.spec("A3")
def test_the_report_agrees_with_transformers_and_the_files(program: Program, tiny_model: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    done = program(
        "inspect", str(tiny_model), "--json", "--dtype", "float32", "--kv-cache-tokens", "640", "--backend", "torch"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report["num_parameters"] == num_parameters
    assert report["checkpoint"]["num_stored_parameters"] == num_parameters
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        assert report["checkpoint"]["num_tensors"] == len(file.keys())
    assert report["checkpoint"]["num_bytes"] == 4 * num_parameters
    assert report["checkpoint"]["format"] == "safetensors"
    assert report["config"]["model_type"] == "llama"
    assert report["config"]["num_layers"] == 2
    assert report["tokenizer"]["has_chat_template"] is True
    assert [model.config.eos_token_id, "<|im_end|>"] in report["tokenizer"]["end_tokens"]
    memory = report["memory"]
    assert memory["weights"] == 4 * num_parameters
    assert memory["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # key and value, layers, heads, head_dim, bytes
    assert memory["cache_tokens"] == 640
    assert memory["total"] == memory["weights"] + memory["kv_cache"] + memory["slots"] + memory["activations"]


def test_the_plan_is_the_engines(program: Program, tiny_model: Path) -> None:
    from dataclasses import asdict

    from tokenmill import LLM

    arguments = {
        "backend": "torch",
        "dtype": "float32",
        "max_batch_size": 5,
        "max_seq_len": 100,
        "kv_cache_config": {"max_tokens": 320},
    }
    with LLM(str(tiny_model), **arguments) as llm:
        planned = asdict(llm.description.memory)
    done = program(
        "inspect", str(tiny_model), "--json", "--dtype", "float32", "--max-batch-size", "5", "--max-seq-len", "100",
        "--kv-cache-tokens", "320", "--backend", "torch",
    )  # fmt: skip
    found = json.loads(done.stdout)["memory"]
    assert {**planned, "free": None} == {**{name: found[name] for name in planned}, "free": None}


def test_the_tables_say_what_matters(program: Program, base_model: Path) -> None:
    done = program("inspect", str(base_model))
    assert done.returncode == 0, done.stderr
    for text in (
        "LlamaForCausalLM",
        "Parameters",
        "64 tokens",
        "safetensors",
        "Chat template",
        "no",
        "KV cache",
        "Total",
        "engine: the model is compiled",
    ):
        assert text in done.stdout, text
    done = program("inspect", str(base_model), "--quantization", "int8")
    assert "Memory on cpu in int8_group32" in done.stdout
    assert "as the program reads them; what is not quantized is float32" in _unwrapped(done.stdout)
    done = program("inspect", str(base_model), "--quantization", "fp8")
    assert "torch, not engine: quantization='fp8' is of the torch backend" in _unwrapped(done.stdout)
    assert "Attention backend" in done.stdout


def _unwrapped(table: str) -> str:
    """The words of a table's cells, however its lines are broken."""
    return " ".join(table.replace("│", " ").split())


def test_a_model_that_does_not_fit_is_still_described(program: Program, tiny_model: Path) -> None:
    done = program("inspect", str(tiny_model), "--kv-cache-tokens", str(10**12))
    assert done.returncode == 0
    assert "does not fit this machine" in done.stderr
    assert "LlamaForCausalLM" in done.stdout


def test_the_configuration_alone_is_enough(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    done = program("inspect", str(tmp_path), "--load-format", "dummy", "--device", "cuda", "--quantization", "fp8")
    assert done.returncode == 0, done.stderr
    for text in ("config.json alone was read", "in fp8", "CUDA graphs"):
        assert text in done.stdout
    assert program("inspect", str(tmp_path)).returncode != 0


def test_no_weight_is_read(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    """Headers alone: a checkpoint whose tensor data is all wrong looks the same."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(weights[:8], "little")
    weights[header:] = b"\xff" * (len(weights) - header)
    (copy / "model.safetensors").write_bytes(weights)
    first, second = (json.loads(program("inspect", str(path), "--json").stdout) for path in (tiny_model, copy))
    for report in (first, second):
        del report["model"], report["checkpoint"]["path"], report["memory"]
    assert first == second


@pytest.mark.spec("C6")
def test_kernels_are_listed_without_a_gpu(tiny_model: Path, program: Program) -> None:
    done = program("inspect", str(tiny_model), "--kernels")
    assert done.returncode == 0
    assert "Linear layers on an NVIDIA GPU" in done.stdout
    assert "2 gate_up_proj" in done.stdout and "matvec" in done.stdout and "cuBLAS" in done.stdout
    assert "measured when an engine starts on the device. For this model nothing is measured yet" in " ".join(
        done.stdout.split()
    )
    kernels = json.loads(program("inspect", str(tiny_model), "--json", "--quantization", "fp8").stdout)[
        "linear_kernels"
    ]
    assert {one["kernel"] for one in kernels if one["weights"] == "float8"} >= {"matvec", "_scaled_mm"}


@pytest.fixture
def measured(program: Program, tiny_model: Path) -> Iterator[GpuMachine]:
    """A GPU, for which choices of the tiny model's first product are in the program's cache folder."""
    machine = GpuMachine(device="NVIDIA H100 80GB HBM3", capability="9.0", driver=13000, cublas_lt=130002, torch="2.11")
    if torch.cuda.is_available():  # the program tells of this one then
        machine = gpu_machine(torch.device("cuda", 0))
    first = json.loads(program("inspect", str(tiny_model), "--json").stdout)["linear_kernels"][0]
    out_features, in_features = first["out_features"], first["in_features"]
    small, large = (ProductKey(num_rows, out_features, in_features, "bfloat16") for num_rows in (512, 1024))
    tile = "64 x 128 rows, 4 stages of 64"
    choices = [ProductChoice(large, None, "", 25.5, 25.5), ProductChoice(small, b"1" * 64, tile, 12.345, 15.25)]
    ProductChoices(machine, choices).save()
    yield machine
    machine.path.unlink()


@pytest.mark.spec("C6")
def test_measured_algorithms_are_listed(tiny_model: Path, program: Program, measured: GpuMachine) -> None:
    report = json.loads(program("inspect", str(tiny_model), "--json").stdout)
    assert report["measured_on"]["device"] == measured.device
    assert report["measured_on"]["cublas_lt"] == measured.cublas_lt
    found = [one["measured"] for one in report["linear_kernels"] if one["measured"]]
    tile = "64 x 128 rows, 4 stages of 64"
    names = ("first_rows", "last_rows", "algorithm", "microseconds", "torch_microseconds")
    of_512, of_1024 = (481, 512, tile, 12.345, 15.25), (961, 1024, None, 25.5, 25.5)
    assert found == [[dict(zip(names, one, strict=True)) for one in (of_512, of_1024)]]
    text = _unwrapped(program("inspect", str(tiny_model), "--kernels").stdout)
    assert f"481 to 512 cuBLASLt {tile} 12.3 us (torch's: 15.2)" in text
    assert "961 to 1,024 torch's 25.5 us" in text
    assert f"measured when an engine started on {measured.device} ({measured.versions})" in text
    text = _unwrapped(program("inspect", str(tiny_model), "--kernels", "--dtype", "float16").stdout)
    assert f"nothing is measured yet on {measured.device}" in text
