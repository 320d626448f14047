"""Quantized weights and activations made with NumPy, and the op `linear` run on them. Used by the tests of ops/cpu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import int8_group32_bytes, panel_width
from tokenmill.ops.cpu.linear_int8 import (
    SCRATCH_BYTES,
    Activations,
    LinearWeight,
    Matrix,
    linear_arguments,
    linear_kernel,
)
from tokenmill.ops.cpu.packing import PackedWeight, pack_blocks, pack_floats
from tokenmill.ops.cpu.threads import OpList, ThreadPool

Array = npt.NDArray[Any]
GROUP = 32
K_BLOCKS = {
    "q2_k": (84, (80, 82)),
    "q3_k": (110, (108,)),
    "q4_k": (144, (0, 2)),
    "q5_k": (176, (0, 2)),
    "q6_k": (210, (208,)),
}
"""Bytes of a block of 256 values, and where its float16 numbers are."""


def aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory at a multiple of 64."""
    memory = np.zeros(num_bytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + num_bytes]


def file_blocks(weight_format: str, rows: int, columns: int, seed: int = 0) -> tuple[npt.NDArray[np.uint8], Array]:
    """A tensor as a GGUF file holds it, [rows, bytes], and its values by gguf's own reader, float64."""
    generator = np.random.default_rng(seed)
    kind = GGMLQuantizationType[weight_format.upper()]
    if weight_format in K_BLOCKS:  # gguf cannot make these, only read them
        size, floats = K_BLOCKS[weight_format]
        blocks = generator.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
        for offset in floats:
            numbers = (generator.random((rows, columns // 256, 1)) * 1e-3).astype(np.float16)
            blocks[:, :, offset : offset + 2] = numbers.view(np.uint8)
        raw = blocks.reshape(rows, -1)
    else:
        raw = quants.quantize(generator.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.1), kind)
    return raw, quants.dequantize(raw, kind).astype(np.float64)


def quantized_floats(weight_format: str, weight: Array) -> Array:
    """Values of a float weight after quantization to int8_group32 or int8_channel, float64, by definition."""
    rows, columns = weight.shape
    size = GROUP if weight_format == "int8_group32" else columns
    result = np.zeros((rows, columns))
    for begin in range(0, columns, size):
        part = weight[:, begin : begin + size]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        if weight_format == "int8_group32":
            scale = scale.astype(np.float16).astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        integers = np.clip(np.rint(part * inverse), -127, 127)
        result[:, begin : begin + size] = integers * scale.astype(np.float64)
    return result


def make_weight(
    weight_format: str, rows: int, columns: int, *, gated: bool = False, seed: int = 0
) -> tuple[PackedWeight, Array]:
    """A packed weight and its values, float64 [rows, columns]."""
    if weight_format.startswith("int8"):
        weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
        parts = np.split(weight, 2) if gated else [weight]
        return pack_floats(weight_format, parts, gated=gated), quantized_floats(weight_format, weight)
    raw, values = file_blocks(weight_format, rows, columns, seed)
    return pack_blocks(weight_format, np.split(raw, 2) if gated else [raw], columns, gated=gated), values


def quantize_activations(x: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """float32 [tokens, columns] as an `int8_group32` buffer, and the values that it holds, float64."""
    tokens, columns = x.shape
    width = panel_width(tokens)
    panels, groups = -(-tokens // width), -(-columns // GROUP)
    padded = np.zeros((panels * width, groups * GROUP), np.float32)
    padded[:tokens, :columns] = x
    parts = padded.reshape(-1, groups, GROUP)
    scale = np.abs(parts).max(axis=-1) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    integers = np.rint(parts * inverse[..., None])
    sums = (integers.sum(axis=-1) * scale).astype(np.float32)
    buffer = aligned(int8_group32_bytes(tokens, columns))
    records = buffer.reshape(panels, groups, 40 * width)
    words = integers.astype(np.int8).reshape(panels, width, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    records[:, :, : 32 * width] = np.ascontiguousarray(words).reshape(panels, groups, -1).view(np.uint8)
    for first, numbers in ((32, scale), (36, sums)):
        by_panel = np.ascontiguousarray(numbers.reshape(panels, width, groups).transpose(0, 2, 1))
        records[:, :, first * width : (first + 4) * width] = by_panel.view(np.uint8)
    return buffer, (integers * scale[..., None].astype(np.float64)).reshape(-1, groups * GROUP)[:tokens, :columns]


def read_activations(buffer: npt.NDArray[np.uint8], tokens: int, columns: int) -> tuple[Array, Array, Array]:
    """Integers [tokens, columns], scales and sums [tokens, groups] of an `int8_group32` buffer."""
    width = panel_width(tokens)
    panels, groups = -(-tokens // width), -(-columns // GROUP)
    records = buffer.reshape(panels, groups, 40 * width)
    words = records[:, :, : 32 * width].view(np.int8).reshape(panels, groups, 8, width, 4)
    integers = words.transpose(0, 3, 1, 2, 4).reshape(panels * width, groups * GROUP)[:tokens, :columns]
    scales, sums = (
        np.ascontiguousarray(records[:, :, first * width : (first + 4) * width])
        .view(np.float32)
        .reshape(panels, groups, width)
        .transpose(0, 2, 1)
        .reshape(-1, groups)[:tokens]
        for first in (32, 36)
    )
    return integers, scales, sums


@dataclass
class LinearRun:
    """One op `linear`: what it is given, and `run`."""

    weight: PackedWeight
    x: npt.NDArray[np.uint8]
    num_tokens: int
    bias: npt.NDArray[np.float32] | None = None
    residual: npt.NDArray[np.float32] | None = None
    activation: str | None = None
    first_group: int = 0
    x_groups: int | None = None

    def run(self, *, num_threads: int = 1, way: DotProduct | None = None, quantized: bool = False) -> Array:
        """y: float32 [tokens, columns], or the bytes of an `int8_group32` buffer."""
        columns = self.weight.num_rows // 2 if self.weight.gated else self.weight.num_rows
        y: Array = np.full((self.num_tokens, columns), np.nan, np.float32)
        target: Matrix | Activations = Matrix(y.ctypes.data, 4 * columns)
        if quantized:
            y = aligned(int8_group32_bytes(self.num_tokens, columns))
            target = Activations(y.ctypes.data, -(-columns // GROUP))
        scratch, data = aligned(SCRATCH_BYTES * num_threads), aligned(len(self.weight.data))
        data[:] = self.weight.data
        groups = self.x_groups or -(-self.weight.num_columns // GROUP)
        arguments = linear_arguments(
            linear_weight(self.weight, data.ctypes.data),
            Activations(self.x.ctypes.data, groups, self.first_group),
            target,
            scratch.ctypes.data,
            bias=0 if self.bias is None else self.bias.ctypes.data,
            residual=None if self.residual is None else Matrix(self.residual.ctypes.data, 4 * columns),
            activation=self.activation,
        )
        kernel = linear_kernel(self.weight.format, one_token=self.num_tokens == 1, way=way)
        run_kernel(kernel, arguments, self.num_tokens, num_threads)
        return y


def linear_weight(weight: PackedWeight, address: int) -> LinearWeight:
    """A packed weight that lies at an address."""
    return LinearWeight(address, weight.format, weight.num_rows, weight.num_columns, weight.gated)


def run_kernel(kernel: NativeFunction, arguments: tuple[int, ...], num_tokens: int, num_threads: int = 1) -> None:
    """One op in a step of its own."""
    ops = OpList(1)
    ops.append(kernel, *arguments, num_tokens=num_tokens)
    pool = ThreadPool(num_threads, num_spins=100)
    try:
        pool.run(ops)
    finally:
        pool.close()
