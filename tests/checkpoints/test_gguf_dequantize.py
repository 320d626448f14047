"""Block types against the gguf library, in one piece and in several."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as reference_dequantize

from tokenmill.checkpoints import gguf_dequantize
from tokenmill.checkpoints.gguf_dequantize import can_dequantize, dequantize, ggml_block_sizes

# Types that the library reads but cannot write: their blocks are random bytes.
READ_ONLY = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
NOT_READABLE = ("Q8_1", "Q8_K")


@pytest.mark.parametrize("kind", READ_ONLY)
@pytest.mark.parametrize("chunk_values", [1, 3 * 512, 1 << 20])
def test_equals_the_library_however_the_rows_are_cut(
    kind: str, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_dequantize, "_CHUNK_VALUES", chunk_values)
    block_size, block_bytes = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(3).integers(0, 256, size=(2, 5, 512 // block_size * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = reference_dequantize(raw, gguf.GGMLQuantizationType[kind])
    values = dequantize(raw.reshape(-1), kind, (2, 5, 512))
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_types_keep_their_values(dtype: torch.dtype) -> None:
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
    original = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = original.view(torch.uint8).reshape(-1).numpy()
    assert torch.equal(dequantize(raw, name, (3, 8)), original.float())


def test_every_type_of_the_library_is_either_read_or_refused() -> None:
    for name, block_size, block_bytes in ggml_block_sizes().values():
        raw = np.zeros(block_bytes, dtype=np.uint8)
        if can_dequantize(name):
            assert dequantize(raw, name, (block_size,)).shape == (block_size,)
        else:
            with pytest.raises(NotImplementedError):
                dequantize(raw, name, (block_size,))
    assert all(can_dequantize(name) for name in READ_ONLY)
    assert not any(can_dequantize(name) for name in NOT_READABLE)
