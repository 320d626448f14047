"""The kernels on a processor with AVX2 and nothing newer: the same tests in a process that takes this one for such."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.older_processor import environment

ROOT = Path(__file__).parents[3]
SELECTED = (
    "test_attention.py::test_mixed_steps",
    "test_attention.py::test_blocks_windows_and_caps",
    "test_linear_float.py::test_products",
    "test_quantize.py::test_values_are_the_nearest_ones",
    "test_rope.py::test_rope_and_cache",
)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86 processor")
def test_kernels_with_avx2() -> None:
    """Attention and products use other tiles there, and have no bfloat16 instruction."""
    tests = [f"tests/ops/cpu/{name}" for name in SELECTED]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.older_processor", *tests],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
