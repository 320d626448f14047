"""Rules for the whole test suite: tests marked `gpu` are skipped where there is no GPU, and no test leaves an engine
in the user's cache folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmill.env import read_environment

SHARED_CACHES = ("models", "native", "captures")
"""Folders of the cache that tests use as they are: what lies there is the same for everybody."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for this run, with the downloads and compiled kernels of the real one."""
    real = read_environment().cache_dir
    own = tmp_path_factory.mktemp("cache")
    for name in SHARED_CACHES:
        (real / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(real / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model on disk, to be read only."""
    from tests.support.tiny_checkpoint import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where none is found; torch is loaded only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
