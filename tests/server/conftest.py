"""One tiny model and one live server for all tests of the folder; tests that break an engine make their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.live_server import LiveServer, live_server
from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill import KvCacheConfig
from tokenmill.llm import LLM


def make_llm(model_dir: Path, **changes: Any) -> LLM:
    """An engine on the tiny model with a small cache: 4,096 tokens in 256 blocks."""
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_batch_size": 16,
        "max_num_tokens": 256,
        "num_threads": 1,
        "kv_cache_config": KvCacheConfig(max_tokens=4096, tokens_per_block=16),
    }
    return LLM(model_dir, **{**arguments, **changes})


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[LiveServer]:
    with make_llm(model_dir) as llm, live_server(llm, served_model_name="tiny") as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def own_server(model_dir: Path) -> Iterator[LiveServer]:
    """A server whose engine the test may break."""
    with make_llm(model_dir) as llm, live_server(llm, served_model_name="tiny") as running:
        yield running
