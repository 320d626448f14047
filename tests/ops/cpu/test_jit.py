"""Native functions are compiled once per machine, and every time where nothing can be kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.older_processor import AVX2, FEATURES, Features
from tokenmill.ops.cpu import jit, machine_code
from tokenmill.ops.cpu.cpu_features import REQUIRED_FEATURES, DotProduct, best_dot_product, supported_dot_products
from tokenmill.ops.cpu.machine_code import Processor
from tokenmill.ops.cpu.native_functions import NativeSyntaxError
from tokenmill.ops.cpu.native_types import int64

pytestmark = pytest.mark.spec("H1")

PROGRAM = """
from tokenmill.ops.cpu.walker import lead_step
print(lead_step.read())
lead_step.address
"""


def square(x: int) -> int:
    return x * x


def new_square() -> jit.NativeFunction:
    return jit.NativeFunction(square, int64(int64))


def start_program() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    return tmp_path


def kept_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_the_next_process_reads_the_cache(empty_cache: Path) -> None:
    for expected in ("False\n", "True\n"):
        output, errors = start_program().communicate(timeout=120)
        assert (output, errors) == (expected, "")
    assert [path.name for path in (empty_cache / "native").iterdir()] == [jit.source_digest()]


def test_first_starts_at_the_same_time(empty_cache: Path) -> None:
    programs = [start_program() for _ in range(3)]
    errors = [program.communicate(timeout=120)[1] for program in programs]
    assert [(program.returncode, text) for program, text in zip(programs, errors, strict=True)] == [(0, "")] * 3
    (kept,) = kept_files(empty_cache)
    assert machine_code.read_code(kept) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"\x7fELF" + content[4:],
    ],
    ids=["empty", "last byte", "head alone", "one bit", "another file"],
)
def test_a_damaged_file_heals(empty_cache: Path, damage: Any) -> None:
    assert new_square().call(7) == 49
    (kept,) = kept_files(empty_cache)
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    again = new_square()
    assert not again.read()
    assert again.call(-3) == 9
    assert kept.read_bytes() == whole


def test_every_processor_has_its_own_code(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_square().call(7) == 49
    this, older = machine_code.host_processor(), Features(dict.fromkeys(FEATURES[AVX2], True))
    for other in (Processor("haswell", this.features), Processor(this.name, older.flatten())):
        monkeypatch.setattr(machine_code, "host_processor", partial(copy, other))
        assert not new_square().read()
        assert new_square().call(7) == 49
        assert new_square().read()
    assert len(kept_files(empty_cache)) == 3


def test_what_a_function_takes_from_its_closure_is_in_the_key() -> None:
    def times(factor: int) -> jit.NativeFunction:
        def product(x: int) -> int:
            return factor * x

        return jit.NativeFunction(product, int64(int64))

    assert times(2).key != times(3).key
    assert times(2).key == times(2).key
    assert [times(factor).call(7) for factor in (2, 3)] == [14, 21]


def test_compiles_without_a_cache_folder(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("TOKENMILL_CACHE", str(empty_cache / "file"))
    with caplog.at_level(logging.WARNING):
        assert new_square().call(7) == 49
    assert "square is compiled again in every process" in caplog.text


def test_a_function_without_a_source_file_is_refused() -> None:
    namespace: dict[str, Any] = {}
    exec("def double(x): return 2 * x", namespace)
    with pytest.raises(NativeSyntaxError, match="the source of double is not there"):
        jit.NativeFunction(namespace["double"], int64(int64)).llvm_code()


def test_the_best_way_that_the_cpu_has_is_chosen() -> None:
    avx512 = REQUIRED_FEATURES[DotProduct.AVX512_VNNI]
    avx2 = REQUIRED_FEATURES[DotProduct.AVX2]
    assert supported_dot_products(avx512 | avx2)[0] == DotProduct.AVX512_VNNI
    assert supported_dot_products(avx2 | {"avx512f"}) == (DotProduct.AVX2, DotProduct.PORTABLE)
    assert supported_dot_products(frozenset()) == (DotProduct.PORTABLE,)
    assert best_dot_product() in supported_dot_products()
