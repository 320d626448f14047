"""GGUF files of every block type: those that programs know are used as they are, others converted, and all computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.builder.test_build import checkpoint_values, engine_values
from tests.checkpoints import gguf_files
from tests.checkpoints.gguf_files import QUANTIZABLE, tiny_model, write_model
from tests.checkpoints.test_gguf_dequantize import READ_ONLY
from tests.runtime.test_cpu_program import executor_of, run_steps, torch_executor_of
from tests.support.changed_checkpoints import ROWS
from tests.support.packed_linear import K_BLOCKS
from tests.support.single_thread import single_thread
from tests.support.tiny_models import random_tokens, relative_error
from tokenmill.builder.build import build
from tokenmill.checkpoints.row_formats import BLOCK_TYPES

pytestmark = pytest.mark.spec("D1", "E4")

KINDS = tuple(kind for kind in dict.fromkeys((*QUANTIZABLE, *READ_ONLY)) if kind != "BF16")
OPTIONS: dict[str, Any] = {"capture": "dispatch", "opt_level": 1, "max_seq_len": 256}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


def random_blocks(kind: str, num_rows: int, num_columns: int) -> np.ndarray:
    """Random bytes whose values have a deviation of 0.1: of types that the gguf library reads and does not write."""
    quantization = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    rng = np.random.default_rng(num_rows)
    blocks = rng.integers(0, 256, (num_rows, num_columns // block_size, block_bytes), np.uint8)
    one = gguf.quants.dequantize(with_scale(kind, blocks, 1.0).reshape(num_rows, -1), quantization)
    return with_scale(kind, blocks, 0.1 / one.std()).reshape(num_rows, -1)


def with_scale(kind: str, blocks: np.ndarray, value: float) -> np.ndarray:
    """The blocks with all their float16 numbers replaced by one."""
    scale = np.float16(value)
    if kind == "IQ1_M":  # four bits of the scale are the upper ones of each of four words
        words = blocks[..., 48:56].copy().view(np.uint16)
        bits = int(scale.view(np.uint16))
        words[:] = (words & 0x0FFF) | np.array([(bits << 12 - 4 * index) & 0xF000 for index in range(4)], np.uint16)
        blocks[..., 48:56] = words.view(np.uint8)
        return blocks
    for position in K_BLOCKS.get(kind.lower(), (0, (0,)))[1]:
        blocks[..., position : position + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks


def write_file(path: Path, kind: str) -> None:
    """A llama whose matrices are of a block type."""
    add_tensor = gguf_files.add_tensor

    def add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, wanted: str) -> None:
        if wanted == "F32" or kind in QUANTIZABLE:
            add_tensor(writer, name, array, wanted)
        else:
            writer.add_tensor(name, random_blocks(kind, *array.shape), raw_dtype=gguf.GGMLQuantizationType[kind])

    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "add_tensor", add)
        write_model(path, model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_type(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_file(path, kind)
    engine = build(path, **ROWS)
    notices = engine.config.report["notices"]
    is_known = kind in BLOCK_TYPES
    assert engine.config.quantization == (kind.lower() if is_known else "int8_group32")
    assert is_known == (not notices)
    assert is_known or f"of the type {kind}, which engines do not run: converted to int8_group32" in notices[0]
    found, expected = engine_values(engine), checkpoint_values(engine, path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert values.isfinite().all()
        assert torch.equal(found[name], values) if is_known else relative_error(found[name], values) < 0.01, name

    executor = executor_of(build(path, device="cpu", **OPTIONS))
    exact = torch_executor_of(build(path, device="cuda", quantization="none", dtype="float32", **OPTIONS))
    tokens = [random_tokens(41, vocab_size=96), random_tokens(23, seed=1, vocab_size=96)]
    logits, exact_logits = (torch.cat(run_steps(one, tokens)) for one in (executor, exact))
    executor.close()
    error = ((logits - exact_logits).norm() / exact_logits.norm()).item()
    assert 1e-5 < error < 0.05
