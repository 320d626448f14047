"""The tiny model, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_checkpoint import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model on disk."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
