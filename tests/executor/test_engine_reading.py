"""Engines are read before torch is there, into memory that kernels use as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.builder.build import build
from tokenmill.errors import EngineFileError
from tokenmill.executor.engine_reading import in_huge_pages, start_reading
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.program_loading import StepLimits

pytestmark = pytest.mark.spec("H1")

LIMITS = StepLimits(max_batch_size=2, max_num_tokens=16, max_seq_len=64, num_blocks=8, tokens_per_block=16)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    model = write_tiny_model(folder / "model")
    return build(model, device="cpu", quantization="int8", capture="dispatch", opt_level=1).save(folder / "engine")


def test_weights_are_copied_once(engine_dir: Path) -> None:
    read = start_reading(str(engine_dir))
    assert read is not None
    package = read()
    mapped = EnginePackage.load(engine_dir)
    assert list(package.weights) == list(mapped.weights)
    assert package.program == mapped.program
    region = package.region
    assert region is not None
    for name, content in package.weights.items():
        assert np.array_equal(content, mapped.weights[name]), name
        assert content.ctypes.data % 64 == 0
        assert np.shares_memory(content, region)


def test_kernels_use_them_where_they_are(engine_dir: Path) -> None:
    """The executor computes with the very bytes of the package."""
    package = in_huge_pages(EnginePackage.load(engine_dir))
    outcomes = []
    for clears in (False, True):
        executor = CpuExecutor(package, LIMITS.arrays(), 8, torch.float32, 1)
        arrays = executor.arrays
        arrays.num_tokens = arrays.num_sequences = arrays.num_rows = 1
        arrays.token_ids[0], arrays.kv_lens[0] = 5, 1
        arrays.query_start[:2] = (0, 1)
        arrays.block_tables[0, 0] = 1
        if clears:
            assert package.region is not None
            package.region[:] = 0
        outcomes.append(executor.run().copy())
        executor.close()
    assert np.abs(outcomes[0]).max() > 0
    assert not np.array_equal(*outcomes)


def test_what_is_no_engine_is_not_read(tmp_path: Path) -> None:
    assert start_reading(str(tmp_path)) is None
    assert start_reading(str(tmp_path / "model.gguf")) is None


def test_a_damaged_engine_is_told_to_who_waits(engine_dir: Path, tmp_path: Path) -> None:
    copy = EnginePackage.load(engine_dir).save(tmp_path / "copy")
    weights = copy / "rank0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    read = start_reading(str(copy))
    assert read is not None
    with pytest.raises(EngineFileError, match=r"weights\.safetensors"):
        read()


def test_torch_is_not_needed(engine_dir: Path) -> None:
    program = (
        "import sys; from tokenmill.executor.engine_reading import start_reading; "
        f"assert start_reading({str(engine_dir)!r})().region is not None; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
