"""`inspect_model` against what the started model says of itself and takes, for every backend that a CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints.gguf_files import tiny_model, write_model
from tests.support.single_thread import single_thread
from tests.support.tiny_checkpoint import write_tiny_model, write_tiny_moe_model
from tokenmill import LLM
from tokenmill.builder.build import build
from tokenmill.builder.packing import packed_nbytes
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import CheckpointError, InvalidParameterError, ModelNotFoundError, UnsupportedFeatureError
from tokenmill.inspection import inspect_model, plan_engine
from tokenmill.runtime.huge_pages import HugePages

pytestmark = pytest.mark.spec("A3", "C3")

SIZES: dict[str, Any] = {"max_batch_size": 5, "max_seq_len": 100, "kv_cache_config": {"max_tokens": 320}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "blocks.gguf", tiny_model("llama"), kind="Q4_1")
    return {
        "safetensors": write_tiny_model(folder / "llama"),
        "experts": write_tiny_moe_model(folder / "moe"),
        "gguf": folder / "blocks.gguf",
    }


def assert_same(model: Path | str, **arguments: Any) -> None:
    """The report is what the started model says."""
    report = inspect_model(model, device="cpu", **arguments)
    with LLM(model, device="cpu", **arguments) as llm:
        found = llm.description
    assert report.backend == found.backend
    assert (report.dtype, report.cache_dtype) == (found.dtype, found.cache_dtype)
    assert (report.max_batch_size, report.max_num_tokens) == (found.max_batch_size, found.max_num_tokens)
    assert report.max_seq_len == found.max_seq_len
    assert replace(report.memory, free=None) == replace(found.memory, free=None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("safetensors", {}),
        ("safetensors", {"dtype": "bfloat16"}),
        ("safetensors", {"quantization": "int8"}),
        ("safetensors", {"quantization": "int8_channel", "kv_cache_config": {"max_tokens": 64, "dtype": "bfloat16"}}),
        ("safetensors", {"backend": "torch", "dtype": "float32"}),
        ("experts", {}),
        ("experts", {"quantization": "int8"}),
        ("gguf", {"skip_tokenizer_init": True}),
        ("gguf", {"skip_tokenizer_init": True, "dtype": "float32", "max_num_tokens": 17}),
    ],
)
def test_the_report_is_what_the_started_model_says(models: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    assert_same(models[name], **{**SIZES, **options})


@pytest.mark.real_model
@pytest.mark.parametrize("alias", ["smollm2:135m", "gemma3:270m"])
def test_the_plan_of_a_demo_model_is_the_engines(alias: str) -> None:
    try:
        path = resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"{alias} cannot be fetched: {error}")
    assert_same(path, kv_cache_config={"max_tokens": 640})
    report = inspect_model(path, device="cpu")
    assert report.backend == "engine"
    assert report.cache_dtype == "bfloat16"
    assert report.memory.weights == pytest.approx(report.checkpoint.num_bytes, rel=0.3)  # quantized, as in the file
    assert report.memory.weights < report.num_parameters


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("safetensors", {}),
        ("safetensors", {"quantization": "int8"}),
        ("experts", {"quantization": "int8"}),
        ("gguf", {"skip_tokenizer_init": True}),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_the_plan_is_what_the_engine_takes(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    saved: bool,
) -> None:
    """Memory that the executor takes for weights, cache and results, counted where it is taken."""
    taken: dict[str, int] = {"rest": 0, "region": 0}
    real_take, real_adopt = HugePages.take, HugePages.adopt

    def take(pages: HugePages, num_bytes: int) -> Any:
        taken["rest"] += -(-num_bytes // 64) * 64
        return real_take(pages, num_bytes)

    def adopt(pages: HugePages, region: Any) -> None:
        taken["region"] += region.nbytes
        real_adopt(pages, region)

    arguments = {**SIZES, **options, "backend": "engine", "num_threads": 1}
    model = models[name]
    report = inspect_model(model, device="cpu", **arguments)
    if saved:
        with LLM(model, device="cpu", **arguments) as llm:
            model = llm.save(tmp_path / "engine")
        arguments.pop("quantization", None)
    monkeypatch.setattr(HugePages, "take", take)
    monkeypatch.setattr(HugePages, "adopt", adopt)
    with LLM(model, device="cpu", **arguments):
        pass
    planned = report.memory.weights + report.memory.kv_cache + report.memory.activations
    assert (taken["region"] > 0) == saved
    assert planned <= sum(taken.values()) < planned + SCRATCH_BYTES


SCRATCH_BYTES = 4 << 20
"""More than the kernels of one thread and these small sizes take."""


@pytest.mark.parametrize("quantization", ["none", "int8", "int8_channel", "q4_0", "q8_0"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_of_weights_are_known_before_they_are_packed(
    models: dict[str, Path], quantization: str, device: str
) -> None:
    for name in ("safetensors", "experts"):
        engine = build(models[name], device=device, quantization=quantization, capture="dispatch", opt_level=1)
        for weight in engine.program.weights:
            nbytes = engine.weights[weight.name].nbytes
            assert packed_nbytes(weight) == -(-nbytes // 64) * 64, weight.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 3, "max_seq_len": 50, "max_num_tokens": 17},
        {"kv_cache_config": {"max_tokens": 128, "dtype": "bfloat16"}, "skip_tokenizer_init": True},
    ],
)
@pytest.mark.parametrize("strip_weights", [False, True])
def test_the_plan_of_a_built_engine_is_what_it_says_when_it_runs(
    models: dict[str, Path], tmp_path: Path, options: dict[str, Any], strip_weights: bool
) -> None:
    arguments = {"kv_cache_config": {"max_tokens": 320}, **options}
    engine = build(models["safetensors"], device="cpu", quantization="int8", **BUILT)
    with LLM(engine.save(tmp_path / "engine"), **arguments) as llm:
        found = llm.description
    planned = build(models["safetensors"], device="cpu", quantization="int8", strip_weights=strip_weights, **BUILT)
    report = plan_engine(planned, tmp_path / "engine", **arguments)
    for name in ("device", "dtype", "cache_dtype", "max_batch_size", "max_num_tokens", "max_seq_len"):
        assert getattr(report, name) == getattr(found, name), name
    assert replace(report.memory, free=None) == replace(found.memory, free=None)
    assert report.weight_formats == "int8_group32"
    assert report.shortage is None
    assert report.to_dict()["memory"]["kv_bytes_per_sequence"] == report.kv_bytes_per_sequence


BUILT: dict[str, Any] = {
    "max_batch_size": 5, "max_seq_len": 100, "max_num_tokens": 40, "capture": "dispatch", "opt_level": 1
}  # fmt: skip


def test_the_plan_of_a_built_engine_refuses_what_it_cannot_serve(models: dict[str, Path], tmp_path: Path) -> None:
    engine = build(models["safetensors"], device="cpu", **BUILT)
    for name in ("max_batch_size", "max_seq_len", "max_num_tokens"):
        with pytest.raises(InvalidParameterError, match=f"{name} is 101, but the engine was built for") as caught:
            plan_engine(engine, tmp_path, **{name: 101})
        assert caught.value.field == name
    with pytest.raises(UnsupportedFeatureError, match="cannot run on the torch backend"):
        plan_engine(engine, tmp_path, backend="torch")
    shortage = plan_engine(engine, tmp_path, kv_cache_config={"max_tokens": 10**12}).shortage
    assert shortage is not None and "are free" in shortage


def test_an_engine_for_a_gpu_is_planned_without_one(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = plan_engine(build(models["safetensors"], device="cuda", **BUILT), tmp_path)
    assert (report.device, report.memory.free) == ("cuda", None)
    assert report.memory.weights == pytest.approx(report.num_parameters * 4, rel=0.01)
    quantized = plan_engine(build(models["safetensors"], device="cuda", quantization="int8", **BUILT), tmp_path)
    assert quantized.memory.weights == pytest.approx(report.memory.weights, rel=0.01)  # decoded for torch
    assert report.memory.cache_tokens >= 5 * 100
    with pytest.raises(InvalidParameterError, match="built for 'cuda'"):
        plan_engine(build(models["safetensors"], device="cuda", **BUILT), tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_is_planned_without_one_from_the_configuration_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Numbers of parameters by transformers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "config.json").write_bytes((models["safetensors"] / "config.json").read_bytes())
    arguments: dict[str, Any] = {"device": device, "load_format": "dummy", "max_batch_size": 5, "max_seq_len": 100}
    report = inspect_model(tmp_path, **arguments)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config)
    embeddings = expected.get_input_embeddings().weight.numel() * (1 if config.tie_word_embeddings else 2)
    assert (report.device, report.backend, report.dtype) == ("cuda", "torch", "bfloat16")
    assert (report.checkpoint.num_tensors, report.memory.free, report.shortage) == (0, None, None)
    assert report.memory.weights == 2 * expected.num_parameters()
    assert report.memory.cache_tokens >= 5 * 100
    assert report.memory.graphs > 0
    quantized = inspect_model(tmp_path, quantization="fp8", kv_cache_config={"dtype": "fp8"}, **arguments)
    assert quantized.memory.weights == expected.num_parameters() + embeddings
    assert 2 * quantized.memory.kv_bytes_per_token == report.memory.kv_bytes_per_token
    with pytest.raises(CheckpointError, match="holds no"):
        inspect_model(tmp_path, device=device)
    with pytest.raises(InvalidParameterError, match="is not a device"):
        inspect_model(tmp_path, **{**arguments, "device": "cuda:first"})


def test_what_cannot_be_compiled_is_planned_for_torch_and_says_why(models: dict[str, Path]) -> None:
    report = inspect_model(models["safetensors"], device="cpu", quantization="fp8")
    assert (report.backend, report.weight_formats) == ("torch", "fp8")
    assert report.backend_reason == "quantization='fp8' is of the torch backend"
    assert report.memory.weights < inspect_model(models["safetensors"], device="cpu", backend="torch").memory.weights
    with pytest.raises(UnsupportedFeatureError, match="cannot be used"):
        inspect_model(models["safetensors"], device="cpu", quantization="fp8", backend="engine")


def test_a_plan_that_does_not_fit_says_what_is_needed(models: dict[str, Path]) -> None:
    report = inspect_model(models["safetensors"], device="cpu", kv_cache_config={"max_tokens": 10**12})
    assert report.backend == "engine"
    assert report.shortage is not None
    assert report.memory.free is None
    assert report.memory.kv_cache >= 10**12 * report.memory.kv_bytes_per_token
