"""`LLM` on a built engine: the tokens of the torch backend under every way of scheduling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.single_thread import single_thread
from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_programs import tiny_package
from tests.support.ways import GREEDY, NO_REUSE, WAYS, prompts_of
from tokenmill import LLM, BuildConfig, Engine, SamplingParams
from tokenmill.builder.build import build
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.errors import InvalidParameterError, PromptTooLongError, UnsupportedFeatureError, UserError
from tokenmill.executor.program_factory import describe_program_engine
from tokenmill.program.package import EnginePackage

pytestmark = pytest.mark.spec("D1", "H3")

PROMPTS = prompts_of(1, 2, 7, 31, 32, 33, 64, 100, 150, 3, 17)
CPU_WAYS: dict[str, dict[str, Any]] = {"as it is": {}, **WAYS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def package(model_dir: Path) -> EnginePackage:
    checkpoint = open_checkpoint(model_dir)
    state = {tensor.name: tensor.load() for tensor in checkpoint.tensors()}
    return tiny_package(checkpoint.hf_config, state, tokenizer=model_dir, max_seq_len=512)


@pytest.fixture(scope="module")
def engine_dir(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.save(tmp_path_factory.mktemp("engine") / "engine")


def make_llm(model: Path, **changes: Any) -> LLM:
    return LLM(model, **{"max_batch_size": 8, "max_seq_len": 512, "kv_cache_config": NO_REUSE, **changes})


def tokens_of(llm: LLM, params: Any = GREEDY) -> list[list[int]]:
    outputs: Any = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def torch_llm(model_dir: Path) -> Iterator[LLM]:
    with make_llm(model_dir, backend="torch", device="cpu", dtype="float32") as llm:
        yield llm


@pytest.mark.parametrize("way", CPU_WAYS)
@pytest.mark.spec("A2")
def test_greedy_tokens_are_those_of_the_torch_backend(torch_llm: LLM, engine_dir: Path, way: str) -> None:
    expected = tokens_of(torch_llm)
    with make_llm(engine_dir, **CPU_WAYS[way]) as llm:
        assert llm.description.backend == "engine"
        assert tokens_of(llm) == expected
        if way == "preempted":
            assert llm.stats().num_preemptions > 0
        assert tokens_of(llm) == expected  # a second time: on used slots and blocks
        llm.check_integrity()


def test_sampling_and_logprobs_are_those_of_the_torch_backend(torch_llm: LLM, engine_dir: Path) -> None:
    params = [
        SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=index, ignore_eos=True, logprobs=2)
        if index % 3 == 0
        else SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=1 if index % 3 == 1 else None)
        for index in range(len(PROMPTS))
    ]
    expected: Any = torch_llm.generate(PROMPTS, params, use_tqdm=False)
    with make_llm(engine_dir, max_num_tokens=50) as llm:
        found: Any = llm.generate(PROMPTS, params, use_tqdm=False)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for kind in ("logprobs", "prompt_logprobs"):
            entries = zip(getattr(one.outputs[0], kind), getattr(other.outputs[0], kind), strict=True)
            for entry, other_entry in entries:
                assert entry.keys() == other_entry.keys()
                for token, logprob in entry.items():
                    assert logprob.logprob == pytest.approx(other_entry[token].logprob, abs=1e-4)


def test_text_comes_from_the_engines_own_tokenizer(torch_llm: LLM, engine_dir: Path) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with make_llm(engine_dir) as llm:
        assert (
            llm.generate("the rain", params).outputs[0].text == torch_llm.generate("the rain", params).outputs[0].text
        )


def test_a_larger_size_than_the_engines_is_refused(engine_dir: Path) -> None:
    with pytest.raises(InvalidParameterError, match="built for 8") as caught:
        LLM(engine_dir, max_batch_size=9)
    assert caught.value.field == "max_batch_size"


@pytest.mark.parametrize("source", ["checkpoint", "engine"])
@pytest.mark.spec("A1")
def test_a_saved_model_gives_the_same_tokens(
    torch_llm: LLM, model_dir: Path, engine_dir: Path, tmp_path: Path, source: str
) -> None:
    model = model_dir if source == "checkpoint" else engine_dir
    with make_llm(model, backend="engine", device="cpu") as llm:
        expected, folder = tokens_of(llm), llm.save(tmp_path / "saved")
    with make_llm(folder) as llm:
        assert tokens_of(llm) == expected == tokens_of(torch_llm)
    with pytest.raises(UnsupportedFeatureError, match="no engine to save"):
        torch_llm.save(tmp_path / "other")


@pytest.mark.spec("A2")
def test_auto_takes_the_engine_on_a_cpu_and_says_why_not(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make_llm(model_dir, device="cpu") as llm:
        assert llm.description.backend == "engine"
    with make_llm(model_dir, device="cpu", attn_backend="cpu") as llm:
        assert llm.description.backend == "torch"
    assert "attn_backend='cpu' is of the torch backend" in caplog.text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"backend": "engine", "load_format": "dummy"}, "backend"),
        ({"backend": "engine", "dtype": "float16"}, "backend"),
        ({"backend": "torch", "quantization": "int8"}, "quantization"),
        ({"attn_backend": "cpu", "quantization": "q4_0"}, "backend"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(model_dir: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        make_llm(model_dir, device="cpu", **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backend": "torch"}, "cannot run on the torch backend"),
        ({"backend": "pytorch"}, "cannot run on the torch backend"),
        ({"load_format": "dummy"}, "its own weights"),
        ({"attn_backend": "reference"}, "attention kernels of their own"),
        ({"quantization": "int8"}, "are not quantized, and 'int8' is asked for"),
        ({"dtype": "bfloat16"}, "is float32, and 'bfloat16' is asked for"),
    ],
)
@pytest.mark.spec("A1")
def test_a_built_engine_is_not_run_as_another_one(engine_dir: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises((UnsupportedFeatureError, InvalidParameterError), match=complaint) as caught:
        make_llm(engine_dir, **changes)
    assert caught.value.field == next(iter(changes))


def test_what_a_built_engine_is_may_be_said(engine_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    with make_llm(engine_dir, backend="engine", dtype="float32"):
        pass
    built = build(model_dir, device="cpu", quantization="int8", max_seq_len=512, capture="dispatch", opt_level=1)
    with make_llm(built.save(tmp_path / "engine"), quantization="int8", max_num_tokens=64):
        pass
    with pytest.raises(InvalidParameterError, match="are int8_group32, and 'q4_0' is asked for"):
        make_llm(tmp_path / "engine", quantization="q4_0")


def test_quantizing_changes_the_logits_a_little(model_dir: Path, torch_llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, logprobs=0)
    exact: Any = torch_llm.generate(PROMPTS, params, use_tqdm=False)
    cache = NO_REUSE.model_copy(update={"dtype": "float32"})  # of the weights alone
    with make_llm(model_dir, device="cpu", quantization="int8", kv_cache_config=cache) as llm:
        found: Any = llm.generate(PROMPTS, params, use_tqdm=False)
    differences = [
        abs(one.outputs[0].cumulative_logprob - other.outputs[0].cumulative_logprob)
        for one, other in zip(found, exact, strict=True)
        if one.outputs[0].token_ids == other.outputs[0].token_ids
    ]
    assert len(differences) >= len(PROMPTS) - 2
    assert 0.0 < max(differences) < 0.5


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("int8", "bfloat16"), ("q4_1", "bfloat16")])
def test_the_cache_of_quantized_models_is_bfloat16(model_dir: Path, quantization: str, dtype: str) -> None:
    config = build(model_dir, device="cpu", quantization=quantization, capture="dispatch", opt_level=1).config
    assert config.kv_cache_dtype == dtype


def test_graphs_are_in_the_plan_of_an_engine_for_a_gpu(model_dir: Path) -> None:
    """As `inspect` prints it, where there is no GPU to measure on."""
    engine = build(model_dir, device="cuda", max_seq_len=64, capture="dispatch", opt_level=1, picture=False)
    plans = [
        describe_program_engine(
            LlmArgs(model="engine", enable_cuda_graphs=wanted), engine, torch.device("cuda"), 0, None
        ).memory
        for wanted in (True, False)
    ]
    assert plans[0].graphs == plans[0].activations == engine.program.arena_bytes > 0
    assert plans[1].graphs == 0


def test_prompts_longer_than_the_engine_was_built_for_are_refused(model_dir: Path, tmp_path: Path) -> None:
    engine = build(model_dir, max_input_len=5, max_seq_len=64, max_batch_size=2, capture="dispatch", opt_level=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM(engine.save(tmp_path / "engine")) as llm:
        assert len(llm.generate([1, 2, 3, 4, 5], params).outputs[0].token_ids) == 3
        with pytest.raises(PromptTooLongError, match="built for 5 at most"):
            llm.generate([1, 2, 3, 4, 5, 6], params)


@pytest.mark.parametrize("way", [{"backend": "engine"}, {"backend": "torch"}, {"num_replicas": 1}])
def test_sizes_of_a_build_configuration_are_those_of_the_engine(model_dir: Path, way: dict[str, Any]) -> None:
    sizes = BuildConfig(max_batch_size=3, max_num_tokens=48, max_seq_len=64, max_input_len=9)
    with LLM(model_dir, device="cpu", build_config=sizes, kv_cache_config=NO_REUSE, **way) as llm:
        found = llm.description
        assert (found.max_batch_size, found.max_num_tokens, found.max_seq_len) == (3, 48, 64)
        with pytest.raises(PromptTooLongError, match="9 at most"):
            llm.generate([5] * 10)
        assert llm.generate([5] * 9, SamplingParams(max_tokens=2, ignore_eos=True)).outputs[0].length == 2


def test_options_of_a_build_ask_for_an_engine_that_is_built_so(
    model_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    options = BuildConfig(disabled_passes=["fuse_residual"], debug_outputs=["model.layers.0.mlp.down_proj"])
    with make_llm(model_dir, device="cpu", build_config=options) as llm:
        assert llm.description.backend == "engine"
        saved = Engine.load(llm.save(tmp_path / "engine"))
    assert saved.config.build_config["disabled_passes"] == ["fuse_residual"]
    for arguments, model in (({"backend": "torch", "device": "cpu"}, model_dir), ({}, engine_dir)):
        with pytest.raises(UserError, match="build_config") as caught:
            make_llm(model, build_config=options, **arguments)
        assert caught.value.field == "disabled_passes"


def test_a_worker_serves_a_small_engine_as_this_process_does(model_dir: Path, tmp_path: Path) -> None:
    """Arguments that nobody gave follow the engine, on both sides of a pipe."""
    build(model_dir, BuildConfig(max_batch_size=3, max_seq_len=64)).save(tmp_path / "engine")
    found = []
    for num_replicas in (0, 1):
        with LLM(tmp_path / "engine", kv_cache_config=NO_REUSE, num_replicas=num_replicas) as llm:
            found.append((llm.description.max_batch_size, llm.description.max_seq_len))
    assert found == [(3, 64)] * 2
