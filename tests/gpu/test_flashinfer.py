"""The engine with `attn_backend="flashinfer"`: Triton's tokens, but where two tokens are as good as equally likely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_engine import NO_REUSE, PROMPTS
from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.ways import WAYS
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.errors import UnsupportedFeatureError

pytestmark = [pytest.mark.gpu, pytest.mark.spec("E1")]

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2)
NEAR = 0.1
"""Log-probabilities this close may change places: two kernels round bfloat16 differently in every layer."""
FP8_CACHE = KvCacheConfig(max_tokens=8192, tokens_per_block=16, enable_block_reuse=False, dtype="fp8")
BACKEND_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float8 cache": {"kv_cache_config": FP8_CACHE},
    "chunked": WAYS["chunked"],
    "prefix cache": WAYS["prefix cache"],
}


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads are as wide as FlashInfer has kernels for."""
    return make_wide(tmp_path_factory.mktemp("wide"), 128)


def make_wide(folder: Path, head_dim: int) -> Path:
    pytest.importorskip("flashinfer")
    return write_tiny_model(folder, head_dim=head_dim, weight_scale=0.15)


def generate(model_dir: Path, **options: Any) -> list[Any]:
    values: dict[str, Any] = {"dtype": "bfloat16", "max_batch_size": 8, "max_seq_len": 512, "kv_cache_config": NO_REUSE}
    with LLM(model_dir, **{**values, **options}) as llm:
        assert llm.description.attn_backend == options["attn_backend"]
        outputs: Any = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        llm.check_integrity()
    return [output.outputs[0] for output in outputs]


def num_equal(actual: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(actual, expected, strict=True))
    return next((index for index, (one, two) in pairs if one != two), len(expected))


@pytest.mark.parametrize("way", BACKEND_WAYS)
def test_greedy_tokens_are_those_of_triton(wide_dir: Path, way: str) -> None:
    check_tokens(wide_dir, **BACKEND_WAYS[way])


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "float16"), (64, "float16"), (256, "bfloat16")])
def test_other_heads_and_types(tmp_path: Path, head_dim: int, dtype: str) -> None:
    check_tokens(make_wide(tmp_path, head_dim), dtype=dtype)


def check_tokens(model_dir: Path, **options: Any) -> None:
    expected = generate(model_dir, attn_backend="triton", **options)
    actual = generate(model_dir, attn_backend="flashinfer", **options)
    num_same = 0
    for one, two in zip(actual, expected, strict=True):
        same = num_equal(one.token_ids, two.token_ids)
        num_same += same
        if same < len(two.token_ids):
            best, second = sorted((entry.logprob for entry in two.logprobs[same].values()), reverse=True)[:2]
            assert best - second < NEAR
    assert num_same > 0.6 * sum(len(output.token_ids) for output in expected)


def test_models_that_it_has_no_kernels_for_are_refused(model_dir: Path) -> None:
    pytest.importorskip("flashinfer")
    for options, field in (
        ({"dtype": "bfloat16"}, "attn_backend"),
        ({"dtype": "float32"}, "dtype"),
        ({"dtype": "bfloat16", "deterministic": True}, "deterministic"),
    ):
        with pytest.raises(UnsupportedFeatureError) as caught:
            LLM(model_dir, attn_backend="flashinfer", kv_cache_config=NO_REUSE, **options)
        assert caught.value.field == field
