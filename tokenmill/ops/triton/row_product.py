"""The product of one row with a weight in words of four elements, with what stands before and behind it.

Four neighbouring weights come as one integer and one row's four values as another, and both are taken apart in
registers: so a thread sums four products into one register, has room for many loads under way, and carries a block
loaded ahead without packing bytes. `_matvec_features_kernel` holds the whole row and goes over the output features,
`_matvec_row_kernel` goes over a longer row. Either adds a residual, normalizes, and applies a gated activation on the
way. Weights are of x's type or float8_e4m3fn with a scale for each output feature. Called by `ops.row_product` and
`matvec.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.platform import num_multiprocessors
from tokenmill.ops.triton.activation import activated
from tokenmill.ops.triton.launch import can_overlap, is_interpreted
from tokenmill.ops.triton.linear import load_weights, scaled


class Row(NamedTuple):
    """One row [1, I] as a kernel argument, and what it goes through on the way into the product.

    Args:
        data: the row.
        norm: [I] of its type, the factors of a root-mean-square norm; None: the row is multiplied as it is.
        residual: [1, I], added before the norm; None: nothing is.
        stream: [1, I], where the sum of both goes.
    """

    data: Any  # a tensor; inside a kernel a pointer
    norm: Any = None
    residual: Any = None
    stream: Any = None


WORD = tl.constexpr(4)
"""Elements that are loaded as one integer."""
WORDS_PER_LOAD = tl.constexpr(2)
"""Words of a thread that lie side by side: 16 bytes of x, so that its x and its weights meet in registers."""


@triton.jit
def _bits_to_float32(bits: tl.tensor, element: tl.constexpr) -> tl.tensor:
    """float32 of the low 16 bits of int32 `bits`, which are a bfloat16 or a float16."""
    if element == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_16bit(words: tl.tensor, element: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """float32 of four bfloat16 or float16 in each int64."""
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    if element == tl.bfloat16:
        second = (low & -65536).to(tl.float32, bitcast=True)
        fourth = (high & -65536).to(tl.float32, bitcast=True)
    else:
        second, fourth = _bits_to_float32(low >> 16, element), _bits_to_float32(high >> 16, element)
    return _bits_to_float32(low, element), second, _bits_to_float32(high, element), fourth


@triton.jit
def unpack_float8(words: tl.tensor, interpreted: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
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
def unpack_weights(
    words: tl.tensor, element: tl.constexpr, interpreted: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """float32 of four weights in each word: float8_e4m3fn in int32, `element` in int64."""
    if words.dtype == tl.int32:
        first, second, third, fourth = unpack_float8(words, interpreted)
    else:
        first, second, third, fourth = unpack_16bit(words, element)
    return first, second, third, fourth


@triton.jit
def _load_x(x: tl.tensor, words: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """Words of a row, zeros from word `size` on."""
    return tl.load(x + words) if is_inside else tl.load(x + words, mask=words < size, other=0)


@triton.jit
def _packed_16bit(first: tl.tensor, second: tl.tensor, element: tl.constexpr, interpreted: tl.constexpr) -> tl.tensor:
    """int32 of two float32, rounded to bfloat16 or float16: one fast instruction where two of one each are slow."""
    if interpreted:
        low = first.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (second.to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    if element == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def normed_words(
    x: Row,
    words: tl.tensor,  # [words]
    start: tl.tensor,  # word at which the block begins
    size: tl.tensor,
    squares: tl.tensor,  # [words] float32
    element: tl.constexpr,
    is_inside: tl.constexpr,
    interpreted: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four float32 of each word of a row, added to the residual stream and times the norm's factors; and `squares`
    with the squares of what the norm divides by. The first program stores the stream.
    """
    word_type: tl.constexpr = tl.pointer_type(tl.int64)
    x0, x1, x2, x3 = unpack_16bit(_load_x(x.data.to(word_type, bitcast=True) + start, words, size, is_inside), element)
    if x.norm is not None:
        if x.residual is not None:
            added = _load_x(x.residual.to(word_type, bitcast=True) + start, words, size, is_inside)
            r0, r1, r2, r3 = unpack_16bit(added, element)
            low = _packed_16bit(x0 + r0, x1 + r1, element, interpreted)
            high = _packed_16bit(x2 + r2, x3 + r3, element, interpreted)
            packed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            is_stored = (words < size) & (words * 0 + tl.program_id(0) == 0)
            tl.store(x.stream.to(word_type, bitcast=True) + start + words, packed, mask=is_stored)
            x0, x1, x2, x3 = unpack_16bit(packed, element)  # the norm sees the stream as the next layer will
        squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
        factors = _load_x(x.norm.to(word_type, bitcast=True) + start, words, size, is_inside)
        f0, f1, f2, f3 = unpack_16bit(factors, element)
        x0, x1, x2, x3 = x0 * f0, x1 * f1, x2 * f2, x3 * f3
    return x0, x1, x2, x3, squares


@triton.jit
def _add_block(
    total: tl.tensor,  # [features, words]
    squares: tl.tensor,  # [words]
    weights: tl.tensor,  # [features, words]
    x: Row,
    words: tl.tensor,  # [words]
    start: tl.tensor,
    num_words: tl.tensor,
    element: tl.constexpr,
    is_inside: tl.constexpr,
    interpreted: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add the products of one block."""
    x0, x1, x2, x3, squares = normed_words(x, words, start, num_words - start, squares, element, is_inside, interpreted)
    w0, w1, w2, w3 = unpack_weights(weights, element, interpreted)
    total += w0 * x0[None, :]
    total += w1 * x1[None, :]
    total += w2 * x2[None, :]
    total += w3 * x3[None, :]
    return total, squares


@triton.jit
def features_of(
    tile: tl.tensor, out_features: tl.tensor, activation: tl.constexpr, block_out: tl.constexpr
) -> tl.tensor:
    """[block_out] output features of a tile; with an activation a gate, its up, the next gate, ..."""
    features = tile * block_out + tl.arange(0, block_out)
    if activation != "":
        features = features // 2 + features % 2 * (out_features // 2)
    return features


@triton.jit
def store_features(
    result: tl.tensor,  # [features, 1] float32
    out: tl.tensor,
    tile: tl.tensor,
    out_features: tl.tensor,
    activation: tl.constexpr,
    block_out: tl.constexpr,
) -> None:
    """Store a tile's features; with an activation they are pairs of gate and up, of which one comes out."""
    if activation == "":
        features = tile * block_out + tl.arange(0, block_out)
        tl.store(out + features[:, None], result.to(out.dtype.element_ty), mask=(features < out_features)[:, None])
    else:
        rounded = result.to(out.dtype.element_ty).to(tl.float32)  # as it would be between two ops
        gate, up = tl.split(rounded.reshape(block_out // 2, 2))
        pairs = tile * (block_out // 2) + tl.arange(0, block_out // 2)
        gated = activated(gate, activation == "silu") * up
        tl.store(out + pairs, gated.to(out.dtype.element_ty), mask=pairs < out_features // 2)


@triton.jit
def _matvec_row_kernel(
    x: Row,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    eps: float,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    activation: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One program: `block_out` output features, over all input features."""
    if overlaps:
        gdc_launch_dependents()
    element: tl.constexpr = x.data.dtype.element_ty
    word_type: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.float8e4nv else tl.int64
    features = features_of(tl.program_id(0), out_features, activation, block_out)
    is_feature = features < out_features
    block: tl.constexpr = block_in // WORD
    words = tl.max_contiguous(tl.arange(0, block), WORDS_PER_LOAD)
    num_words = in_features // WORD
    # Features past the end read the last one again: no mask on the loads that matter.
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * num_words
    weights = weight.to(tl.pointer_type(word_type), bitcast=True) + starts[:, None] + words[None, :]
    ahead = load_weights(weights, words, num_words, is_even)
    if overlaps:
        gdc_wait()  # x is there only now; the first weights have been on their way before
    total = tl.zeros([block_out, block], tl.float32)
    squares = tl.zeros([block], tl.float32)
    for start in range(block, num_words, block):
        now = ahead
        ahead = load_weights(weights + start, words, num_words - start, is_even)
        total, squares = _add_block(
            total, squares, now, x, words, start - block, num_words, element, True, interpreted
        )  # fmt: skip
    done = (num_words - 1) // block * block
    total, squares = _add_block(total, squares, ahead, x, words, done, num_words, element, is_even, interpreted)
    result = tl.sum(total, axis=1, keep_dims=True)
    if x.norm is not None:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / in_features + eps)
    result = scaled(result, features, is_feature, weight_scale, bias)
    store_features(result, out, tl.program_id(0), out_features, activation, block_out)


@triton.jit
def _load_tile(
    rows: tl.tensor,  # pointer to the first word of the weight
    tile: tl.tensor,
    words: tl.tensor,
    num_words: tl.tensor,
    out_features: tl.tensor,
    activation: tl.constexpr,
    block_out: tl.constexpr,
    is_even: tl.constexpr,
) -> tl.tensor:
    """Weights [block_out, words] of a tile; nothing is read for tiles behind the last one."""
    features = features_of(tile, out_features, activation, block_out)
    addresses = rows + tl.minimum(features, out_features - 1).to(tl.int64)[:, None] * num_words + words[None, :]
    inside = (features * 0 + tile * block_out < out_features)[:, None]
    if not is_even:
        inside = inside & (words < num_words)[None, :]
    return tl.load(addresses, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _matvec_features_kernel(
    x: Row,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    eps: float,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    activation: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One program: every so many tiles of output features. It prepares the row once and keeps all of it."""
    if overlaps:
        gdc_launch_dependents()
    element: tl.constexpr = x.data.dtype.element_ty
    word_type: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.float8e4nv else tl.int64
    words = tl.max_contiguous(tl.arange(0, block_in // WORD), WORDS_PER_LOAD)
    num_words = in_features // WORD
    rows = weight.to(tl.pointer_type(word_type), bitcast=True)
    first, step = tl.program_id(0), tl.num_programs(0)
    ahead = _load_tile(rows, first, words, num_words, out_features, activation, block_out, is_even)
    if overlaps:
        gdc_wait()  # x is there only now; the first weights have been on their way before
    squares = tl.zeros([block_in // WORD], tl.float32)
    x0, x1, x2, x3, squares = normed_words(x, words, 0, num_words, squares, element, is_even, interpreted)
    factor = 1.0
    if x.norm is not None:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / in_features + eps)
    for tile in range(first, tl.cdiv(out_features, block_out), step):
        w0, w1, w2, w3 = unpack_weights(ahead, element, interpreted)
        ahead = _load_tile(rows, tile + step, words, num_words, out_features, activation, block_out, is_even)
        products = w0 * x0[None, :] + w1 * x1[None, :] + w2 * x2[None, :] + w3 * x3[None, :]
        result = tl.sum(products, axis=1, keep_dims=True) * factor
        features = features_of(tile, out_features, activation, block_out)
        result = scaled(result, features, features < out_features, weight_scale, bias)
        store_features(result, out, tile, out_features, activation, block_out)


def fused_matvec(
    x: Row,
    eps: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    plan: StreamPlan,
) -> torch.Tensor:
    """`matvec` with what stands before and behind it: residual addition and norm, and a gated activation.

    Args:
        x: the row, which comes in words (`comes_in_words`), and its norm.
        eps: of the norm.
        weight, weight_scale, bias: as `matvec` takes them.
        activation: Hugging Face name; with one the weight is [2 I, ...], gates first. "": none.
        plan: block sizes.

    Returns:
        [1, O], or [1, O / 2] with an activation, of x's type.
    """
    (out_features, in_features), row = weight.shape, x.data
    assert row.shape == (1, in_features) and row.stride(1) == 1 and weight.is_contiguous()
    block_out = max(2, plan.block_out) if activation else plan.block_out
    out = torch.empty(1, out_features // 2 if activation else out_features, dtype=row.dtype, device=row.device)
    overlaps = can_overlap(row.device)
    num_tiles = triton.cdiv(out_features, block_out)
    kernel, num_programs = _matvec_row_kernel, num_tiles
    if plan.programs_per_multiprocessor:
        assert plan.block_in >= in_features, "programs that walk over the features hold the whole row"
        kernel = _matvec_features_kernel
        num_programs = min(num_tiles, plan.programs_per_multiprocessor * num_multiprocessors(row.device))
    kernel[(num_programs,)](
        x,
        weight,
        weight_scale,
        bias,
        out,
        out_features,
        in_features,
        eps,
        block_out=block_out,
        block_in=plan.block_in,
        activation=activation,
        is_even=in_features % plan.block_in == 0,
        overlaps=overlaps,
        interpreted=is_interpreted(),
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    return out


def comes_in_words(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether four neighbours of x and of each output feature's weights can be loaded as one integer."""
    return (
        x.dtype.itemsize == 2
        and weight.shape[1] % WORD.value == 0
        and x.data_ptr() % (WORD.value * x.itemsize) == 0
        and weight.data_ptr() % (WORD.value * weight.itemsize) == 0
    )
