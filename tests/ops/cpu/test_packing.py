"""Packed weights hold the values of the file, where the layout says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.packed_linear import file_blocks, make_weight, quantized_floats
from tokenmill.errors import CheckpointError, InvalidParameterError, UnsupportedFeatureError
from tokenmill.ops.cpu.packing import (
    ENCODINGS,
    FORMATS,
    PackedWeight,
    encoding_of,
    pack_blocks,
    pack_floats,
    packed_bytes,
)

BLOCK_FORMATS = [encoding.format for encoding in ENCODINGS if encoding.block_columns]


def read_value(weight: PackedWeight, row: int, column: int) -> float:
    """One value, found by the description of the layout alone."""
    encoding = encoding_of(weight.format)
    if weight.gated:
        half = weight.num_rows // 2
        position, lane = (row % half) // 16 * 2 + row // half, row % half % 16
    else:
        position, lane = row // 16, row % 16
    group, inside = column // 32, column % 32
    num_groups = -(-weight.num_columns // 32)
    record = weight.data[(position * num_groups + group) * encoding.group_bytes :][: encoding.group_bytes]
    if encoding.bits == 8:
        value = int(record[encoding.values_offset + inside // 4 * 64 + 4 * lane + inside % 4])
    else:
        byte = record[encoding.values_offset + inside % 16 // 4 * 64 + 4 * lane + inside % 4]
        value = int(byte) >> 4 if inside >= 16 else int(byte) & 15
    if encoding.bits == 5:
        value += (int(record[encoding.values_offset + 256 + 4 * lane + inside % 4]) >> (inside // 4) & 1) << 4
    if encoding.bits == 6:
        byte = record[encoding.values_offset + 256 + inside // 16 * 64 + 4 * lane + inside % 4]
        value += (int(byte) >> (inside % 16 // 4 * 2) & 3) << 4
    if encoding.scale_bytes == 0:
        padded = weight.data[-(len(weight.data) % (num_groups * encoding.group_bytes)) :].view(np.float32)
        return float(padded[position * 16 + lane]) * (value - encoding.zero_point)
    floats = record[: encoding.values_offset].view({2: np.float16, 4: np.float32}[encoding.scale_bytes])
    index = inside // 16 if encoding.scales_per_group == 2 else 0
    scale = float(floats[index * 16 + lane])
    if encoding.has_minimum:
        return scale * value + float(floats[(encoding.scales_per_group + index) * 16 + lane])
    return scale * (value - encoding.zero_point)


def assert_holds(weight: PackedWeight, values: Any) -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        row, column = int(generator.integers(weight.num_rows)), int(generator.integers(weight.num_columns))
        assert read_value(weight, row, column) == pytest.approx(values[row, column], rel=2e-7, abs=1e-7)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [32, 39])
def test_values_are_unchanged(weight_format: str, rows: int) -> None:
    weight, values = make_weight(weight_format, rows, 256)
    assert weight.data.shape == (packed_bytes(weight_format, rows, 256),)
    assert_holds(weight, values)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [64, 40])
def test_gate_and_up_rows_alternate_in_blocks(weight_format: str, rows: int) -> None:
    weight, values = make_weight(weight_format, 2 * rows, 256, gated=True)
    assert weight.num_rows == 2 * rows
    assert_holds(weight, values)


@pytest.mark.parametrize("weight_format", BLOCK_FORMATS)
def test_tensors_are_put_together_with_their_rows_in_the_order_asked_for(weight_format: str) -> None:
    (first, first_values), (second, second_values) = (file_blocks(weight_format, rows, 256, rows) for rows in (24, 20))
    order = np.random.default_rng(0).permutation(24)
    weight = pack_blocks(weight_format, [first, second], 256, row_order=[order, None])
    assert_holds(weight, np.concatenate([first_values[order], second_values]))


def test_the_rows_beyond_the_last_are_zero() -> None:
    weight, _ = make_weight("q8_0", 20, 32)
    records = weight.data.reshape(2, 1, -1)
    assert not records[1, 0, :32].view(np.float16)[4:].any()


@pytest.mark.parametrize("weight_format", ["int8_group32", "int8_channel"])
def test_float_weights_are_quantized_to_the_nearest_value(weight_format: str) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    weight[3] = 0
    weight[4, 32:64] = 0
    packed = pack_floats(weight_format, [weight[:7], weight[7:]])
    values = quantized_floats(weight_format, weight)
    assert_holds(packed, values)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    assert np.abs(values - weight).max() <= (largest / 127).max() * 0.51
    assert not values[3].any()


def test_what_cannot_be_packed_is_refused() -> None:
    raw, _ = file_blocks("q4_0", 4, 64)
    with pytest.raises(InvalidParameterError, match="48 is not a multiple"):
        pack_blocks("q4_0", [raw], 48)
    with pytest.raises(InvalidParameterError, match="blocks of 256 columns"):
        pack_blocks("q4_k", [raw], 64)
    with pytest.raises(InvalidParameterError, match=r"Part 1 is uint8 \(4, 35\)"):
        pack_blocks("q4_0", [raw, raw[:, :-1]], 64)
    with pytest.raises(InvalidParameterError, match="not gate and up"):
        pack_blocks("q4_0", [raw, raw[:2]], 64, gated=True)
    with pytest.raises(UnsupportedFeatureError, match="not a block format"):
        pack_blocks("int8_channel", [raw], 64)
    with pytest.raises(UnsupportedFeatureError, match="'iq4_nl'"):
        pack_blocks("iq4_nl", [raw], 64)
    with pytest.raises(UnsupportedFeatureError, match="cannot be packed as q4_0"):
        pack_floats("q4_0", [np.zeros((2, 32), np.float32)])
    with pytest.raises(InvalidParameterError, match=r"\[32, 64\] columns"):
        pack_floats("int8_channel", [np.zeros((2, 32), np.float32), np.zeros((2, 64), np.float32)])
    with pytest.raises(InvalidParameterError, match="Packed data"):
        PackedWeight(np.zeros(10, np.uint8), "q4_0", 4, 64)


@pytest.mark.parametrize("weight_format", ["int8_group32", "int8_channel"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(weight_format: str, value: float) -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[1, 5] = value
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        pack_floats(weight_format, [weight])


def test_scales_must_fit_float16() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        pack_floats("int8_group32", [np.full((1, 32), 1e8, np.float32)])
