"""Look-ups in tables of every format, as rows and packed, against gguf's own reader and plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tests.support.packed_linear import file_blocks, make_weight
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.cpu.embedding import embedding, embedding_arguments
from tokenmill.ops.cpu.linear_float import pack_float_weight
from tokenmill.ops.cpu.packing import BLOCK_READERS, FORMATS, pack_blocks

IDS = torch.tensor([3, 0, 36, 3, 17], dtype=torch.int32)
ROWS, COLUMNS = 37, 256
BLOCK_FORMATS = tuple(BLOCK_READERS)


def check(table: np.ndarray, table_format: str, values: torch.Tensor, *, packed: bool) -> None:
    """Rows IDS of a table, scaled by 1.5, in a wider buffer; values: float [ROWS, columns]."""
    columns = values.shape[1]

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(len(IDS), columns + 3)
        arguments = embedding_arguments(
            token_ids=IDS.data_ptr(),
            table=table.ctypes.data,
            table_format=table_format,
            num_rows=ROWS,
            columns=columns,
            output=matrix(y, 1),
            packed=packed,
            scale=1.5,
        )
        run_ops([(embedding, arguments)], len(IDS), num_threads)
        assert y[:, [0, -2, -1]].isnan().all()
        return y[:, 1:-2]

    expected = (values[IDS.long()].double() * 1.5).float()
    torch.testing.assert_close(run_equally(compute), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("table_format", BLOCK_FORMATS)
def test_rows_of_blocks(table_format: str) -> None:
    raw, values = file_blocks(table_format, ROWS, COLUMNS)
    check(np.ascontiguousarray(raw), table_format, torch.from_numpy(values), packed=False)


@pytest.mark.parametrize("table_format", FORMATS)
def test_packed_rows(table_format: str) -> None:
    weight, values = make_weight(table_format, ROWS, COLUMNS)
    check(weight.data, table_format, torch.from_numpy(values), packed=True)


@pytest.mark.parametrize("table_format", BLOCK_FORMATS)
def test_packed_rows_are_the_rows_of_the_file(table_format: str) -> None:
    """To the bit: an engine keeps a tied embedding packed alone."""
    raw, _ = file_blocks(table_format, ROWS, COLUMNS)
    packed = pack_blocks(table_format, [np.ascontiguousarray(raw)], COLUMNS)
    found = []
    for table, is_packed in ((np.ascontiguousarray(raw), False), (packed.data, True)):
        y = nans(len(IDS), COLUMNS)
        arguments = embedding_arguments(
            token_ids=IDS.data_ptr(),
            table=table.ctypes.data,
            table_format=table_format,
            num_rows=ROWS,
            columns=COLUMNS,
            output=matrix(y, 0),
            packed=is_packed,
        )
        run_ops([(embedding, arguments)], len(IDS))
        found.append(y)
    assert torch.equal(*found)


@pytest.mark.parametrize("columns", [40, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(columns: int, packed: bool, dtype: torch.dtype) -> None:
    table = torch.randn(ROWS, columns).to(dtype)
    bits = table.numpy() if dtype == torch.float32 else table.view(torch.uint16).numpy()
    content = pack_float_weight([bits]) if packed else bits
    check(content, str(dtype).removeprefix("torch."), table.float(), packed=packed)


def test_rows_of_int8_channel() -> None:
    generator = np.random.default_rng(0)
    integers = generator.integers(-127, 128, (ROWS, 50), dtype=np.int8)
    scales = generator.random((ROWS, 1)).astype(np.float32)
    rows = np.concatenate([scales.view(np.uint8), integers.view(np.uint8)], axis=1)
    check(rows, "int8_channel", torch.from_numpy(integers * scales), packed=False)


def test_rows_of_int8_group32() -> None:
    generator = np.random.default_rng(0)
    integers = generator.integers(-127, 128, (ROWS, 2, 32), dtype=np.int8)
    integers[:, 1, 20:] = 0
    scales = generator.random((ROWS, 2, 1)).astype(np.float16)
    rows = np.concatenate([scales.view(np.uint8), integers.view(np.uint8)], axis=2).reshape(ROWS, -1)
    values = (integers * scales.astype(np.float32)).reshape(ROWS, -1)[:, :52]
    check(np.ascontiguousarray(rows), "int8_group32", torch.from_numpy(values), packed=False)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="iq4_nl"):
        embedding_arguments(token_ids=0, table=0, table_format="iq4_nl", num_rows=1, columns=256, output=(0, 0))
