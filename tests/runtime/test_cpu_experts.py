"""Models with experts on a CPU: steps against transformers, torch and float math; engines from every side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints.gguf_files import EXPERTS, EXPERTS_METADATA, tiny_model, write_model
from tests.runtime.test_cpu_program import (
    TOLERANCE,
    Sequences,
    executor_of,
    hf_logits,
    run_steps,
    torch_executor_of,
)
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tokenizer
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.builder.build import build
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.session import Session

pytestmark = pytest.mark.spec("C1", "E2")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "qwen3_moe_shares_below_one": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", {"sliding_window": 7}),
}
OPTIONS: dict[str, Any] = {"capture": "dispatch", "max_seq_len": 320, "opt_level": 1, "picture": False}
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
CACHE = KvCacheConfig(max_tokens=2048, tokens_per_block=16)
PROMPTS = [random_tokens(length, seed=length, vocab_size=300) for length in (1, 5, 33, 70)]


def write_model_dir(folder: Path, case: str) -> Any:
    """The transformers model of a case, saved with a tokenizer."""
    model_type, changes = CASES[case]
    hf_model = tiny_hf_model(model_type, max_position_embeddings=320, vocab_size=VOCAB_SIZE, **changes)
    hf_model.save_pretrained(folder)
    write_tokenizer(folder, chat_template=False)
    return hf_model


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model, its folder)."""
    path = tmp_path_factory.mktemp(request.param)
    return write_model_dir(path, request.param), path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    write_model_dir(path, "mixtral")
    return path


def tokens_of_two() -> list[list[int]]:
    return [random_tokens(41), random_tokens(23, seed=1)]


def test_float32_gives_the_logits_of_transformers(saved: tuple[Any, Path]) -> None:
    hf_model, path = saved
    executor = executor_of(build(path, device="cpu", quantization="none", **OPTIONS))
    for found, tokens in zip(run_steps(executor, tokens_of_two()), tokens_of_two(), strict=True):
        assert relative_error(found, hf_logits(hf_model, tokens)) < TOLERANCE
    executor.close()


@pytest.mark.spec("D1", "H3")
def test_auto_takes_the_engine_whose_tokens_are_those_of_torch_and_transformers(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    hf_model, path = saved
    options: dict[str, Any] = {"max_seq_len": 128, "max_batch_size": 4, "kv_cache_config": CACHE, "device": "cpu"}
    options["dtype"] = "float32"
    tokens = {}
    for backend in ("auto", "torch"):
        with LLM(path, backend=backend, max_num_tokens=40, **options) as llm:
            assert llm.description.backend == ("engine" if backend == "auto" else "torch")
            tokens[backend] = greedy_tokens(llm)
            if backend == "auto":
                llm.save(tmp_path / "engine")
    with LLM(tmp_path / "engine", **options) as llm:
        tokens["saved"] = greedy_tokens(llm)
    assert tokens["auto"] == tokens["torch"] == tokens["saved"]
    for prompt, answer in zip(PROMPTS, tokens["auto"], strict=True):
        logits = hf_logits(hf_model, prompt + answer)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def greedy_tokens(llm: LLM) -> list[list[int]]:
    outputs: Any = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def assert_near(package: EnginePackage, exact: EnginePackage, tokens: list[list[int]]) -> None:
    """Integer products against float math on the same values. A token that is near the edge between two experts may
    take the other one, so a few may be far off."""
    executor = executor_of(package)
    found, expected = (torch.cat(run_steps(one, tokens)) for one in (executor, torch_executor_of(exact)))
    executor.close()
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-5 < errors.median() < 0.05
    assert (errors < 0.1).float().mean() >= 0.85


@pytest.mark.spec("E4")
@pytest.mark.parametrize("quantization", ["int8_group32", "int8_channel"])
def test_quantized_experts_are_near_float_math(mixtral: Path, quantization: str) -> None:
    package, exact = (build(mixtral, device=device, quantization=quantization, **OPTIONS) for device in ("cpu", "cuda"))
    assert {weight.layout for weight in package.program.weights if ".experts." in weight.name} == {
        "packed_experts",
        "packed_gated_experts",
    }
    assert_near(package, exact, tokens_of_two())


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_decoding_gives_the_logits_of_prefill_with_any_number_of_threads(mixtral: Path, quantization: str) -> None:
    package = build(mixtral, device="cpu", quantization=quantization, **OPTIONS)
    token_ids, wholes = random_tokens(60), []
    for num_threads in (1, 2, 3):
        executor = executor_of(package, num_threads=num_threads)
        sequences = Sequences(executor)
        (whole,) = sequences.step([(0, token_ids)])
        wholes.append(whole)
        rows = [sequences.step([(1, [token])])[0][0] for token in token_ids]
        executor.close()
        errors = (torch.stack(rows) - whole).abs().amax(dim=1) / whole.abs().max()
        assert errors.median() < (1e-5 if quantization == "none" else 2e-2)
    assert torch.equal(wholes[0], wholes[1])
    assert torch.equal(wholes[0], wholes[2])


@pytest.mark.spec("D5")
def test_a_session_keeps_what_experts_compute_and_times_them(mixtral: Path) -> None:
    name = "model.layers.0.mlp.experts"
    engine = build(mixtral, device="cpu", quantization="none", debug_outputs=(name,), **OPTIONS)
    tokens = random_tokens(7)
    step = {
        "token_ids": tokens,
        "query_start": [0, len(tokens)],
        "kv_lens": [len(tokens)],
        "block_tables": [[1]],
        "row_index": [len(tokens) - 1],
    }
    kept = []
    for use_kernels in (True, False):
        session = Session(engine, num_blocks=4, tokens_per_block=16, num_threads=1, use_kernels=use_kernels)
        kept.append(torch.from_numpy(session.run(step)[name]))
        times = {one.name: one for one in session.profile(step, num_runs=1)}
        assert times[name].kind == "experts"
        assert times[name].seconds > 0
    assert kept[0].shape == (len(tokens), 48)
    assert relative_error(*kept) < 1e-5


def test_bfloat16_experts(mixtral: Path) -> None:
    """A router stays float32."""
    package, rounded = (
        build(mixtral, device="cpu", dtype=dtype, quantization="none", **OPTIONS) for dtype in ("bfloat16", "float32")
    )
    executor = executor_of(package)
    for weight in package.program.weights:
        if weight.format == "bfloat16":
            values = torch.from_numpy(rounded.weights[weight.name].view(np.float32).copy())
            rounded.weights[weight.name] = values.bfloat16().float().numpy().view(np.uint8)  # type: ignore[index]
    exact = executor_of(rounded)
    found, expected = (torch.cat(run_steps(one, tokens_of_two())) for one in (executor, exact))
    assert relative_error(found, expected) < 1e-4
    for one in (executor, exact):
        one.close()


@pytest.mark.spec("E4")
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantized_experts_of_a_gguf_file_run_as_they_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("qwen3_moe", norm_topk_prob=True, **EXPERTS), kind, **EXPERTS_METADATA)
    options = {**OPTIONS, "max_seq_len": 256}
    package, exact = (build(path, device=device, **options) for device in ("cpu", "cuda"))
    formats = {weight.format for weight in package.program.weights if ".experts." in weight.name}
    assert formats == {kind.lower()}
    assert package.config.report["notices"] == []
    assert_near(package, exact, [random_tokens(41, vocab_size=96), random_tokens(23, seed=1, vocab_size=96)])
