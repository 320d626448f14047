"""The op `linear` with packed weights and `int8_group32` activations. Called by the executor of programs.

`linear_kernel(...)` gives the kernel and `linear_arguments(...)` its columns. One token: each thread streams its row
blocks once. More tokens: a chunk of rows is multiplied with all panels of up to 256 tokens. A token's result is bitwise
the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.cpu_features import DotProduct, best_dot_product, supported_dot_products
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, device_panel_width
from tokenmill.ops.cpu.jit import NativeFunction, device
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, GROUP_BYTES
from tokenmill.ops.cpu.linear_blocks import gemv_block, panel_block
from tokenmill.ops.cpu.linear_epilogue import (
    ACTIVATION,
    ACTIVATIONS,
    BLOCK_TOTALS,
    NO_ACTIVATION,
    finish_gated,
    finish_plain,
)
from tokenmill.ops.cpu.packing import ENCODINGS, ROW_BLOCK, encoding_of, num_groups, padded_rows
from tokenmill.ops.cpu.simd import broadcast, float32, store

# Columns of the op row; those of the epilogue follow.
VALUES: Final = FIRST_ARGUMENT  # address of the activations
VALUES_GROUPS: Final = FIRST_ARGUMENT + 1  # groups of a token in their buffer
FIRST_GROUP: Final = FIRST_ARGUMENT + 2  # the first one to read
WEIGHT: Final = FIRST_ARGUMENT + 3  # address of the packed weight
NUM_GROUPS: Final = FIRST_ARGUMENT + 4  # groups of a row of the weight
NUM_BLOCKS: Final = FIRST_ARGUMENT + 5  # row blocks of the weight: a multiple of 2, of 4 if gated
SCRATCH: Final = FIRST_ARGUMENT + 6  # address of the scratch memory of thread 0; `SCRATCH_BYTES` for each thread

TOKEN_BLOCK: Final = 256
"""Tokens that are computed with one preparation of a chunk: their activations stay in the cache."""

GROUP_BLOCK: Final = 48
"""Groups of a chunk that are multiplied with all tokens before the next ones: they stay in the fastest cache."""

MAX_BLOCKS: Final = 4
"""Row blocks of a chunk."""

TILES: Final = {
    DotProduct.AVX512_VNNI: (8, 2),
    DotProduct.AVX_VNNI: (4, 1),
    DotProduct.AVX2: (4, 1),
    DotProduct.PORTABLE: (4, 1),
}
"""Tokens and row blocks whose sums fit the registers."""

SCRATCH_BYTES: Final = TOKEN_BLOCK * MAX_BLOCKS * BLOCK_TOTALS
"""Scratch memory of one thread; ops may share it."""


@dataclass(frozen=True, slots=True)
class LinearVariant:
    """One of several ways to compute the same bits; which is the fastest depends on the machine and the shape.

    Args:
        way: how to compute dot products.
        tile_tokens, tile_blocks: tokens and row blocks whose sums stay in registers, with several tokens.
        fetches: whether the row blocks that come next are fetched meanwhile, with several tokens.
    """

    way: DotProduct
    tile_tokens: int
    tile_blocks: int
    fetches: bool = True

    @property
    def name(self) -> str:
        """In timing caches."""
        fetching = "fetch" if self.fetches else "plain"
        return f"{self.way.name.lower()} {self.tile_tokens}x{self.tile_blocks} {fetching}"


def usual_variant(way: DotProduct) -> LinearVariant:
    """What is used where nothing was measured."""
    return LinearVariant(way, *TILES[way])


def linear_variants(*, one_token: bool) -> tuple[LinearVariant, ...]:
    """The variants that may be the fastest on this CPU, the usual one first."""
    best, *others = supported_dot_products()
    usual = usual_variant(best)
    variants = [usual]
    if not one_token:
        variants.append(replace(usual, fetches=False))
    if not one_token and best is DotProduct.AVX512_VNNI:
        variants.append(replace(usual, tile_tokens=16, tile_blocks=1))
    # Half as wide instructions may let the cores run faster; what has no instruction for it never wins.
    variants += [usual_variant(way) for way in others if way is DotProduct.AVX_VNNI]
    return tuple(variants)


@device
def zero_totals(totals: int, num_bytes: int) -> None:
    """Clear memory, a multiple of 64 bytes."""
    for offset in range(0, num_bytes, 64):
        store(totals + offset, broadcast(float32(0.0)))


def _one_token_kernel(encoding: int, variant: LinearVariant) -> NativeFunction:
    group_bytes = ENCODINGS[encoding].group_bytes
    way = int(variant.way)

    def linear_one_token(thread: int, num_threads: int, row: int) -> None:
        num_groups = argument(row, NUM_GROUPS)
        values = argument(row, VALUES) + argument(row, FIRST_GROUP) * GROUP_BYTES
        totals = argument(row, SCRATCH) + thread * SCRATCH_BYTES
        gated = argument(row, ACTIVATION) != NO_ACTIVATION
        chunk_blocks = 4 if gated else 1
        first, end = chunk_range(thread, num_threads, argument(row, NUM_BLOCKS) // chunk_blocks)
        block_bytes = num_groups * group_bytes
        weights = argument(row, WEIGHT) + first * chunk_blocks * block_bytes
        for chunk in range(first, end):
            for block in range(chunk_blocks):
                gemv_block(encoding, way, weights, values, num_groups, totals + block * BLOCK_TOTALS)
                weights += block_bytes
            if gated:
                finish_gated(row, totals, 0, 1, chunk)
            else:
                finish_plain(row, totals, 0, 1, chunk, 1)

    return NativeFunction(linear_one_token)


def _many_tokens_kernel(encoding: int, variant: LinearVariant) -> NativeFunction:
    group_bytes = ENCODINGS[encoding].group_bytes
    way, wide, tile_blocks = int(variant.way), variant.tile_tokens, variant.tile_blocks
    wide_8 = min(wide, 8)
    fetches = 1 if variant.fetches else 0

    def linear_many_tokens(thread: int, num_threads: int, row: int) -> None:
        num_tokens, num_groups = argument(row, COLUMN_NUM_TOKENS), argument(row, NUM_GROUPS)
        width = device_panel_width(num_tokens)
        panel_group = GROUP_BYTES * width
        panel_bytes = argument(row, VALUES_GROUPS) * panel_group
        totals = argument(row, SCRATCH) + thread * SCRATCH_BYTES
        gated = argument(row, ACTIVATION) != NO_ACTIVATION
        chunk_blocks = 4 if gated else 2
        stride = chunk_blocks * BLOCK_TOTALS
        tile_tokens = min(width, wide)
        num_chunks = argument(row, NUM_BLOCKS) // chunk_blocks
        block_bytes = num_groups * group_bytes
        ahead = fetches * chunk_blocks * block_bytes
        num_token_blocks = (num_tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
        first, end = chunk_range(thread, num_threads, num_chunks * num_token_blocks)
        for item in range(first, end):
            first_token, chunk = item // num_chunks * TOKEN_BLOCK, item % num_chunks
            count = min(num_tokens - first_token, TOKEN_BLOCK)
            num_panels = (count + width - 1) // width
            zero_totals(totals, num_panels * width * stride)
            panels = argument(row, VALUES) + first_token // width * panel_bytes
            weights = argument(row, WEIGHT) + chunk * chunk_blocks * block_bytes
            for group in range(0, num_groups, GROUP_BLOCK):
                length = min(num_groups - group, GROUP_BLOCK)
                w = weights + group * group_bytes
                values = panels + (argument(row, FIRST_GROUP) + group) * panel_group
                for tile in range(num_panels * width // tile_tokens):
                    token = tile * tile_tokens
                    x = values + token // width * panel_bytes + token % width * 4
                    y = totals + token * stride
                    for block in range(0, chunk_blocks, tile_blocks):
                        v, z = w + block * block_bytes, y + block * BLOCK_TOTALS
                        if width == 16:
                            panel_block(
                                encoding, way, 16, wide, tile_blocks, v, block_bytes, ahead, x, length, z, stride
                            )
                        elif width == 8:
                            panel_block(
                                encoding, way, 8, wide_8, tile_blocks, v, block_bytes, ahead, x, length, z, stride
                            )
                        else:
                            panel_block(encoding, way, 4, 4, tile_blocks, v, block_bytes, ahead, x, length, z, stride)
            if gated:
                finish_gated(row, totals, first_token, count, chunk)
            else:
                finish_plain(row, totals, first_token, count, 2 * chunk, 2)

    return NativeFunction(linear_many_tokens)


@cache
def linear_kernel(
    weight_format: str, *, one_token: bool, way: DotProduct | None = None, variant: LinearVariant | None = None
) -> NativeFunction:
    """The kernel for packed weights of a format; compiled at first use of its address.

    Args:
        weight_format: one of `packing.FORMATS`.
        one_token: for steps in which the op has exactly one token; else for 2 and more.
        way: how to compute dot products; default: the best that this CPU has.
        variant: how to do everything; default: what is usual for `way`.

    Raises:
        UnsupportedFeatureError: no kernel reads the format.
    """
    encoding = ENCODINGS.index(encoding_of(weight_format))
    make = _one_token_kernel if one_token else _many_tokens_kernel
    return make(encoding, variant or usual_variant(best_dot_product() if way is None else way))


@dataclass(frozen=True, slots=True)
class Activations:
    """`int8_group32` columns that a linear reads.

    Args:
        address: of the buffer.
        num_groups: groups of a token in the buffer.
        first_group: the first one to read.
    """

    address: int
    num_groups: int
    first_group: int = 0


@dataclass(frozen=True, slots=True)
class Matrix:
    """float32 columns of a buffer: address of the first, bytes from token to token."""

    address: int
    stride: int


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A packed weight in memory; the fields are those of `PackedWeight`.

    Args:
        address: of the packed data; multiples of 64 are best.
    """

    address: int
    format: str
    num_rows: int
    num_columns: int
    gated: bool = False


def linear_arguments(
    weight: LinearWeight,
    x: Activations,
    y: Matrix | Activations,
    scratch: int,
    *,
    bias: int = 0,
    residual: Matrix | None = None,
    activation: str | None = None,
) -> tuple[int, ...]:
    """Arguments of the op row for `OpList.append`; the same for both kernels of the format.

    Args:
        x: activations of `weight.num_columns` columns (rounded up to 32).
        y: float32, or int8_group32 if there is an activation.
        scratch: address of `SCRATCH_BYTES` for each thread, a multiple of 64.
        bias: address of float32 [num_rows], or 0.
        residual: added to the result; may be `y`.
        activation: silu or gelu_pytorch_tanh: the weight is gated, y = activation(gate) * up.

    Raises:
        InvalidParameterError: the parts do not fit together.
    """
    if activation not in ACTIVATIONS:
        raise InvalidParameterError(f"The activation {activation!r} is not known.", field="activation")
    if weight.gated != (activation is not None):
        raise InvalidParameterError("A gated weight needs an activation, another one has none.", field="activation")
    if residual is not None and weight.gated:
        raise InvalidParameterError("A gated linear adds no residual.", field="residual")
    quantized = isinstance(y, Activations)
    if quantized and not weight.gated:
        raise InvalidParameterError("Only gated linears write int8_group32.", field="y")
    groups = num_groups(weight.num_columns)
    if x.first_group + groups > x.num_groups:
        raise InvalidParameterError(f"x has {x.num_groups} groups, the weight reads {groups}.", field="x")
    num_blocks = padded_rows(weight.num_rows, gated=weight.gated) // ROW_BLOCK
    encoding = encoding_of(weight.format)
    scales = weight.address + num_blocks * groups * encoding.group_bytes if encoding.scale_bytes == 0 else 0
    output = (y.address, 0, y.num_groups) if isinstance(y, Activations) else (y.address, y.stride, 0)
    if isinstance(y, Activations) and y.first_group:
        raise InvalidParameterError("Activations are written from their first group on.", field="y")
    return (
        *(x.address, x.num_groups, x.first_group, weight.address, groups, num_blocks, scratch),
        *output,
        weight.num_rows // 2 if weight.gated else weight.num_rows,
        bias,
        *((residual.address, residual.stride) if residual else (0, 0)),
        ACTIVATIONS[activation],
        scales,
    )
