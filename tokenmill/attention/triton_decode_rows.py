"""The end of decode attention of many rows: results of several key/value heads, quantized by the last program of a row.

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
    """The results of a row, all heads together, as float8_e4m3fn with a scale.

    Args:
        float8: [T, H * D] float8_e4m3fn, contiguous.
        scales: [T] float32.
        arrivals: [T] int32 zeros, and zeros again afterwards. Not for two launches at the same time.
    """

    float8: torch.Tensor
    scales: torch.Tensor
    arrivals: torch.Tensor


@triton.jit
def _quantize_last(
    output: tl.tensor, result: QuantizedResult, row: tl.tensor, num_programs: tl.constexpr, size: tl.constexpr
) -> None:
    """Quantize the row if all its programs have stored their results."""
    block_size: tl.constexpr = triton.next_power_of_2(size)
    tl.debug_barrier()  # all threads' stores come before the one thread's arrival
    is_last = tl.atomic_add(result.arrivals + row, 1, sem="acq_rel") == num_programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(result.arrivals + row, 0)  # ready for the next launch
        columns = tl.arange(0, block_size)[None, :]
        numbers = tl.load(output + row * size + columns, mask=columns < size, other=0.0, cache_modifier=".cg")
        rounded, scale = quantized(numbers.to(tl.float32))
        tl.store(result.float8 + row * size + columns, rounded, mask=columns < size)
        tl.store(result.scales + row + tl.zeros([1], tl.int32), scale)


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
    """End the softmax and store the results of the heads that are there.

    The last program of a row to end quantizes the row, of which it may be the only one.
    """
    num_lanes: tl.constexpr = num_heads * block_m
    size: tl.constexpr = num_kv_heads * group * head_dim
    total = total.reshape(num_lanes)
    total = tl.where(total > 0, total, 1.0)  # a row that pads has no tokens
    lanes = tl.arange(0, num_lanes)
    heads = (first_head + lanes // block_m) * group + lanes % block_m
    is_head = lanes % block_m < group
    ended = end_softmax(
        values.reshape(num_lanes, head_dim), maximum.reshape(num_lanes), total, row * (num_kv_heads * group) + heads,
        heads, is_head, result, value_scale,
    )  # fmt: skip
    places = row * size + heads[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    if quantized_result is not None and num_heads == num_kv_heads:
        numbers = tl.where(is_head[:, None], ended.to(tl.float32), 0.0)
        rounded, scale = quantized(numbers.reshape(1, num_lanes * head_dim))
        tl.store(quantized_result.float8 + places, rounded.reshape(num_lanes, head_dim), mask=is_head[:, None])
        tl.store(quantized_result.scales + row + tl.zeros([1], tl.int32), scale)
    else:
        tl.store(result.output + places, ended, mask=is_head[:, None])
        if quantized_result is not None:
            _quantize_last(result.output, quantized_result, row, num_kv_heads // num_heads, size)
