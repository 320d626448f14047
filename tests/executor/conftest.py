"""One tiny model, and one executor of each kind, for all tests of the folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill import LLM, KvCacheConfig
from tokenmill.config import WorkerConfig

NAN_TOKEN = 319
"""A token whose embedding is not a number: a prompt with it gives logits that are none, and must fail alone."""

MODES: dict[str, dict[str, int]] = {
    "in-process": {},
    "1 replica": {"num_replicas": 1},
    "2 replicas": {"num_replicas": 2},
    "1 replica, 2 postproc": {"num_replicas": 1, "num_postprocess_workers": 2},
}


def make_llm(model_dir: Path, *, worker_config: WorkerConfig | None = None, **changes: Any) -> LLM:
    """The tiny model with a small cache and quick heartbeats."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_batch_size": 8,
        "max_num_tokens": 256,
        "num_threads": 1,
        "max_queue_size": 40,
        "kv_cache_config": KvCacheConfig(max_tokens=17_008, tokens_per_block=16),
        "worker_config": worker_config or WorkerConfig(heartbeat_interval=0.1, start_timeout=120.0),
    }
    return LLM(model_dir, **{**options, **changes})


def wait_until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def wait_until_idle(llm: LLM) -> None:
    """Wait until no request is under way and every block is free; then nothing may be lost."""
    wait_until(lambda: _is_idle(llm))
    llm.check_integrity()


def _is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.kv_cache.num_free_blocks == stats.kv_cache.num_blocks


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder() -> Iterator[None]:
    """Sockets of this session's processes in a folder of their own, so that a test sees what it leaves there itself."""
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp") as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        yield
        tempfile.tempdir = before


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama; one embedding is not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=16_384)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Iterator[LLM]:
    """The engine in this process, which the other kinds are compared with."""
    with make_llm(model_dir) as llm:
        yield llm


@pytest.fixture(scope="session", params=MODES)
def llm(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[LLM]:
    """An LLM of each kind; between tests it is idle and whole."""
    with make_llm(model_dir, **MODES[request.param]) as llm:
        yield llm
        wait_until_idle(llm)
        assert llm.stats().workers.num_deaths == 0


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model on disk."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
