"""An engine on a tiny model that all properties share, and how many values each is checked with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill import LLM, KvCacheConfig

FUZZING = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Few values, always the same; `FUZZ_EXAMPLES` (set by `benchmarks/fuzz_http.py`) asks for more, and for others."""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("fuzz") / "model", max_positions=256)


@pytest.fixture(scope="session", params=[0, 1], ids=["in process", "worker process"])
def llm(model_dir: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        model_dir,
        dtype="float32",
        device="cpu",
        max_batch_size=8,
        max_num_tokens=64,
        num_threads=1,
        num_replicas=request.param,
        kv_cache_config=KvCacheConfig(max_tokens=1024, tokens_per_block=16),
    ) as llm:
        yield llm
