"""The end of decode attention of many rows: results of several key/value heads, or of a whole row, quantized.

Called by `triton_decode_heads.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenmill.attention.triton_common import Result, end_softmax
from tokenmill.ops.triton.fp8 import quantized


class QuantizedResult(NamedTuple):
    """Where the results of rows go, all heads of a row together, as float8_e4m3fn with a scale.

    Args:
        float8: [T, H * D] float8_e4m3fn, contiguous.
        scales: [T] float32.
    """

    float8: torch.Tensor
    scales: torch.Tensor


@triton.jit
def store_heads(
    values: tl.tensor,  # [num_heads, block_m, head_dim]
    maximum: tl.tensor,  # [num_heads, block_m]
    total: tl.tensor,  # [num_heads, block_m]
    row: tl.tensor,
    first_head: tl.tensor,
    result: Result,
    quantized_result: QuantizedResult | None,
    value_scale: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    num_heads: tl.constexpr,
    block_m: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    """End the softmax and store the results of the heads that are there; all heads of the row where it is quantized."""
    num_lanes: tl.constexpr = num_heads * block_m
    total = total.reshape(num_lanes)
    total = tl.where(total > 0, total, 1.0)  # a row that pads has no tokens
    lanes = tl.arange(0, num_lanes)
    heads = (first_head + lanes // block_m) * group + lanes % block_m
    is_head = lanes % block_m < group
    places = row * (num_kv_heads * group) + heads
    ended = end_softmax(
        values.reshape(num_lanes, head_dim), maximum.reshape(num_lanes), total, places, heads, is_head, result,
        value_scale,
    )  # fmt: skip
    offsets = places[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    if quantized_result is None:
        tl.store(result.output + offsets, ended, mask=is_head[:, None])
    else:
        numbers = tl.where(is_head[:, None], ended.to(tl.float32), 0.0)
        float8, scale = quantized(numbers.reshape(1, num_lanes * head_dim))
        tl.store(quantized_result.float8 + offsets, float8.reshape(num_lanes, head_dim), mask=is_head[:, None])
        tl.store(quantized_result.scales + row + tl.zeros([1], tl.int32), scale)
