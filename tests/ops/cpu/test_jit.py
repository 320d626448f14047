"""Native functions are compiled once per machine, and every time where nothing can be kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import types

from tokenmill.ops.cpu import jit
from tokenmill.ops.cpu.cpu_features import REQUIRED_FEATURES, DotProduct, best_dot_product, supported_dot_products

PROGRAM = """
from tokenmill.ops.cpu.walker import lead_step
lead_step.address
print(lead_step.compiled.cache_hits)
"""


def square(x: int) -> int:
    return x * x


def run_program() -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    return tmp_path


def test_the_next_process_reads_the_cache(empty_cache: Path) -> None:
    assert run_program() == "0"
    assert run_program() == "1"
    assert [path.name for path in (empty_cache / "native").iterdir()] == [jit.source_digest()]


def test_compiles_without_a_cache_folder(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("TOKENMILL_CACHE", str(empty_cache / "file"))
    with caplog.at_level(logging.WARNING):
        assert jit.NativeFunction(square, types.int64(types.int64)).call(7) == 49
    assert "square is compiled again in every process" in caplog.text


def test_compiles_without_a_source_file(caplog: pytest.LogCaptureFixture) -> None:
    namespace: dict[str, Any] = {}
    exec("def double(x): return 2 * x", namespace)
    with caplog.at_level(logging.WARNING):
        assert jit.NativeFunction(namespace["double"], types.int64(types.int64)).call(7) == 14
    assert "double is compiled again" in caplog.text


def test_numba_keeps_its_own_cache_folder(empty_cache: Path) -> None:
    before = numba.config.CACHE_DIR
    assert jit.NativeFunction(square, types.int64(types.int64)).call(-3) == 9
    assert before == numba.config.CACHE_DIR
    assert list(empty_cache.rglob("*square*"))


def test_the_best_way_that_the_cpu_has_is_chosen() -> None:
    avx512 = REQUIRED_FEATURES[DotProduct.AVX512_VNNI]
    avx2 = REQUIRED_FEATURES[DotProduct.AVX2]
    assert supported_dot_products(avx512 | avx2)[0] == DotProduct.AVX512_VNNI
    assert supported_dot_products(avx2 | {"avx512f"}) == (DotProduct.AVX2, DotProduct.PORTABLE)
    assert supported_dot_products(frozenset()) == (DotProduct.PORTABLE,)
    assert best_dot_product() in supported_dot_products()
