"""What users get wrong: each is one clear error that names the field; other requests go on and nothing leaks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_checkpoint import VOCAB_SIZE
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.errors import (
    CheckpointError,
    EngineError,
    ExecutorShutdownError,
    InvalidLogitsError,
    InvalidParameterError,
    ModelNotFoundError,
    OutOfMemoryError,
    PromptTooLongError,
    QueueFullError,
    RequestTooLargeError,
    TokenmillError,
    UnknownParameterError,
    UnsupportedFeatureError,
)

pytestmark = pytest.mark.spec("F1", "H2")

SMALL_CACHE = KvCacheConfig(max_tokens=256, tokens_per_block=16)


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with make_llm(model_dir) as llm:
        yield llm


def make_llm(model_dir: Path, **changes: Any) -> LLM:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_batch_size": 4, "kv_cache_config": SMALL_CACHE}
    return LLM(model_dir, **{**options, **changes})


BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any], type[TokenmillError], str]] = {
    "empty text": ("", {}, InvalidParameterError, "prompt"),
    "no tokens": ({"prompt_token_ids": []}, {}, InvalidParameterError, "prompt"),
    "prompt longer than the context": (list(range(10)) * 500, {}, PromptTooLongError, "prompt"),
    "prompt bigger than the cache": ([5] * 300, {}, RequestTooLargeError, "max_tokens"),
    "answer bigger than the cache": ([5] * 10, {"max_tokens": 1000}, RequestTooLargeError, "max_tokens"),
    "token beyond the vocabulary": ([5, VOCAB_SIZE], {}, InvalidParameterError, "prompt_token_ids"),
    "negative token": ([5, -1], {}, InvalidParameterError, "prompt_token_ids"),
    "fractional token": ([5, 1.5], {}, InvalidParameterError, "prompt_token_ids"),
    "fraction in a tensor": (torch.tensor([5.5]), {}, InvalidParameterError, "prompt_token_ids"),
    "booleans in a tensor": (torch.tensor([True]), {}, InvalidParameterError, "prompt_token_ids"),
    "rows of a matrix": (np.array([[5], [6]]), {}, InvalidParameterError, "prompt_token_ids"),
    "a number as an array": (np.array(5), {}, InvalidParameterError, "prompt"),
    "token too long to print": ([5, 10**5000], {}, InvalidParameterError, "prompt_token_ids"),
    "tokens beside what is no text": ({"prompt": 5, "prompt_token_ids": [5]}, {}, InvalidParameterError, "prompt"),
    "a number": (7, {}, InvalidParameterError, "prompt"),
    "nothing": (None, {}, InvalidParameterError, "prompt"),
    "unknown key": ({"promt": "a"}, {}, UnknownParameterError, "promt"),
    "dictionary without prompt": ({}, {}, InvalidParameterError, "prompt"),
    "message without role": ([{"content": "a"}], {}, InvalidParameterError, "messages"),
    "negative temperature": ("a", {"temperature": -1.0}, InvalidParameterError, "temperature"),
    "NaN temperature": ("a", {"temperature": math.nan}, InvalidParameterError, "temperature"),
    "infinite top_p": ("a", {"top_p": math.inf}, InvalidParameterError, "top_p"),
    "top_p zero": ("a", {"top_p": 0.0}, InvalidParameterError, "top_p"),
    "negative top_k": ("a", {"top_k": -5}, InvalidParameterError, "top_k"),
    "NaN penalty": ("a", {"repetition_penalty": math.nan}, InvalidParameterError, "repetition_penalty"),
    "no tokens to generate": ("a", {"max_tokens": 0}, InvalidParameterError, "max_tokens"),
    "more sequences than slots": ("a", {"n": 5, "temperature": 1.0}, InvalidParameterError, "n"),
    "half a character to stop at": ("a", {"stop": "\ud800"}, InvalidParameterError, "stop"),
    "half a character to avoid": ("a", {"bad": ["\ud800"]}, InvalidParameterError, "bad"),
    "misspelled parameter": ("a", {"temprature": 1.0}, UnknownParameterError, "temprature"),
    "beam search": ("a", {"use_beam_search": True}, UnsupportedFeatureError, "use_beam_search"),
}


@pytest.mark.parametrize(
    "priority", ["high", None, True, math.nan, 10**5000], ids=["text", "None", "boolean", "nan", "huge"]
)
def test_priority_is_a_number(llm: LLM, priority: Any) -> None:
    with pytest.raises(InvalidParameterError, match="priority is") as caught:
        llm.generate("a", priority=priority)
    assert caught.value.field == "priority"


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused_and_others_go_on(llm: LLM, case: str) -> None:
    prompt, values, error_class, field = BAD_REQUESTS[case]
    beside = llm.generate_async("the rain", SamplingParams(max_tokens=40, ignore_eos=True))
    with pytest.raises(error_class) as caught:
        llm.generate_async(prompt, SamplingParams(**values))
    assert caught.value.field == field
    assert len(str(caught.value)) > 10
    assert beside.result(30).outputs[0].length == 40
    llm.check_integrity()
    assert llm.stats().kv_cache.num_free_blocks == llm.stats().kv_cache.num_blocks


def test_one_bad_prompt_of_a_batch_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.generate(["the rain", [5] * 5000, "a stitch"], SamplingParams(max_tokens=100, ignore_eos=True))
    llm.generate("a")  # waits behind whatever the batch had started
    assert llm.stats().num_running == llm.stats().num_waiting == 0
    llm.check_integrity()


def test_numbers_of_parameters_and_prompts_differ(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


@pytest.mark.parametrize("params", [3, {"max_tokens": 3}, "greedy", (SamplingParams() for _ in "ab")])
def test_parameters_of_another_type_are_named(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidParameterError, match="not SamplingParams or a list of them") as caught:
        llm.generate(["a", "b"], params)
    assert caught.value.field == "sampling_params"


@pytest.mark.parametrize("messages", [None, 3, {"role": "user", "content": "a"}, "a"])
def test_what_is_no_conversation_is_named(llm: LLM, messages: Any) -> None:
    for chat in (llm.chat, llm.chat_async):
        with pytest.raises(InvalidParameterError, match=f"got {type(messages).__name__}") as caught:
            chat(messages)
        assert caught.value.field == "messages"


@pytest.mark.parametrize("request_", [None, "7", 7.0])
def test_what_is_no_request_is_not_aborted(llm: LLM, request_: Any) -> None:
    with pytest.raises(InvalidParameterError, match="not a result or its id"):
        llm.abort(request_)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[TokenmillError], str]] = {
    "misspelled": ({"max_batchsize": 4}, UnknownParameterError, "max_batchsize"),
    "nested misspelled": ({"kv_cache_config": {"max_token": 4}}, UnknownParameterError, "max_token"),
    "wrong dtype": ({"dtype": "float8"}, InvalidParameterError, "dtype"),
    "no such device": ({"device": "cuda:99"}, InvalidParameterError, "device"),
    "nonsense device": ({"device": "abacus"}, InvalidParameterError, "device"),
    "unknown attention backend": ({"attn_backend": "cpuu"}, InvalidParameterError, "attn_backend"),
    "longer than the model's context": ({"max_seq_len": 10**6}, InvalidParameterError, "max_seq_len"),
    "a boolean for a number": ({"max_batch_size": True}, InvalidParameterError, "max_batch_size"),
    "no batch": ({"max_batch_size": 0}, InvalidParameterError, "max_batch_size"),
    "cache beyond memory": ({"kv_cache_config": KvCacheConfig(max_tokens=10**12)}, OutOfMemoryError, "kv_cache_config"),
    "two ranks": ({"tensor_parallel_size": 2}, UnsupportedFeatureError, "tensor_parallel_size"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused(model_dir: Path, case: str) -> None:
    values, error_class, field = BAD_ARGUMENTS[case]
    with pytest.raises(error_class) as caught:
        make_llm(model_dir, **values)
    assert caught.value.field == field


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path / "nowhere", "smolm2:135m", "no-such-org/no-such-model"):
        with pytest.raises(ModelNotFoundError) as caught:
            LLM(name)
        assert caught.value.field == "model"


def test_an_unknown_tokenizer_is_not_the_model(model_dir: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="No model 'nowhere'") as caught:
        make_llm(model_dir, tokenizer="nowhere")
    assert caught.value.field == "tokenizer"


def damaged(model_dir: Path, target: Path, damage: str) -> Path:
    shutil.copytree(model_dir, target)
    weights, config_file = target / "model.safetensors", target / "config.json"
    config = json.loads(config_file.read_text())
    match damage:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "corrupt header":
            weights.write_bytes(b"\xff" * 16 + weights.read_bytes()[16:])
        case "no weights":
            weights.unlink()
        case "no configuration":
            config_file.unlink()
        case "configuration is not JSON":
            config_file.write_text("{")
        case "another size":
            config_file.write_text(json.dumps({**config, "intermediate_size": 96}))
        case "one layer too many":
            config_file.write_text(json.dumps({**config, "num_hidden_layers": 3}))
        case "one layer too few":
            config_file.write_text(json.dumps({**config, "num_hidden_layers": 1}))
        case _:
            (target / "tokenizer.json").write_text("[]")
    return target


@pytest.mark.parametrize(
    "damage",
    [
        "truncated weights",
        "corrupt header",
        "no weights",
        "no configuration",
        "configuration is not JSON",
        "another size",
        "one layer too many",
        "one layer too few",
        "damaged tokenizer",
    ],
)
def test_damaged_checkpoint_is_refused(model_dir: Path, tmp_path: Path, damage: str) -> None:
    broken = damaged(model_dir, tmp_path / "broken", damage)
    with pytest.raises(TokenmillError) as caught:
        make_llm(broken)
    assert caught.value.field in ("model", "tokenizer")
    assert str(tmp_path) in str(caught.value)


def test_unsupported_architecture_names_itself(model_dir: Path, tmp_path: Path) -> None:
    broken = damaged(model_dir, tmp_path / "broken", "damaged tokenizer")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UnsupportedFeatureError, match=r"lama.*llama"):
        make_llm(broken, skip_tokenizer_init=True)


def test_truncated_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        LLM(file)


def test_full_queue_refuses_and_generate_waits(model_dir: Path) -> None:
    with make_llm(model_dir, max_queue_size=2) as llm:
        params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=1.0, seed=0)  # a token a step
        results = [llm.generate_async("the rain", params) for _ in range(6)]
        with pytest.raises(QueueFullError):
            llm.generate_async("one more", params)
        assert [result.result(60).outputs[0].length for result in results] == [200] * 6
        assert len(llm.generate(["the rain"] * 20, SamplingParams(max_tokens=2, ignore_eos=True))) == 20


def test_nan_logits_end_that_request_alone(model_dir: Path) -> None:
    """A token whose embedding is NaN poisons every sequence that holds it, and no other."""
    from safetensors.torch import load_file, save_file

    poisoned = model_dir.parent / "poisoned"
    shutil.copytree(model_dir, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][99] = math.nan
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    with make_llm(poisoned) as llm, make_llm(model_dir) as healthy:
        params = SamplingParams(max_tokens=12, ignore_eos=True, bad_token_ids=[99])
        expected = healthy.generate("the rain", params).outputs[0].token_ids
        for _ in range(4):  # later rounds run on blocks that held NaN
            good = [llm.generate_async("the rain", params) for _ in range(2)]
            bad = llm.generate_async([5, 99, 6] * 20, params)
            with pytest.raises(InvalidLogitsError):
                bad.result(30)
            assert [result.result(30).outputs[0].token_ids for result in good] == [expected] * 2
        llm.check_integrity()


def test_after_shutdown_every_request_has_ended(model_dir: Path) -> None:
    llm = make_llm(model_dir)
    result = llm.generate_async("the rain", SamplingParams(max_tokens=200, ignore_eos=True))
    llm.shutdown(grace_period=0.0)
    llm.shutdown()
    with pytest.raises(ExecutorShutdownError):
        result.result(10)
    with pytest.raises(ExecutorShutdownError):
        llm.generate("a")
    with pytest.raises(ExecutorShutdownError):
        llm.check_health()


@pytest.mark.parametrize("backend", ["engine", "torch"])
def test_failing_step_ends_its_requests_and_the_engine_goes_on(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    from tokenmill.runtime.model_runner import ModelRunner
    from tokenmill.runtime.program_runner import ProgramRunner

    runner_type: Any = ProgramRunner if backend == "engine" else ModelRunner
    with make_llm(model_dir, backend=backend) as llm:
        launch = runner_type.launch
        with monkeypatch.context() as patch:

            def fail(runner: Any, plan: Any) -> Any:
                raise RuntimeError("the device is on fire")

            patch.setattr(runner_type, "launch", fail)
            with pytest.raises(EngineError, match="on fire"):
                llm.generate("the rain")
        assert runner_type.launch is launch
        assert llm.generate("the rain", SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].length == 3
        llm.check_integrity()
