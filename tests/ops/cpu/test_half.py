"""float16 to float32 where the processor has no instruction for it: all 65,536 numbers, against NumPy."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from llvmlite import ir

from tokenmill.ops.cpu import simd
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.native_types import int64, none
from tokenmill.ops.cpu.scalars import load_f16
from tokenmill.ops.cpu.simd import F32X16, operation, store, store_f32

COUNT = 1 << 16


@operation(simd.float32x16, int64)
def load_halves(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    pointer = builder.inttoptr(address, ir.VectorType(ir.HalfType(), 16).as_pointer())
    values = simd.extend_half(builder, builder.load(pointer, align=2))
    assert values.type == F32X16
    return values


@pytest.mark.parametrize("has_instruction", [False, True])
def test_every_number(monkeypatch: pytest.MonkeyPatch, has_instruction: bool) -> None:
    monkeypatch.setattr(simd, "converts_half", lambda: has_instruction)

    def convert(source: int, vectors: int, scalars: int) -> None:
        for index in range(0, COUNT, 16):
            store(vectors + 4 * index, load_halves(source + 2 * index))
        for index in range(COUNT):
            store_f32(scalars + 4 * index, load_f16(source + 2 * index))

    function = NativeFunction(convert, none(int64, int64, int64))
    function.key = f"convert-{has_instruction}-{uuid.uuid4().hex}"  # what was compiled for one way is not for the other
    bits = np.arange(COUNT, dtype=np.uint32).astype(np.uint16)
    found = np.zeros((2, COUNT), np.float32)
    function.call(bits.ctypes.data, found[0].ctypes.data, found[1].ctypes.data)
    expected = bits.view(np.float16).astype(np.float32)
    for values in found:
        np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
        finite = ~np.isnan(expected)
        np.testing.assert_array_equal(values[finite].view(np.uint32), expected[finite].view(np.uint32))
