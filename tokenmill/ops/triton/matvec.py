"""The product of one row with a weight, as fast as the weight can be read: one stream's decode steps are made of it.

`matvec` takes four neighbouring weights as one integer and one row's four values as another, and takes both apart in
registers: so a thread sums four products into one register, has room for many loads under way, and carries a block
loaded ahead without packing bytes. Shapes that do not divide into such words, and float32, go to a plainer kernel.
Weights are of x's type or float8_e4m3fn with a scale for each output feature. Called by `ops.linear` and `ops.fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.triton.launch import can_overlap, is_interpreted

WORD = tl.constexpr(4)
"""Elements that are loaded as one integer."""
WORDS_PER_LOAD = tl.constexpr(2)
"""Words of a thread that lie side by side: 16 bytes of x, so that its x and its weights meet in registers."""
VECTOR = tl.constexpr(8)
"""The same in elements."""
LINE_BYTES = tl.constexpr(128)


@triton.jit
def scaled(
    total: tl.tensor, features: tl.tensor, is_feature: tl.tensor, weight_scale: tl.tensor, bias: tl.tensor
) -> tl.tensor:
    """Sums [features, rows] times the features' scales, plus their bias; either may be None."""
    if weight_scale is not None:
        total *= tl.load(weight_scale + features, mask=is_feature, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def _bits_to_float32(bits: tl.tensor, element: tl.constexpr) -> tl.tensor:
    """float32 of the low 16 bits of int32 `bits`, which are a bfloat16 or a float16."""
    if element == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpack_16bit(words: tl.tensor, element: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """float32 of four bfloat16 or float16 in each int64."""
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    if element == tl.bfloat16:
        second = (low & -65536).to(tl.float32, bitcast=True)
        fourth = (high & -65536).to(tl.float32, bitcast=True)
    else:
        second, fourth = _bits_to_float32(low >> 16, element), _bits_to_float32(high >> 16, element)
    return _bits_to_float32(low, element), second, _bits_to_float32(high, element), fourth


@triton.jit
def _unpack_8bit(words: tl.tensor, interpreted: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """float32 of four float8_e4m3fn in each int32."""
    if interpreted:
        first = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        second = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        third = ((words >> 16) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        fourth = ((words >> 24) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            """{
                .reg .b16 low, high, a, b, c, d;
                .reg .b32 ab, cd;
                mov.b32 {low, high}, $4;
                cvt.rn.f16x2.e4m3x2 ab, low;
                cvt.rn.f16x2.e4m3x2 cd, high;
                mov.b32 {a, b}, ab;
                mov.b32 {c, d}, cd;
                cvt.f32.f16 $0, a;
                cvt.f32.f16 $1, b;
                cvt.f32.f16 $2, c;
                cvt.f32.f16 $3, d;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return first, second, third, fourth


@triton.jit
def load_weights(addresses: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of weights, zeros from column `size` on. Nothing else will read them: they need not stay in the cache."""
    if is_inside:
        return tl.load(addresses, eviction_policy="evict_first")
    return tl.load(addresses, mask=(columns < size)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _add_block(
    total: tl.tensor,  # [features, words]
    weights: tl.tensor,  # [features, words]
    x: tl.tensor,  # pointer to int64
    words: tl.tensor,  # [words]
    size: tl.tensor,
    element: tl.constexpr,
    is_inside: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """Add the products of one block."""
    x_words = tl.load(x + words) if is_inside else tl.load(x + words, mask=words < size, other=0)
    x0, x1, x2, x3 = _unpack_16bit(x_words, element)
    if weights.dtype == tl.int32:
        w0, w1, w2, w3 = _unpack_8bit(weights, interpreted)
    else:
        w0, w1, w2, w3 = _unpack_16bit(weights, element)
    total += w0 * x0[None, :]
    total += w1 * x1[None, :]
    total += w2 * x2[None, :]
    total += w3 * x3[None, :]
    return total


@triton.jit
def _prefetch_lines(
    starts: tl.tensor,  # [features] pointers
    first: tl.constexpr,
    num_bytes: tl.tensor,
    num_lines: tl.constexpr,
) -> None:
    """Ask for `num_lines` cache lines of each feature from byte `first` on, as far as it goes, to come to L2."""
    offsets = tl.minimum(first + tl.arange(0, num_lines) * LINE_BYTES, num_bytes - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [starts.to(tl.pointer_type(tl.int8), bitcast=True)[:, None] + offsets[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _matvec_words_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    prefetched_lines: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One program: `block_out` output features, over all input features."""
    if overlaps:
        gdc_launch_dependents()
    element: tl.constexpr = x.dtype.element_ty
    is_float8: tl.constexpr = weight.dtype.element_ty == tl.float8e4nv
    word_type: tl.constexpr = tl.int32 if is_float8 else tl.int64
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    block: tl.constexpr = block_in // WORD
    words = tl.max_contiguous(tl.arange(0, block), WORDS_PER_LOAD)
    num_words = in_features // WORD
    # Features past the end read the last one again: no mask on the loads that matter.
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * num_words
    rows = weight.to(tl.pointer_type(word_type), bitcast=True) + starts
    weights = rows[:, None] + words[None, :]
    x_words = x.to(tl.pointer_type(tl.int64), bitcast=True)
    ahead = load_weights(weights, words, num_words, is_even)
    if overlaps:
        if prefetched_lines > 0:
            row_bytes = num_words * (word_type.primitive_bitwidth // 8)
            _prefetch_lines(rows, block * (word_type.primitive_bitwidth // 8), row_bytes, prefetched_lines)
        gdc_wait()  # x is there only now; the first weights have been on their way before
    total = tl.zeros([block_out, block], tl.float32)
    for start in range(block, num_words, block):
        now = ahead
        ahead = load_weights(weights + start, words, num_words - start, is_even)
        total = _add_block(total, now, x_words + (start - block), words, num_words, element, True, interpreted)
    done = (num_words - 1) // block * block
    total = _add_block(total, ahead, x_words + done, words, num_words - done, element, is_even, interpreted)
    result = scaled(tl.sum(total, axis=1, keep_dims=True), features, is_feature, weight_scale, bias)
    tl.store(out + features[:, None], result.to(out.dtype.element_ty), mask=is_feature[:, None])


@triton.jit
def _load_row(x: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of x in float32, zeros from column `size` on."""
    if is_inside:
        return tl.load(x + columns).to(tl.float32)
    return tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def _matvec_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_out` output features, over all input features."""
    if overlaps:
        gdc_launch_dependents()
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    columns = tl.max_contiguous(tl.arange(0, block_in), VECTOR)
    # Features past the end read the last one again: no mask on the loads that matter.
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
    weights = weight + starts[:, None] + columns[None, :]
    w = load_weights(weights, columns, in_features, is_even)
    if overlaps:
        gdc_wait()  # x is there only now; the first weights have been on their way before
    total = w.to(tl.float32) * _load_row(x, columns, in_features, is_even)[None, :]
    for start in range(block_in, in_features, block_in):
        w = load_weights(weights + start, columns, in_features - start, is_even)
        total += w.to(tl.float32) * _load_row(x + start, columns, in_features - start, is_even)[None, :]
    result = scaled(tl.sum(total, axis=1, keep_dims=True), features, is_feature, weight_scale, bias)
    tl.store(out + features[:, None], result.to(out.dtype.element_ty), mask=is_feature[:, None])


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: StreamPlan,
) -> torch.Tensor:
    """`x @ weight.T * weight_scale + bias` of one row.

    Args:
        x: [1, I].
        weight: [O, I] contiguous, of x's type or float8_e4m3fn.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        plan: block sizes.

    Returns:
        [1, O], of x's type.
    """
    out_features, in_features = weight.shape
    assert x.shape == (1, in_features) and x.stride(1) == 1 and weight.is_contiguous()
    out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    overlaps = can_overlap(x.device)
    by_words = _comes_in_words(x, weight)
    of_words = {"prefetched_lines": plan.prefetched_lines, "interpreted": is_interpreted()} if by_words else {}
    kernel = _matvec_words_kernel if by_words else _matvec_kernel
    kernel[(triton.cdiv(out_features, plan.block_out),)](
        x,
        weight,
        weight_scale,
        bias,
        out,
        out_features,
        in_features,
        block_out=plan.block_out,
        block_in=plan.block_in,
        is_even=in_features % plan.block_in == 0,
        overlaps=overlaps,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
        **of_words,
    )
    return out


def _comes_in_words(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether four neighbours of x and of each output feature's weights can be loaded as one integer."""
    return (
        x.dtype.itemsize == 2
        and weight.shape[1] % WORD.value == 0
        and x.data_ptr() % (WORD.value * x.itemsize) == 0
        and weight.data_ptr() % (WORD.value * weight.itemsize) == 0
    )
