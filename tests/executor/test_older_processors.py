"""Engines on a processor that has none of the instructions that the kernels are made for: slower, the same tokens."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.older_processor import PORTABLE, ROOT, environment, greedy_tokens
from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.builder.build import build
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import ModelNotFoundError

pytestmark = [
    pytest.mark.spec("C1", "E4"),
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86 processor"),
]


def tokens_without_instructions(*models: Path) -> Any:
    """What a process finds that takes this machine for one with SSE2 alone."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.older_processor", PORTABLE, *map(str, models)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_engines_give_the_same_tokens(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    options: dict[str, Any] = {"device": "cpu", "capture": "dispatch", "opt_level": 1, "max_seq_len": 256}
    folders = [
        build(model, quantization=quantization, **options).save(tmp_path / quantization)
        for quantization in ("none", "int8")
    ]
    found = tokens_without_instructions(*folders)
    assert [one["kernels"] for one in found] == ["portable"] * 2
    assert [one["tokens"] for one in found] == [greedy_tokens(folder)["tokens"] for folder in folders]


@pytest.mark.real_model
def test_the_demo_model_gives_the_same_tokens() -> None:
    try:
        path = resolve_model("smollm2:135m", show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"smollm2:135m cannot be fetched: {error}")
    (found,) = tokens_without_instructions(path)
    assert found["kernels"] == "portable"
    assert found["tokens"] == greedy_tokens(path)["tokens"]
