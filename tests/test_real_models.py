"""The demo models' real weights against transformers, and against themselves under every way of scheduling."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.prompts import PROMPTS
from tests.support.tiny_models import CPU, all_logits, relative_error, sequences_for
from tokenmill import LLM, KvCacheConfig, SamplingParams, SchedulerConfig
from tokenmill.attention.select import select_backend
from tokenmill.builder.build import build
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.checkpoints.loading import load_weights
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.errors import ModelNotFoundError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.models import ModelConfig, load_model_class
from tokenmill.runtime.session import Session
from tokenmill.tokenization import load_tokenizer

pytestmark = pytest.mark.real_model

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


def model_file(alias: str) -> Path:
    try:
        return resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"{alias} cannot be fetched: {error}")


def reference_model(path: Path) -> Any:
    """The model as transformers reads the same file, in float32."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def demo_llm(**changes: Any) -> LLM:
    return LLM(model_file("smollm2:135m"), dtype="float32", max_seq_len=512, **changes)


def token_ids(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with demo_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(demo: LLM) -> list[list[int]]:
    """Tokens of every prompt when it runs alone."""
    return [token_ids([demo.generate(prompt, GREEDY)])[0] for prompt in PROMPTS]


@pytest.mark.spec("A1")
def test_greedy_tokens_are_those_of_transformers(demo: LLM, expected: list[list[int]]) -> None:
    """Each answer is what transformers would choose, token by token: its argmax after prompt and answer so far."""
    assert demo.tokenizer is not None
    reference = reference_model(model_file("smollm2:135m"))
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        prompt_ids = demo.tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt_ids + answer])).logits[0]
        assert len(answer) == NUM_TOKENS
        assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == answer, prompt


@pytest.mark.spec("H3")
def test_sixteen_at_once_give_the_tokens_of_one(demo: LLM, expected: list[list[int]]) -> None:
    assert token_ids(demo.generate(list(PROMPTS), GREEDY, use_tqdm=False)) == expected
    assert demo.stats().num_running == 0


@pytest.mark.spec("H3")
def test_prefix_cache_on_and_off_give_the_same_tokens(demo: LLM, expected: list[list[int]]) -> None:
    before = demo.stats().kv_cache.num_hit_tokens
    again = token_ids(demo.generate(list(PROMPTS), GREEDY, use_tqdm=False))  # everything is cached by now
    assert demo.stats().kv_cache.num_hit_tokens > before
    with demo_llm(kv_cache_config=KvCacheConfig(enable_block_reuse=False)) as llm:
        fresh = token_ids(llm.generate(list(PROMPTS), GREEDY, use_tqdm=False))
        assert llm.stats().kv_cache.num_hit_tokens == 0
    assert again == fresh == expected


@pytest.mark.spec("H3")
def test_chunked_prefill_gives_the_tokens_of_whole_prefill(demo: LLM) -> None:
    assert demo.tokenizer is not None
    text = " ".join(PROMPTS)
    token_list = demo.tokenizer.encode(text)
    prompts = [token_list[start : start + 150] for start in range(0, 24, 4)]
    whole = token_ids(demo.generate(prompts, GREEDY, use_tqdm=False))
    no_reuse = KvCacheConfig(enable_block_reuse=False)
    with demo_llm(max_num_tokens=37, kv_cache_config=no_reuse) as llm:
        chunked = token_ids(llm.generate(prompts, GREEDY, use_tqdm=False))
        assert llm.stats().num_steps > len(prompts) * 150 // 37
    assert chunked == whole


@pytest.mark.spec("H3", "C4")
def test_preempted_requests_give_the_tokens_of_uninterrupted_ones(expected: list[list[int]]) -> None:
    config = SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    cache = KvCacheConfig(max_tokens=160, tokens_per_block=8)
    with demo_llm(scheduler_config=config, kv_cache_config=cache) as llm:
        tokens = token_ids(llm.generate(list(PROMPTS), GREEDY, use_tqdm=False))
        assert llm.stats().num_preemptions > 0
        llm.check_integrity()
    assert tokens == expected


@pytest.mark.spec("D6")
@pytest.mark.parametrize("alias", ["smollm2:135m", "gemma3:270m"])
def test_logits_of_real_weights_are_those_of_transformers(alias: str) -> None:
    path = model_file(alias)
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    context = LayerContext(dtype=torch.float32, device=CPU, backend=select_backend("auto", CPU))
    model = load_model_class(config.model_type)(config, context)
    load_weights(weight_targets(model), checkpoint, ignore=model.ignored_weights)
    finalize_weights(model)
    token_list = [(7 * index * index + 11) % 40000 + 100 for index in range(48)]
    with torch.inference_mode():
        reference = reference_model(path)(torch.tensor([token_list])).logits[0]
    logits = all_logits(model, sequences_for(model), [("row", token_list)])
    assert relative_error(logits, reference) < 1e-4
    assert logits.argmax(-1).tolist() == reference.argmax(-1).tolist()


@pytest.mark.spec("D1")
def test_torch_and_engine_give_the_same_tokens(demo: LLM, expected: list[list[int]]) -> None:
    assert demo.description.backend == "engine"
    with demo_llm(backend="torch", device="cpu") as llm:
        assert llm.description.backend == "torch"
        assert token_ids(llm.generate(list(PROMPTS), GREEDY, use_tqdm=False)) == expected


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """Tokens of real text: this project's own documents."""
    docs = Path(__file__).parents[1] / "docs"
    text = "\n".join((docs / name).read_text(encoding="utf-8") for name in ("architecture.md", "log.md", "errors.md"))
    ids: list[int] = tokenizer.encode(text)
    assert len(ids) >= count
    return ids[:count]


@pytest.mark.spec("D1", "E4")
@pytest.mark.parametrize(
    ("alias", "quantization", "kv_cache_dtype"),
    [
        ("smollm2:135m", "auto", "float32"),
        ("smollm2:135m", "auto", "bfloat16"),
        ("smollm2:135m", "int8", "bfloat16"),
        ("smollm2:135m", "none", "bfloat16"),
        ("gemma3:270m", "auto", "bfloat16"),
    ],
)
def test_engines_are_near_float_math_on_the_same_values(alias: str, quantization: str, kv_cache_dtype: str) -> None:
    """The file's own 4-bit values, int8, and floats, with both types of cache: logits of 1,000 tokens of text against
    float math on these values."""
    path = model_file(alias)
    token_list = text_tokens(load_tokenizer(path), 1000)
    found = engine_logits(path, token_list, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    error, agreement = compared(found, exact_logits(path, tuple(token_list)))
    assert error <= 0.1
    assert agreement >= 0.93


def compared(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Relative error of logits less their mean, which no softmax sees; agreement of the likeliest tokens."""
    found, exact = (one - one.mean(1, keepdim=True) for one in (found, exact))
    error = ((found - exact).norm() / exact.norm()).item()
    return error, (found.argmax(1) == exact.argmax(1)).float().mean().item()


@cache
def exact_logits(path: Path, token_list: tuple[int, ...]) -> torch.Tensor:
    """The same in float32."""
    return engine_logits(path, list(token_list), quantization="none", dtype="float32", kv_cache_dtype="float32")


def engine_logits(path: Path, token_list: list[int], **options: Any) -> torch.Tensor:
    """[T, V] by a built engine, 250 positions after another."""
    engine = build(path, device="cpu", capture="dispatch", opt_level=1, max_seq_len=1024, max_batch_size=256, **options)
    session = Session(engine, num_blocks=40)
    parts = []
    for start in range(0, len(token_list), 250):
        tokens = token_list[start : start + 250]
        step = {
            "token_ids": tokens,
            "query_start": [0, len(tokens)],
            "kv_lens": [start + len(tokens)],
            "block_tables": [list(range(1, 33))],
            "row_index": list(range(len(tokens))),
        }
        parts.append(torch.from_numpy(session.run(step)["logits"]))
    return torch.cat(parts)
